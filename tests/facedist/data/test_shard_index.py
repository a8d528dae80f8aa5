"""The index: its files, valid and corrupt, and rows by record number from each kind."""

import contextlib
import io
import os
import pathlib
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from facedist import errors
from facedist.data.shards import manifest, shard_index
from tests import files, noise_sets

COUNTS = (6, 7, 7)  # records of the shards: 20 in three, nearly evenly
KINDS = {
  "whole": shard_index.WholeIndex,
  "row by row": lambda *where: shard_index.RowIndex(*where, max_open=2),
  "cached": lambda *where: shard_index.CachedIndex(*where, max_bytes=1),
}


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
def test_an_index_is_a_plain_numpy_file(tmp_path: pathlib.Path, count: int):
  table = rows(count)
  table["offset"] += 2**40  # beyond 4 GiB
  path = tmp_path / "a.index.npy"
  path.write_bytes(shard_index.to_bytes(table))
  for loaded in (np.load(path), shard_index.load(str(path))):
    assert loaded.dtype == shard_index.INDEX_DTYPE
    np.testing.assert_array_equal(loaded, table)


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


def test_a_corrupt_header_is_never_another_error():
  good = shard_index.to_bytes(rows(3))
  for position in range(len(good) - rows(3).nbytes):
    for value in (0, 1, ord("("), ord("'"), 255):
      bad = bytearray(good)
      bad[position] = value
      with contextlib.suppress(errors.DataError):
        loaded = shard_index.from_bytes(bytes(bad), "a.index.npy")
        assert loaded.dtype == shard_index.INDEX_DTYPE


@pytest.mark.parametrize(
  "shape", ["(1000000000000000000,)", "(10000000000,)", "(-1,)", "(2, 2)", "()"]
)
def test_a_header_that_claims_another_size_allocates_no_memory(shape: str):
  content = shard_index.to_bytes(rows(3)).replace(b"(3,)", shape.encode())
  tracemalloc.start()
  with pytest.raises(errors.DataError, match=r"a\.index\.npy is not a shard index"):
    shard_index.from_bytes(content, "a.index.npy")
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


@pytest.fixture
def folder(tmp_path) -> str:
  noise_sets.write(tmp_path, identities=4, images=5, size=24, shards=3)
  return str(tmp_path)


def shards_of(folder: str) -> tuple[manifest.Shard, ...]:
  return manifest.load(folder).splits["train"].shards


def index_paths(folder: str) -> list[pathlib.Path]:
  return sorted(pathlib.Path(folder).glob("train-*.index.npy"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_index_returns_the_rows_of_the_files(
  folder, kind: Callable[..., shard_index.Index]
):
  stored = np.concatenate([np.load(path) for path in index_paths(folder)])
  opened = kind(folder, shards_of(folder))
  for ids in (np.arange(20), np.array([19, 0, 7, 7, 13, 6, 5]), np.zeros(0, int)):
    rows = opened.rows_of(ids)
    assert rows.dtype == shard_index.INDEX_DTYPE
    np.testing.assert_array_equal(rows, stored[ids])


def test_the_labels_of_all_records_equal_those_of_the_files(folder):
  stored = np.concatenate([np.load(path)["label"] for path in index_paths(folder)])
  labels = shard_index.labels(folder, shards_of(folder), num_identities=4)
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(labels, stored)


def test_a_label_that_no_identity_has_is_refused(folder):
  with pytest.raises(errors.DataError, match=r"no identity's label .* 3 identities"):
    shard_index.labels(folder, shards_of(folder), num_identities=3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_index_that_is_not_the_manifests_is_refused(folder, kind):
  path = index_paths(folder)[1]
  files.flip_byte(path, -1)
  with pytest.raises(
    errors.DataError, match=r"train-00001-of-00003.index.npy is corrupt"
  ):
    kind(folder, shards_of(folder)).rows_of(np.array([6]))


def test_a_row_index_holds_a_bounded_number_of_files_open(folder):
  before = len(os.listdir("/proc/self/fd"))
  opened = shard_index.RowIndex(folder, shards_of(folder), max_open=2)
  for record in range(20):
    opened.rows_of(np.array([record]))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
  del opened
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_cached_index_reads_again_only_what_did_not_fit(folder):
  shard_bytes = 7 * shard_index.INDEX_DTYPE.itemsize
  opened = shard_index.CachedIndex(folder, shards_of(folder), max_bytes=2 * shard_bytes)
  opened.rows_of(np.array([0, 6]))  # shards 0 and 1 fit
  for path in index_paths(folder)[:2]:
    path.rename(path.with_suffix(".away"))
  opened.rows_of(np.array([12]))
  opened.rows_of(np.array([5]))
  opened.rows_of(np.array([13]))  # shard 2 takes the place of shard 1
  opened.rows_of(np.array([0]))
  with pytest.raises(errors.DataError, match=r"train-00001-of-00003.index.npy does"):
    opened.rows_of(np.array([6]))


def test_records_are_numbered_through_the_shards(folder):
  numbering = shard_index.Numbering(shards_of(folder))
  assert numbering.num_records == 20
  expected = [shard for shard, count in enumerate(COUNTS) for _ in range(count)]
  assert numbering.shards_of(np.arange(20)).tolist() == expected
