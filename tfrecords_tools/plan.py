"""The plan of a build: which image goes where, before any image is opened.

Order and hold-out come from a keyed hash of each path, so they depend on the seed and
the path alone, not on a random generator's version or on the other images.
"""

import dataclasses
import hashlib

import numpy as np

from facedist import errors, storage
from facedist.data import shard_index
from tfrecords_tools import source

IMAGES_A_SHARD = 10_000
MIN_TRAIN_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class PlannedShard:
  """One shard to write: its split, its place in it, its file's name, its images.

  `rows` are int64[images], rows of the source.
  """

  split: str
  number: int
  name: str
  rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
  """All of a build's shards, in the manifest's order.

  Attributes:
    identities: Folder names, sorted; the place is the label.
    labels: int32[images] by the source's rows.
    shards: Every image of the source is in exactly one.
  """

  identities: tuple[str, ...]
  labels: np.ndarray
  shards: tuple[PlannedShard, ...]

  @property
  def num_images(self) -> int:
    """Number of images of the source."""
    return len(self.labels)


def plan_training_set(
  images: source.Source, *, seed: int, num_shards: int | None, val_fraction: float
) -> Plan:
  """Shuffles the images over train shards, and those held out over val shards.

  Args:
    images: The source.
    seed: Decides order and hold-out.
    num_shards: Train shards; None is one for each IMAGES_A_SHARD, at least
      MIN_TRAIN_SHARDS. Val shards are in proportion.
    val_fraction: Share of each identity's images to hold out, rounded; one image of
      each always stays in train.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  identities, labels = _label(images)
  held_out = _hold_out(images.paths, labels, seed=seed, fraction=val_fraction)
  order = np.argsort(_hashes(images.paths, f"order {seed}"), kind="stable")
  train, val = order[~held_out[order]], order[held_out[order]]
  if num_shards is None:
    wanted = max(MIN_TRAIN_SHARDS, -(-len(train) // IMAGES_A_SHARD))
    num_shards = min(wanted, len(train))
  shards = _split_evenly("train", train, num_shards=num_shards)
  if len(val):
    val_shards = max(1, round(num_shards * len(val) / len(train)))
    shards += _split_evenly("val", val, num_shards=min(val_shards, len(val)))
  return Plan(identities, labels, shards)


def plan_verification_set(images: source.Source, *, num_shards: int | None) -> Plan:
  """Puts the images into shards in the order of their paths, so that a row is a record.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  identities, labels = _label(images)
  order = np.arange(len(images.paths))
  num_shards = num_shards or -(-len(order) // IMAGES_A_SHARD)
  return Plan(identities, labels, _split_evenly("images", order, num_shards=num_shards))


def checksum(images: source.Source) -> str:
  """Returns eight hex digits that change with any path or row of the tables."""
  columns = (images.places.tobytes(), images.geometry.tobytes())
  parts = ("\n".join(images.paths).encode(), *columns)
  return f"{storage.crc32c_of(b''.join(parts)):08x}"


def _label(images: source.Source) -> tuple[tuple[str, ...], np.ndarray]:
  """Returns the sorted identities and int32[images] labels."""
  folders = [source.identity_of(path) for path in images.paths]
  identities = tuple(sorted(set(folders)))
  label_of = {identity: label for label, identity in enumerate(identities)}
  return identities, np.array([label_of[folder] for folder in folders], np.int32)


def _hold_out(
  paths: list[str], labels: np.ndarray, *, seed: int, fraction: float
) -> np.ndarray:
  """Returns bool[images], true for those of each identity with the smallest hashes."""
  held_out = np.zeros(len(paths), bool)
  if not fraction:
    return held_out
  by_identity = np.lexsort((_hashes(paths, f"val {seed}"), labels))
  counts = np.bincount(labels)
  starts = np.cumsum(counts) - counts
  rank = np.arange(len(paths)) - starts[labels[by_identity]]
  wanted = np.minimum(np.floor(counts * fraction + 0.5), counts - 1)
  held_out[by_identity] = rank < wanted[labels[by_identity]]
  return held_out


def _hashes(paths: list[str], key: str) -> np.ndarray:
  """Returns uint64[images] that look random, from the key and each path."""
  keyed = hashlib.blake2b(key=key.encode(), digest_size=8)
  digests = bytearray()
  for path in paths:
    hasher = keyed.copy()
    hasher.update(path.encode())
    digests += hasher.digest()
  return np.frombuffer(bytes(digests), "<u8")


def _split_evenly(
  split: str, order: np.ndarray, *, num_shards: int
) -> tuple[PlannedShard, ...]:
  """Cuts `order` into shards whose counts differ by at most one."""
  if num_shards > len(order):
    raise errors.UsageError(
      f"--num_shards={num_shards} is more than the {len(order)} images of the split "
      f"{split!r}; each shard needs one."
    )
  return tuple(
    PlannedShard(split, number, shard_index.shard_name(split, number, num_shards), rows)
    for number, rows in enumerate(np.array_split(order, num_shards))
  )
