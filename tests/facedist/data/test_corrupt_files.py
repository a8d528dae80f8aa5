"""A corrupt file has the same message wherever and however shards are read."""

import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader, streaming_reader
from facedist.data.shards import manifest
from tests import files, noise_sets

SHARD, INDEX = "train-00001-of-00003.tfrecord", "train-00001-of-00003.index.npy"
FIRST_INDEX = "train-00000-of-00003.index.npy"


def write(folder: pathlib.Path, *, images_per_identity: int) -> manifest.Manifest:
  return noise_sets.write(
    folder, identities=4, images=images_per_identity, val_images=1, shards=3
  )


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Two builds, `a` of 20 images and `b` of 24, in 3 shards each."""
  folder = tmp_path_factory.mktemp("sets")
  write(folder / "a", images_per_identity=5)
  write(folder / "b", images_per_identity=6)
  return folder


def size(sets: pathlib.Path, name: str) -> int:
  return (sets / name).stat().st_size


def resize(path: pathlib.Path, change: int) -> None:
  os.truncate(path, path.stat().st_size + change)


def expected(kind: str, folder: str, sets: pathlib.Path) -> str:
  """Returns the whole line; `folder` is where the user has the set."""
  num_bytes = size(sets, f"a/{SHARD}")
  again = f"the manifest says {num_bytes}; copy it again or rebuild it."
  rebuild = "run python -m tfrecords_tools.rebuild_index --overwrite on the folder"
  first = size(sets, "a/train-00000-of-00003.tfrecord")
  other_first = size(sets, "b/train-00000-of-00003.tfrecord")
  return {
    "foreign index": f"{folder}/{INDEX} does not match its shard: its 6 records end at "
    f"byte {first}, the shard at {num_bytes}; {rebuild}.",
    "flipped index": f"{folder}/{INDEX} is corrupt: CRC mismatch; {rebuild}, or copy "
    "it again.",
    "missing index": f"{folder}/{INDEX} does not exist, but the manifest names it; "
    "copy it again, or run python -m tfrecords_tools.rebuild_index on the folder.",
    "foreign manifest": f"{folder}/manifest.json is from another build than "
    f"{FIRST_INDEX}: it says 8 records in {other_first} bytes, the index and its shard "
    f"6 in {first}; copy the folder again or rebuild it.",
    "truncated": f"{folder}/{SHARD} is cut off: it has {num_bytes - 1} bytes, {again}",
    "too long": f"{folder}/{SHARD} is too long: it has {num_bytes + 1} bytes, {again}",
    "empty": f"{folder}/{SHARD} is empty, {again}",
    "missing": f"{folder}/{SHARD} does not exist, but the manifest names it; copy it "
    "again or rebuild it.",
  }[kind]


CORRUPTIONS: dict[str, Callable[[pathlib.Path, pathlib.Path], object]] = {
  "foreign index": lambda folder, _: shutil.copy(folder / FIRST_INDEX, folder / INDEX),
  "flipped index": lambda folder, _: files.flip_byte(folder / INDEX, -1),
  "missing index": lambda folder, _: (folder / INDEX).unlink(),
  "foreign manifest": lambda folder, sets: shutil.copy(
    sets / "b" / "manifest.json", folder
  ),
  "truncated": lambda folder, _: resize(folder / SHARD, -1),
  "too long": lambda folder, _: resize(folder / SHARD, 1),
  "empty": lambda folder, _: os.truncate(folder / SHARD, 0),
  "missing": lambda folder, _: (folder / SHARD).unlink(),
}


def read_local(folder: str, cache: str) -> None:
  local_reader.open_reader(folder, "train")  # which already refuses each of them


def read_staged(folder: str, cache: str) -> None:
  with staged_dataset.open_set(folder, cache) as opened:
    staged = local_reader.open_reader(
      opened.folder, "train", files=opened.files("train")
    )
    staged.read(np.arange(20))


def read_streamed(folder: str, cache: str) -> None:
  streaming_reader.open_reader(folder, "train").read(np.arange(20))


def embed(folder: str, cache: str) -> None:
  with staged_dataset.open_set(folder, cache, accept_corrupt=True, keep=False) as data:
    for load in image_source.loaders(data, "train", image_size=16):
      assert isinstance(load(), image_source.Face)


READERS = {
  "local": read_local,
  "stage": read_staged,
  "stream": read_streamed,
  "embed local": embed,
  "embed stage": embed,
}


@pytest.mark.parametrize("mode", READERS)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_kind_of_corruption_has_its_message_in_every_mode(
  sets, tmp_path, bucket, kind, mode
):
  corrupt = tmp_path / "set"
  shutil.copytree(sets / "a", corrupt)
  CORRUPTIONS[kind](corrupt, sets)
  folder = str(corrupt)
  if "local" not in mode:
    folder = f"{bucket}/set"
    for entry in storage.walk(str(corrupt)):
      storage.upload(str(corrupt / entry.path), f"{folder}/{entry.path}")
  with pytest.raises(errors.DataError) as caught:
    READERS[mode](folder, str(tmp_path / "cache"))
  assert str(caught.value) == expected(kind, folder, sets)
