import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrecords_tools.sources import tables


@given(
  keys=st.lists(st.binary(max_size=3), max_size=60),
  records_a_run=st.integers(1, 9),
)
def test_records_come_in_order_and_equal_keys_as_they_came(keys, records_a_run):
  records = [(key, str(number).encode()) for number, key in enumerate(keys)]
  found = tables.sorted_by_key(records, records_a_run=records_a_run)
  assert list(found) == sorted(records, key=lambda record: record[0])


def test_more_runs_than_files_may_be_open_are_merged_between(monkeypatch):
  monkeypatch.setattr(tables, "MAX_RUNS", 3)
  rng = np.random.default_rng(0)
  records = [(bytes(rng.bytes(4)), b"%d" % number) for number in range(200)]
  found = tables.sorted_by_key(records, records_a_run=7)
  assert list(found) == sorted(records)


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_no_file_is_left_behind(tmp_path, taken):
  records = ((b"%02d" % (number % 7), b"") for number in range(30))
  found = tables.sorted_by_key(records, scratch_dir=str(tmp_path), records_a_run=4)
  assert len(list(itertools.islice(found, taken))) == taken
  assert os.listdir(tmp_path) == []  # they never had a name
