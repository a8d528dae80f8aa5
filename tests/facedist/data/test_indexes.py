"""Rows by record number: the same from every kind of index, in bounded memory."""

import os
import pathlib
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_missing_index_is_named(folder, kind):
  index_paths(folder)[2].unlink()
  with pytest.raises(errors.DataError, match=r"train-00002-of-00003.index.npy does"):
    kind(folder, shards_of(folder)).rows_of(np.array([19]))


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
  opened.rows_of(np.array([5, 12]))
  opened.rows_of(np.array([13]))  # shard 2 takes the place of shard 0
  opened.rows_of(np.array([6]))
  with pytest.raises(errors.DataError, match=r"train-00000-of-00003.index.npy does"):
    opened.rows_of(np.array([0]))


def test_records_are_numbered_through_the_shards(folder):
  numbering = shard_index.Numbering(shards_of(folder))
  assert numbering.num_records == 20
  expected = [shard for shard, count in enumerate(COUNTS) for _ in range(count)]
  assert numbering.shards_of(np.arange(20)).tolist() == expected
