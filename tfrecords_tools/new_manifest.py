"""A manifest from shards alone: what they tell, and what is not known any more."""

import collections
import io
import re
from collections.abc import Iterator

import numpy as np

from facedist import __version__, errors, storage
from facedist.data import manifest, shard_index
from tfrecords_tools import shard_walk

UNKNOWN = "unknown"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.tfrecord")
_SPLITS = ("train", "val", "images")  # in the builder's order


class NewManifest:
  """Collects what the shards of a folder hold.

  Args:
    folder: Where the shards and their indexes are.
    dataset: The data set's name.
  """

  def __init__(self, folder: str, *, dataset: str) -> None:
    self._folder, self._dataset = folder, dataset
    self._shards: dict[str, dict[int, manifest.Shard]] = collections.defaultdict(dict)
    self._counts: dict[str, set[int]] = collections.defaultdict(set)
    self._identities: dict[int, str] = {}
    self._image_sizes: set[tuple[int, int]] = set()
    self._problems: list[str] = []

  def add(self, walked: shard_walk.Walked) -> None:
    """Takes a shard in."""
    named = _NAME.fullmatch(walked.name)
    if named is None:
      self._problems.append(
        f"{walked.name} is not called as a shard is: SPLIT-00000-of-00008.tfrecord"
      )
      return
    index = shard_index.to_bytes(walked.rows)
    split, number, count = named[1], int(named[2]), int(named[3])
    self._counts[split].add(count)
    self._shards[split][number] = manifest.Shard(
      name=walked.name,
      records=len(walked.rows),
      bytes=walked.size,
      crc32c=walked.crc32c,
      index_name=shard_index.index_name(walked.name),
      index_crc32c=storage.crc32c_of(index),
    )
    self._image_sizes |= walked.image_sizes
    for label, identity in walked.identities.items():
      known = self._identities.setdefault(label, identity)
      if known != identity:
        self._problems.append(
          f"{walked.name} calls label {label} {identity}, others call it {known}"
        )

  def problems(self) -> Iterator[str]:
    """Yields why there can be no manifest."""
    yield from self._problems
    for split, counts in self._counts.items():
      if len(counts) > 1:
        yield f"the shards of {split} are of {sorted(counts)} in all; remove the others"
        continue
      for number in sorted(set(range(*counts)) - self._shards[split].keys()):
        yield f"{shard_index.shard_name(split, number, *counts)} is missing"
    if len(self._image_sizes) != 1 or len({*next(iter(self._image_sizes))}) != 1:
      sizes = ", ".join(f"{width}x{height}" for height, width in self._image_sizes)
      yield f"the images are not squares of one size, but {sizes or 'none'}"

  def manifest(self) -> manifest.Manifest:
    """Returns the manifest; there must be no problems."""
    splits = {}
    for split in sorted(self._shards, key=_place):
      shards = tuple(shard for _, shard in sorted(self._shards[split].items()))
      splits[split] = manifest.Split(sum(shard.records for shard in shards), shards)
    ((height, _),) = self._image_sizes
    pairs = _pairs(self._folder)
    return manifest.Manifest(
      kind="classification" if pairs is None else "verification",
      dataset=self._dataset,
      tool_version=__version__,
      image_size=height,
      quality=0,
      alignment={"method": UNKNOWN},
      source={"rebuilt_from": "shards"},
      identities=tuple(
        self._identities.get(label) or f"label{label:07d}"
        for label in range(max(self._identities) + 1)
      ),
      identity_names={},
      splits=splits,
      pairs=pairs,
    )


def _place(split: str) -> tuple[int, str]:
  """Returns the key by which splits are sorted."""
  known = _SPLITS.index(split) if split in _SPLITS else len(_SPLITS)
  return known, split


def _pairs(folder: str) -> manifest.Pairs | None:
  """Describes the pairs of a verification set, if there are any."""
  path = storage.join(folder, manifest.PAIRS_NAME)
  if not storage.exists(path):
    return None
  content = storage.read_bytes(path)
  try:
    pairs = np.load(io.BytesIO(content), allow_pickle=False)
    folds = int(pairs[:, 3].max()) + 1
  except (ValueError, EOFError, IndexError) as error:
    raise errors.DataError(f"{path} holds no pairs ({error}); build again.") from error
  return manifest.Pairs(
    manifest.PAIRS_NAME, len(pairs), folds, storage.crc32c_of(content)
  )
