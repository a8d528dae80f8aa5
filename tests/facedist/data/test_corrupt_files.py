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
from tests import files, noise_sets

SHARD, INDEX = "train-00001-of-00003.tfrecord", "train-00001-of-00003.index.npy"
FIRST_SHARD = "train-00000-of-00003.tfrecord"
FIRST_INDEX = "train-00000-of-00003.index.npy"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Two builds, `a` of 20 images and `b` of 24, in 3 shards each."""
  folder = tmp_path_factory.mktemp("sets")
  for name, images in (("a", 5), ("b", 6)):
    noise_sets.write(folder / name, identities=4, images=images, val_images=1, shards=3)
  return folder


def resize(path: pathlib.Path, change: int) -> None:
  os.truncate(path, path.stat().st_size + change)


AGAIN = "the manifest says {size}; copy it again or rebuild it."
REBUILD = "run python -m tfrecords_tools.rebuild_index --overwrite on the folder"

# What is done to the folder of `a`, and the line about it that names the file first.
CORRUPTIONS: dict[str, tuple[Callable[[pathlib.Path, pathlib.Path], object], str]] = {
  "foreign index": (
    lambda folder, _: shutil.copy(folder / FIRST_INDEX, folder / INDEX),
    f"{INDEX} does not match its shard: its 6 records end at byte {{first}}, the shard "
    f"at {{size}}; {REBUILD}.",
  ),
  "flipped index": (
    lambda folder, _: files.flip_byte(folder / INDEX, -1),
    f"{INDEX} is corrupt: CRC mismatch; {REBUILD}, or copy it again.",
  ),
  "missing index": (
    lambda folder, _: (folder / INDEX).unlink(),
    f"{INDEX} does not exist, but the manifest names it; copy it again, or run python "
    "-m tfrecords_tools.rebuild_index on the folder.",
  ),
  "foreign manifest": (
    lambda folder, sets: shutil.copy(sets / "b" / "manifest.json", folder),
    f"manifest.json is from another build than {FIRST_INDEX}: it says 8 records in "
    "{other_first} bytes, the index and its shard 6 in {first}; copy the folder again "
    "or rebuild it.",
  ),
  "truncated": (
    lambda folder, _: resize(folder / SHARD, -1),
    f"{SHARD} is cut off: it has {{less}} bytes, {AGAIN}",
  ),
  "too long": (
    lambda folder, _: resize(folder / SHARD, 1),
    f"{SHARD} is too long: it has {{more}} bytes, {AGAIN}",
  ),
  "empty": (
    lambda folder, _: os.truncate(folder / SHARD, 0),
    f"{SHARD} is empty, {AGAIN}",
  ),
  "missing": (
    lambda folder, _: (folder / SHARD).unlink(),
    f"{SHARD} does not exist, but the manifest names it; copy it again or rebuild it.",
  ),
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
  corrupt, line = CORRUPTIONS[kind]
  folder = str(tmp_path / "set")
  shutil.copytree(sets / "a", folder)
  corrupt(tmp_path / "set", sets)
  if "local" not in mode:
    folder = f"{bucket}/set"
    for entry in storage.walk(str(tmp_path / "set")):
      storage.upload(str(tmp_path / "set" / entry.path), f"{folder}/{entry.path}")
  with pytest.raises(errors.DataError) as caught:
    READERS[mode](folder, str(tmp_path / "cache"))
  size, first, other_first = (
    (sets / name).stat().st_size
    for name in (f"a/{SHARD}", f"a/{FIRST_SHARD}", f"b/{FIRST_SHARD}")
  )
  expected = line.format(
    size=size, less=size - 1, more=size + 1, first=first, other_first=other_first
  )
  assert str(caught.value) == f"{folder}/{expected}"
