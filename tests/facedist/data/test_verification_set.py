"""Verification sets: round trip, and corruption is named."""

import dataclasses
import io
import pathlib

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import noise, verification_set
from facedist.data.shards import manifest
from tests import files, noise_sets


@pytest.fixture
def folder(tmp_path) -> str:
  noise.write_noise_verification_set(
    str(tmp_path), num_pairs=12, folds=3, image_size=16, seed=0
  )
  return str(tmp_path)


@pytest.fixture
def pairs(folder) -> np.ndarray:
  return np.load(pathlib.Path(folder, "pairs.npy"))


def rewrite_pairs(folder: str, pairs: np.ndarray) -> None:
  """Puts other pairs in place, with a manifest that vouches for them."""
  stream = io.BytesIO()
  np.save(stream, pairs)
  storage.write_bytes(storage.join(folder, "pairs.npy"), stream.getvalue())
  described = manifest.load(folder)
  checksum = storage.crc32c_of(stream.getvalue())
  pairs_entry = dataclasses.replace(described.pairs, crc32c=checksum)
  manifest.save(dataclasses.replace(described, pairs=pairs_entry), folder)


def test_pairs_are_loaded_as_columns(folder, pairs):
  loaded = verification_set.load_verification_set(folder)
  assert loaded.name == "noise"
  assert loaded.same.dtype == bool
  columns = (loaded.first, loaded.second, loaded.same, loaded.folds)
  for column, expected in zip(columns, pairs.T, strict=True):
    np.testing.assert_array_equal(column, expected)
  is_same = loaded.labels[loaded.first] == loaded.labels[loaded.second]
  np.testing.assert_array_equal(loaded.same, is_same)


def test_the_reader_reads_the_names_of_the_images(folder):
  loaded = verification_set.load_verification_set(folder)
  assert loaded.read_names()[:4] == [
    "noise000000/0000.jpg",
    "noise000000/0001.jpg",
    "noise000001/0000.jpg",
    "noise000002/0001.jpg",
  ]


def test_a_training_set_is_no_verification_set(tmp_path):
  noise_sets.write(tmp_path, identities=2, images=2)
  with pytest.raises(errors.DataError, match=r"classification set.*--dataset=lfw"):
    verification_set.load_verification_set(str(tmp_path))


@pytest.mark.parametrize(
  ("pair", "message"),
  [
    ((24, 0, 1, 0), r"pair 5 .* names a record outside \[0, 24\)"),
    ((-1, 0, 1, 0), r"pair 5 .* names a record outside \[0, 24\)"),
    ((0, 1, 2, 0), r"pair 5 .* neither 'same' \(1\) nor 'different' \(0\)"),
    ((0, 1, 1, 3), r"pair 5 .* fold outside \[0, 3\)"),
  ],
)
def test_a_pair_that_breaks_a_rule_is_named(folder, pairs, pair, message):
  pairs[5] = pair
  rewrite_pairs(folder, pairs)
  with pytest.raises(errors.DataError, match=message):
    verification_set.load_verification_set(folder)


def test_an_empty_fold_is_refused(folder, pairs):
  pairs[pairs[:, 3] == 1, 3] = 0
  rewrite_pairs(folder, pairs)
  with pytest.raises(errors.DataError, match="2 folds, the manifest says 3"):
    verification_set.load_verification_set(folder)


@pytest.mark.parametrize(
  "pairs",
  [np.zeros((12, 4), np.int64), np.zeros((11, 4), np.int32), np.zeros(48, np.int32)],
)
def test_pairs_of_another_shape_or_type_are_refused(folder, pairs):
  rewrite_pairs(folder, pairs)
  with pytest.raises(errors.DataError, match=r"the manifest says int32\[12, 4\]"):
    verification_set.load_verification_set(folder)


def test_corrupt_pairs_are_refused(folder):
  files.flip_byte(pathlib.Path(folder, "pairs.npy"), -1)
  with pytest.raises(errors.DataError, match=r"pairs.npy is not the manifest's"):
    verification_set.load_verification_set(folder)
