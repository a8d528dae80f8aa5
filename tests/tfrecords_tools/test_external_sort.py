import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from tfrecords_tools import external_sort


@given(keys=st.lists(st.binary(max_size=3), max_size=60))
def test_records_come_in_order_and_equal_keys_as_they_came(keys):
  records = [(key, str(number).encode()) for number, key in enumerate(keys)]
  found = external_sort.sorted_by_key(records)
  assert list(found) == sorted(records, key=lambda record: record[0])


def test_more_records_than_the_cache_holds_are_sorted_on_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(external_sort, "CACHE_KIB", 16)
  scratch_dir = tmp_path / "it's new"
  records = [(os.urandom(8), bytes(100)) for _ in range(30_000)]
  before = len(os.listdir("/proc/self/fd"))
  found = external_sort.sorted_by_key(records, scratch_dir=str(scratch_dir))
  first = next(found)
  opened = [
    os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
  ]
  assert any(path.startswith(f"{scratch_dir}/") for path in opened)
  assert os.listdir(scratch_dir) == []  # the files have no name
  assert [first, *found] == sorted(records)
  assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_sort_that_is_left_closes_its_files(tmp_path, taken):
  records = ((b"%02d" % (number % 7), b"") for number in range(30))
  before = len(os.listdir("/proc/self/fd"))
  found = external_sort.sorted_by_key(records, scratch_dir=str(tmp_path))
  assert len(list(itertools.islice(found, taken))) == taken
  found.close()
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_that_names_the_folder(small_disk, monkeypatch):
  monkeypatch.setattr(external_sort, "CACHE_KIB", 16)
  records = ((os.urandom(8), bytes(1000)) for _ in range(400))
  with pytest.raises(errors.DataError, match=rf"--scratch_dir={small_disk} is full"):
    list(external_sort.sorted_by_key(records, scratch_dir=str(small_disk)))
