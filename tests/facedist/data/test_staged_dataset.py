"""Staging from a bucket: everything once, checked, never mixed with other content."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import noise
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import manifest
from tests import noise_sets


def write(folder: str, *, seed: int = 0) -> manifest.Manifest:
  return noise_sets.write(
    folder, identities=2, images=3, val_images=1, shards=2, seed=seed
  )


def test_a_local_folder_is_not_copied(tmp_path):
  write(str(tmp_path / "shards"))
  assert staged_dataset.stage(str(tmp_path / "shards"), str(tmp_path)).folder == str(
    tmp_path / "shards"
  )
  assert os.listdir(tmp_path) == ["shards"]


def test_a_selection_is_staged_with_shards_of_one_name_from_two_folders(
  bucket, tmp_path
):
  made = [write(f"{bucket}/{name}", seed=seed) for seed, name in enumerate("ab")]
  shards = [
    dataclasses.replace(one.splits["train"].shards[0], folder=f"{bucket}/{name}")
    for one, name in zip(made, "ab", strict=True)
  ]
  for number, shard in enumerate(shards):
    index = f"{number}.index.npy"
    storage.write_bytes(
      str(tmp_path / "selection" / index),
      storage.read_bytes(f"{shard.folder}/{shard.index_name}"),
    )
    shards[number] = dataclasses.replace(shard, index_name=index)
  selection = dataclasses.replace(
    made[0], splits={"train": manifest.Split(6, tuple(shards))}, selection={}
  )
  manifest.save(selection, str(tmp_path / "selection"))
  local = staged_dataset.stage(
    str(tmp_path / "selection"), str(tmp_path / "cache")
  ).folder
  staged = local_reader.open_reader(local, "train")
  assert staged.manifest.fingerprint == selection.fingerprint
  expected = []
  for name in "ab":
    write(str(tmp_path / name), seed="ab".index(name))
    expected += local_reader.open_reader(str(tmp_path / name), "train").read(
      np.arange(3)
    )[0]
  assert staged.read(np.arange(6))[0] == expected


def test_a_staged_folder_reads_as_the_original(bucket, tmp_path):
  write(f"{bucket}/faces")
  write(str(tmp_path / "original"))
  local = staged_dataset.stage(f"{bucket}/faces", str(tmp_path / "cache")).folder
  for split, count in (("train", 6), ("val", 2)):
    staged = local_reader.open_reader(local, split).read_batch(np.arange(count))
    original = local_reader.open_reader(str(tmp_path / "original"), split)
    for ours, theirs in zip(staged, original.read_batch(np.arange(count)), strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_a_verification_set_is_staged_with_its_pairs(bucket, tmp_path):
  noise.write_noise_verification_set(
    f"{bucket}/pairs", num_pairs=4, folds=2, image_size=16, seed=0
  )
  local = staged_dataset.stage(f"{bucket}/pairs", str(tmp_path)).folder
  assert os.path.exists(os.path.join(local, "pairs.npy"))


def test_a_second_start_downloads_only_what_is_missing(bucket, tmp_path):
  write(f"{bucket}/faces")
  local = staged_dataset.stage(f"{bucket}/faces", str(tmp_path)).folder
  (pathlib.Path(local) / "train-00001-of-00002.tfrecord").unlink()
  bucket.traffic.clear()
  assert staged_dataset.stage(f"{bucket}/faces", str(tmp_path)).folder == local
  fetched = {one.path for one in bucket.traffic.exchanges if one.body_bytes}
  assert {path for path in fetched if "manifest" not in path} == {
    f"{bucket}/faces/train-00001-of-00002.tfrecord"
  }


def test_other_content_of_the_same_name_gets_its_own_folder(bucket, tmp_path):
  write(f"{bucket}/faces", seed=0)
  first = staged_dataset.stage(f"{bucket}/faces", str(tmp_path)).folder
  write(f"{bucket}/faces", seed=1)
  assert staged_dataset.stage(f"{bucket}/faces", str(tmp_path)).folder != first


def test_a_file_that_is_not_the_manifests_is_refused_and_not_kept(bucket, tmp_path):
  write(f"{bucket}/faces")
  storage.write_bytes(f"{bucket}/faces/train-00000-of-00002.tfrecord", b"other bytes")
  with pytest.raises(
    errors.DataError, match=r"train-00000-of-00002.tfrecord is cut off"
  ):
    staged_dataset.stage(f"{bucket}/faces", str(tmp_path))
  assert not list(tmp_path.rglob("train-00000-of-00002.tfrecord"))
