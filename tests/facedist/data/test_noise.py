"""Shards of random patterns: complete, reproducible, and learnable."""

import pathlib

import cv2
import numpy as np
import pytest
import tensorflow as tf

from facedist import storage
from facedist.data import noise
from facedist.data.shards import manifest, shard_index, tfrecord


def write(folder: pathlib.Path, **changes) -> manifest.Manifest:
  arguments = {
    "num_identities": 3,
    "images_per_identity": 5,
    "val_images_per_identity": 2,
    "image_size": 24,
    "num_shards": 4,
    "seed": 1,
  }
  return noise.write_noise_shards(str(folder), **(arguments | changes))


def stored(folder: pathlib.Path, split: str) -> list[tfrecord.Record]:
  """Reads a split as anyone would: with TensorFlow, without the index."""
  names = sorted(str(path) for path in folder.glob(f"{split}-*.tfrecord"))
  dataset = tf.data.TFRecordDataset(names)
  return [tfrecord.parse(payload) for payload in dataset.as_numpy_iterator()]


def test_the_manifest_and_the_files_agree(tmp_path):
  written = write(tmp_path)
  assert manifest.load(str(tmp_path)) == written
  assert written.num_identities == 3
  for split, count in (("train", 15), ("val", 6)):
    assert written.splits[split].records == count
    assert len(stored(tmp_path, split)) == count
    for shard in written.splits[split].shards:
      assert (tmp_path / shard.name).stat().st_size == shard.bytes
      assert storage.crc32c(str(tmp_path / shard.name)) == shard.crc32c
      assert storage.crc32c(str(tmp_path / shard.index_name)) == shard.index_crc32c


def test_shards_hold_nearly_equal_counts(tmp_path):
  shards = write(tmp_path).splits["train"].shards
  assert [shard.records for shard in shards] == [3, 4, 4, 4]


def test_the_index_points_at_each_jpeg(tmp_path):
  for shard in write(tmp_path).splits["train"].shards:
    content = (tmp_path / shard.name).read_bytes()
    for row in shard_index.load(str(tmp_path / shard.index_name)):
      framed = content[row["offset"] :][: row["length"]]
      record = tfrecord.parse(tfrecord.unframe(framed))
      assert framed[row["image_offset"] :][: row["image_length"]] == record.jpeg
      assert row["label"] == record.label


def test_images_have_the_requested_size_and_their_identity(tmp_path):
  write(tmp_path)
  for record in stored(tmp_path, "train"):
    image = cv2.imdecode(np.frombuffer(record.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (24, 24, 3)
    assert record.identity == f"noise{record.label:06d}"
    assert record.filename.startswith(record.identity + "/")


def test_no_image_occurs_twice(tmp_path):
  write(tmp_path)
  images = [
    record.jpeg for split in ("train", "val") for record in stored(tmp_path, split)
  ]
  assert len(set(images)) == 21


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  first, second = write(tmp_path / "a"), write(tmp_path / "b")
  assert first.fingerprint == second.fingerprint
  assert first.fingerprint != write(tmp_path / "c", seed=2).fingerprint


def test_no_val_images_mean_no_val_split(tmp_path):
  assert set(write(tmp_path, val_images_per_identity=0).splits) == {"train"}


def test_a_nearest_neighbour_finds_the_identity(tmp_path):
  write(tmp_path, num_identities=8)
  splits = {}
  for split in ("train", "val"):
    content = stored(tmp_path, split)
    pixels = [
      cv2.imdecode(np.frombuffer(record.jpeg, np.uint8), cv2.IMREAD_COLOR).ravel()
      for record in content
    ]
    labels = np.array([record.label for record in content])
    splits[split] = np.array(pixels, np.float64), labels
  (train, train_labels), (val, val_labels) = splits["train"], splits["val"]
  distances = ((val[:, None] - train[None]) ** 2).sum(axis=2)
  assert (train_labels[distances.argmin(axis=1)] == val_labels).mean() > 0.9


@pytest.mark.parametrize(("num_pairs", "folds"), [(20, 10), (13, 3)])
def test_pairs_are_balanced_and_spread_over_the_folds(tmp_path, num_pairs, folds):
  written = noise.write_noise_verification_set(
    str(tmp_path), num_pairs=num_pairs, folds=folds, image_size=24, seed=0
  )
  pairs = np.load(tmp_path / written.pairs.name)
  assert written.pairs.folds == folds
  assert abs(pairs[:, 2].mean() - 0.5) < 0.1
  sizes = np.bincount(pairs[:, 3], minlength=folds)
  assert sizes.max() - sizes.min() <= 1
  content = stored(tmp_path, "images")
  for first, second, same, _ in pairs:
    assert (content[first].identity == content[second].identity) == bool(same)


def test_verification_shows_other_patterns_than_training(tmp_path):
  write(tmp_path / "train")
  noise.write_noise_verification_set(
    str(tmp_path / "pairs"), num_pairs=4, folds=2, image_size=24, seed=1
  )
  seen = {record.jpeg for record in stored(tmp_path / "train", "train")}
  assert not seen & {record.jpeg for record in stored(tmp_path / "pairs", "images")}
