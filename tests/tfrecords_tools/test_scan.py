"""Parts of a shard cover it, and records are found in it without an index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist.data.shards import shard_index, tfrecord
from tfrecords_tools.validation import scan


def index_of(*places: tuple[int, int]) -> np.ndarray:
  """Returns an index of records at (offset, length)."""
  rows = [(offset, length, 0, 0, 0) for offset, length in places]
  return np.array(rows, shard_index.INDEX_DTYPE)


@given(
  steps=st.lists(st.tuples(st.integers(0, 250), st.integers(16, 150)), max_size=30),
  behind=st.integers(-300, 300),
)
def test_parts_cover_the_shard_and_hold_each_record_once(steps, behind):
  places, end = [], 0
  for gap, length in steps:
    places.append((end + gap, length))
    end += gap + length
  size = max(end + behind, 0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scan, "_BYTES_A_PART", 200)
    patch.setattr(scan, "RECORDS_A_PART", 3)
    parts = list(scan.cut_parts("shard", index_of(*places), size=size))
  assert [part.start for part in parts] == [0, *(part.end for part in parts)][:-1]
  assert (parts[-1].end if parts else 0) == size
  rows = [(row, part) for part in parts for row in part.rows]
  assert [(int(row["offset"]), int(row["length"])) for row, _ in rows] == places
  for row, part in rows:
    assert min(int(row["offset"]), size) >= part.start
    assert min(int(row["offset"]) + int(row["length"]), size) <= part.end


def walked(tmp_path, content: bytes) -> list[tuple[int, int]]:
  """Returns (offset, length) of the records found in a shard of this content."""
  path = tmp_path / "shard"
  path.write_bytes(content)
  rows = scan.walk_part(str(path), size=len(content))
  return [(int(row["offset"]), int(row["length"])) for row in rows]


def test_records_are_found_without_an_index_until_a_length_is_corrupt(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(scan, "_WINDOW_BYTES", 40)
  content = b"".join(tfrecord.frame(bytes(size)) for size in (0, 5, 100, 7))
  valid = [(0, 16), (16, 21), (37, 116), (153, 23)]
  assert walked(tmp_path, content) == valid
  assert walked(tmp_path, content[:-1]) == [*valid[:3], (153, 22)]
  assert walked(tmp_path, content[:160]) == [*valid[:3], (153, 7)]
  corrupt = bytearray(content)
  corrupt[37] ^= 1
  assert walked(tmp_path, bytes(corrupt)) == [*valid[:2], (37, 64)]


@pytest.mark.parametrize("length", [2**64 - 1, 10**6])
def test_a_length_that_its_own_crc_confirms_is_not_believed(tmp_path, length: int):
  header = length.to_bytes(8, "little")
  header += tfrecord.masked_crc(header).to_bytes(4, "little")
  assert walked(tmp_path, header + bytes(100)) == [(0, 64)]
