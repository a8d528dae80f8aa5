import os

import numpy as np
import pytest

from facedist import errors
from tfrecords_tools.builder import plan
from tfrecords_tools.sources import base


def rows_of(keys):
  rows = np.zeros(len(keys), base.ROW_DTYPE)
  rows["key"] = keys
  return rows


@pytest.mark.parametrize("images_a_block", [1, 5, 1000])
def test_ranks_are_those_of_the_sorted_keys(monkeypatch, images_a_block):
  monkeypatch.setattr(plan, "IMAGES_A_BLOCK", images_a_block)
  keys = np.random.default_rng(0).integers(0, 2**64, 60, np.uint64)
  paths = [f"n/{'é' * (number % 3)}{number}.jpg" for number in range(60)]
  images = plan.Spill()
  for start in range(0, 60, 4):
    images.add(rows_of(keys[start : start + 4]), paths[start : start + 4])
  expected = [paths[row] for row in np.argsort(keys)]
  for first, count in ((0, 60), (0, 1), (59, 1), (13, 22), (60, 0)):
    found = images.ranked(first, count)
    assert found.paths == expected[first : first + count]
    np.testing.assert_array_equal(found.rows["key"], np.sort(keys)[first:][:count])


@pytest.mark.parametrize("top", [0, 255 << 56])
def test_a_bucket_of_any_size_is_read_a_window_at_a_time(monkeypatch, top):
  monkeypatch.setattr(plan, "IMAGES_A_BLOCK", 16)
  low = np.random.default_rng(1).integers(0, 2**56, 900, np.uint64)
  keys = low | np.uint64(top)  # all in one bucket
  paths = [f"n/{number}.jpg" for number in range(900)]
  images = plan.Spill()
  for start in range(0, 900, 9):
    images.add(rows_of(keys[start : start + 9]), paths[start : start + 9])
  expected = [paths[row] for row in np.argsort(keys)]
  for first in (*range(0, 900, 100), 450, 3):
    assert images.ranked(first, 100).paths == expected[first : first + 100]
    assert 0 < len(images._window.rows) <= 16


@pytest.mark.parametrize("images_a_block", [1, 1000])
def test_images_of_one_key_stay_as_they_came(monkeypatch, images_a_block):
  monkeypatch.setattr(plan, "IMAGES_A_BLOCK", images_a_block)
  images = plan.Spill()
  images.add(rows_of([5, 1, 5]), ["a", "b", "c"])
  images.add(rows_of([5]), ["d"])
  assert images.ranked(0, 4).paths == ["b", "a", "c", "d"]
  images.add(rows_of([1]), ["e"])
  assert images.ranked(0, 3).paths == ["b", "e", "a"]


def test_the_file_has_no_name_and_goes_with_the_spill(tmp_path):
  before = len(os.listdir("/proc/self/fd"))
  images = plan.Spill(scratch_dir=str(tmp_path))
  images.add(rows_of([1]), ["a"])
  images.ranked(0, 1)
  assert os.listdir(tmp_path) == []
  del images
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_told_by_its_folder():
  images = plan.Spill(scratch_dir="/dev/shm")
  images._file.close()
  images._file = open("/dev/full", "w+b", buffering=0)  # noqa: SIM115
  images.add(rows_of([1]), ["a"])
  with pytest.raises(errors.DataError, match=r"--scratch_dir=/dev/shm: No space left"):
    images.ranked(0, 1)
  images._file.close()
