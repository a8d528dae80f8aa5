"""facedist.data.shards.shard_index: names, round trip and corrupt files."""

import io
import pathlib
import tracemalloc

import numpy as np
import pytest

from facedist import errors
from facedist.data.shards import shard_index


def rows(count: int) -> np.ndarray:
  """Returns INDEX_DTYPE[count] with a different number in each place."""
  table = np.zeros(count, shard_index.INDEX_DTYPE)
  for column, name in enumerate(shard_index.INDEX_DTYPE.names):
    table[name] = np.arange(count) * 10 + column
  return table


def saved(array: np.ndarray) -> bytes:
  """Returns the .npy file of any array."""
  stream = io.BytesIO()
  np.save(stream, array)
  return stream.getvalue()


def test_shard_and_index_names_sort_as_their_numbers():
  assert shard_index.shard_name("train", 17, 256) == "train-00017-of-00256.tfrecord"
  name = shard_index.index_name("train-00017-of-00256.tfrecord")
  assert name == "train-00017-of-00256.index.npy"


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_loaded_index_equals_the_saved_one(tmp_path: pathlib.Path, count: int):
  path = tmp_path / "a.index.npy"
  path.write_bytes(shard_index.to_bytes(rows(count)))
  loaded = shard_index.load(str(path))
  assert loaded.dtype == shard_index.INDEX_DTYPE
  np.testing.assert_array_equal(loaded, rows(count))


def test_an_index_is_a_plain_numpy_file(tmp_path: pathlib.Path):
  path = tmp_path / "a.index.npy"
  path.write_bytes(shard_index.to_bytes(rows(3)))
  np.testing.assert_array_equal(np.load(path), rows(3))


def test_offsets_reach_beyond_4_gib():
  table = rows(1)
  table["offset"] = 2**40 + 1
  assert np.load(io.BytesIO(shard_index.to_bytes(table)))["offset"] == 2**40 + 1


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"not an index",
    b"PK\x03\x04 nor an archive",
    shard_index.to_bytes(rows(3))[:-1],
    shard_index.to_bytes(rows(3))[:40],
    saved(np.zeros(3)),
    saved(np.zeros((3, 5), np.int64)),
    saved(rows(4).reshape(2, 2)),
    saved(np.array([None])),
  ],
)
def test_a_file_that_is_not_an_index_is_a_data_error_that_names_it(
  tmp_path: pathlib.Path, content: bytes
):
  path = tmp_path / "a.index.npy"
  path.write_bytes(content)
  with pytest.raises(errors.DataError, match=r"a\.index\.npy is not a shard index"):
    shard_index.load(str(path))


def test_a_corrupt_header_is_never_another_error(tmp_path: pathlib.Path):
  path = tmp_path / "a.index.npy"
  good = shard_index.to_bytes(rows(3))
  for position in range(len(good) - rows(3).nbytes):
    for value in (0, 1, ord("("), ord("'"), 255):
      bad = bytearray(good)
      bad[position] = value
      path.write_bytes(bad)
      try:
        loaded = shard_index.load(str(path))
      except errors.DataError:
        continue
      assert loaded.dtype == shard_index.INDEX_DTYPE


@pytest.mark.parametrize(
  "shape", ["(1000000000000000000,)", "(10000000000,)", "(-1,)", "(2, 2)", "()"]
)
def test_a_header_that_claims_another_size_allocates_no_memory(
  tmp_path: pathlib.Path, shape: str
):
  path = tmp_path / "a.index.npy"
  path.write_bytes(shard_index.to_bytes(rows(3)).replace(b"(3,)", shape.encode()))
  tracemalloc.start()
  with pytest.raises(errors.DataError, match=r"a\.index\.npy is not a shard index"):
    shard_index.load(str(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 20  # bytes


def valid_row() -> np.ndarray:
  """Returns one record of 100 bytes at byte 50, its image in bytes 20 to 90 of it."""
  return np.array([(50, 100, 20, 70, 4)], shard_index.INDEX_DTYPE)


def test_rows_that_lie_in_their_shard_fit():
  shard_index.check_fits(valid_row(), path="i", shard_bytes=150, identities=5)
  shard_index.check_fits(valid_row()[:0], path="i", shard_bytes=0, identities=0)


@pytest.mark.parametrize(
  ("column", "value", "reason"),
  [
    ("offset", 51, "lies outside the shard"),
    ("offset", 2**64 - 1, "lies outside the shard"),
    ("length", 101, "lies outside the shard"),
    ("length", 2**32 - 1, "lies outside the shard"),
    ("length", 15, "is no record"),
    ("image_offset", 11, "has its image outside"),
    ("image_offset", 27, "has its image outside"),
    ("image_offset", 2**32 - 1, "has its image outside"),
    ("image_length", 77, "has its image outside"),
    ("image_length", 2**32 - 1, "has its image outside"),
    ("label", 5, "has no identity's label"),
    ("label", -1, "has no identity's label"),
  ],
)
def test_a_row_that_points_outside_is_named(column: str, value: int, reason: str):
  row = valid_row()
  row[column] = value
  with pytest.raises(errors.DataError, match=f"^i: record 0, .* {reason}"):
    shard_index.check_fits(row, path="i", shard_bytes=150, identities=5)


def test_a_missing_index_is_a_data_error(tmp_path: pathlib.Path):
  with pytest.raises(errors.DataError, match=r"none\.index\.npy does not exist"):
    shard_index.load(str(tmp_path / "none.index.npy"))
