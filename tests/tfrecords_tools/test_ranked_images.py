import os

import numpy as np
import pytest

from facedist import errors
from tfrecords_tools import external_sort
from tfrecords_tools.builder import plan
from tfrecords_tools.sources import base


def rows_of(keys):
  rows = np.zeros(len(keys), base.ROW_DTYPE)
  rows["key"] = keys
  return rows


def test_ranks_are_those_of_the_sorted_keys_and_equal_ones_stay_as_they_came():
  keys = np.random.default_rng(0).integers(0, 2**64, 60, np.uint64)
  keys[30:40] = keys[:10]
  paths = [f"n/{'é' * (number % 3)}{number}.jpg" for number in range(60)]
  images = plan.RankedImages()
  for start in range(0, 60, 4):
    images.add(rows_of(keys[start : start + 4]), paths[start : start + 4])
  expected = [paths[row] for row in np.argsort(keys, kind="stable")]
  for first, count in ((0, 60), (0, 1), (59, 1), (13, 22), (60, 0)):
    found = images.ranked(first, count)
    assert found.paths == expected[first : first + count]
    np.testing.assert_array_equal(found.rows["key"], np.sort(keys)[first:][:count])


def test_the_files_have_no_name_and_close_with_the_images(tmp_path, monkeypatch):
  monkeypatch.setattr(external_sort, "CACHE_KIB", 16)
  before = len(os.listdir("/proc/self/fd"))
  images = plan.RankedImages(scratch_dir=str(tmp_path))
  images.add(rows_of(range(2000)), [str(number) for number in range(2000)])
  images.ranked(0, 1)
  assert len(os.listdir("/proc/self/fd")) > before
  assert os.listdir(tmp_path) == []
  del images
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_that_names_the_folder(small_disk, monkeypatch):
  monkeypatch.setattr(external_sort, "CACHE_KIB", 16)
  images = plan.RankedImages(scratch_dir=str(small_disk))
  with pytest.raises(errors.DataError, match=rf"--scratch_dir={small_disk} is full"):
    images.add(rows_of(range(2000)), ["a" * 100] * 2000)
