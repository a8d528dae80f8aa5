"""Shards of random patterns: complete, reproducible, and learnable."""

import pathlib

import numpy as np
import pytest

from facedist.data import noise, verification_set
from facedist.data.readers import local_reader
from facedist.data.shards import manifest
from tests import noise_sets
from tfrecords_tools import verify


def write(folder: pathlib.Path, *, seed: int = 1, val: int = 2) -> manifest.Manifest:
  return noise_sets.write(
    folder, identities=8, images=5, val_images=val, size=24, shards=3, seed=seed
  )


def read(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns all images, float64[records, pixels], and labels of a split."""
  opened = local_reader.open_reader(str(folder), split)
  images, labels = opened.read_batch(np.arange(opened.num_records))
  return images.reshape(len(images), -1).astype(float), labels


def test_what_is_written_is_a_valid_set(tmp_path):
  written = write(tmp_path)
  assert manifest.load(str(tmp_path)) == written
  assert [shard.records for shard in written.shards] == [13, 13, 14, 16]
  assert not list(verify.verify(str(tmp_path), verify.Totals(), num_processes=1))
  names = local_reader.open_reader(str(tmp_path), "train").filenames()
  labels = read(tmp_path, "train")[1]
  assert names[:2] == ["noise000000/0000.jpg", "noise000001/0000.jpg"]
  assert [int(name[5:11]) for name in names] == labels.tolist()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  first, second = write(tmp_path / "a"), write(tmp_path / "b")
  assert first.fingerprint == second.fingerprint
  assert first.fingerprint != write(tmp_path / "c", seed=2).fingerprint


def test_no_val_images_mean_no_val_split(tmp_path):
  assert set(write(tmp_path, val=0).splits) == {"train"}


def test_no_image_occurs_twice_and_a_nearest_neighbour_finds_the_identity(tmp_path):
  write(tmp_path)
  (train, train_labels), (val, val_labels) = (
    read(tmp_path, split) for split in ("train", "val")
  )
  assert len(np.unique(np.concatenate([train, val]), axis=0)) == 8 * 7
  distances = ((val[:, None] - train[None]) ** 2).sum(axis=2)
  assert (train_labels[distances.argmin(axis=1)] == val_labels).mean() > 0.9


@pytest.mark.parametrize(("num_pairs", "folds"), [(20, 10), (13, 3)])
def test_pairs_are_balanced_and_spread_over_the_folds(tmp_path, num_pairs, folds):
  noise.write_noise_verification_set(
    str(tmp_path), num_pairs=num_pairs, folds=folds, image_size=24, seed=0
  )
  pairs = verification_set.load_verification_set(str(tmp_path))
  assert abs(pairs.same.mean() - 0.5) < 0.1
  sizes = np.bincount(pairs.folds, minlength=folds)
  assert sizes.max() - sizes.min() <= 1
  _, labels = read(tmp_path, "images")
  assert (labels[pairs.first] == labels[pairs.second]).tolist() == pairs.same.tolist()


def test_verification_shows_other_patterns_than_training(tmp_path):
  write(tmp_path / "train")
  noise.write_noise_verification_set(
    str(tmp_path / "pairs"), num_pairs=4, folds=2, image_size=24, seed=1
  )
  seen = read(tmp_path / "train", "train")[0].tolist()
  assert not any(
    image in seen for image in read(tmp_path / "pairs", "images")[0].tolist()
  )
