"""Images by name from shards, local and staged: valid, corrupt and replaced."""

import pathlib

import pytest

from facedist import errors, storage
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from tests import files, noise_sets


def load(
  folder: object, split: str = "train"
) -> list[image_source.Face | image_source.Unreadable]:
  with staged_dataset.open_set(str(folder), "unused") as data:
    return [loader() for loader in image_source.loaders(data, split, image_size=16)]


def first(folder: pathlib.Path) -> None:
  """Takes the first loader of a local set; reads nothing."""
  with staged_dataset.open_set(str(folder), "unused") as data:
    next(image_source.loaders(data, "train", image_size=16))


def write_shards(folder: object) -> None:
  noise_sets.write(folder, identities=3, images=2, shards=2)


def test_records_come_in_order_with_path_and_identity(tmp_path):
  write_shards(tmp_path)
  faces = load(tmp_path)
  assert [(face.path, face.identity) for face in faces] == [
    (f"noise{identity:06d}/{image:04d}.jpg", f"noise{identity:06d}")
    for image in range(2)
    for identity in range(3)
  ]
  assert faces[0].image.shape == (16, 16, 3)


def test_a_corrupt_record_is_named_and_the_rest_are_read(tmp_path):
  write_shards(tmp_path)
  shard = tmp_path / "train-00001-of-00002.tfrecord"
  files.flip_byte(shard, 40)
  loaded = load(tmp_path)
  assert [isinstance(each, image_source.Face) for each in loaded] == [True] * 3 + [
    False,
    True,
    True,
  ]
  assert loaded[3].path == "train-00001-of-00002.tfrecord, record 0 at byte 0"
  assert "CRC" in loaded[3].reason


def test_an_unknown_split_is_an_error(tmp_path):
  write_shards(tmp_path)
  with pytest.raises(errors.DataError, match="no split 'val', only train"):
    load(tmp_path, "val")


@pytest.mark.parametrize("ending", ["tfrecord", "index.npy"])
def test_a_missing_shard_is_an_error_before_anything_is_read(tmp_path, ending):
  write_shards(tmp_path)
  (tmp_path / f"train-00001-of-00002.{ending}").unlink()
  with pytest.raises(errors.DataError, match=f"train-00001-of-00002.{ending} does not"):
    first(tmp_path)


def test_a_shard_replaced_while_it_is_read_is_told_from_corruption(tmp_path):
  write_shards(tmp_path)
  shard = tmp_path / "train-00001-of-00002.tfrecord"
  with staged_dataset.open_set(str(tmp_path), "unused") as data:
    loaders = list(image_source.loaders(data, "train", image_size=16))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(
      errors.DataError, match=f"{shard} was replaced while it was being read"
    ):
      loaders[3]()


def test_corruption_at_the_source_is_named_and_a_corrupt_copy_ends_the_run(
  bucket, tmp_path
):
  write_shards(f"{bucket}/faces")
  source = f"{bucket}/faces/train-00001-of-00002.tfrecord"
  whole = storage.read_bytes(source)
  storage.write_bytes(source, whole[:40] + bytes(9) + whole[49:])

  def readable() -> int:
    with staged_dataset.open_set(
      f"{bucket}/faces", str(tmp_path), accept_corrupt=True, keep=False
    ) as data:
      loaded = [each() for each in image_source.loaders(data, "train", image_size=16)]
    return sum(isinstance(each, image_source.Face) for each in loaded)

  assert readable() == 5
  storage.write_bytes(source, whole)
  with pytest.raises(errors.CorruptCopyError, match="a restart fetches it again"):
    readable()
  assert readable() == 6
