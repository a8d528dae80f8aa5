"""The plan of a build: which image goes into which shard, before any image is opened.

Order and hold-out come from a keyed hash of each path. They depend on the seed and the
path alone, not on the version of a random generator or on the other images, so tasks on
many machines make the same plan without communication.

A reader (`vggface2`, `lfw`, ...) yields `base.IdentityGroup`s, one identity at a time,
in ascending order of identity + '/'. Generators from groups to groups look up faces
(`base.locate`) and drop or merge images; new rules that select images belong there. The
planner numbers the identities, hashes the paths and keeps every image on disk, ranked
by its hash (`RankedImages`). A shard is a range of ranks, read back when it is written.
Memory holds the names of the identities and one identity's images, whatever the number
of images.
"""

import dataclasses
import hashlib
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import google_crc32c
import numpy as np

from facedist import errors, progress
from facedist.data.shards import shard_index
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base

IMAGES_A_SHARD = 10_000
MIN_TRAIN_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Images:
  """Some images in their final order: `base.ROW_DTYPE[images]` and their paths."""

  rows: np.ndarray
  paths: Sequence[str]


class RankedImages:
  """A split's images in the order of their keys, on disk; memory stays bounded.

  Args:
    scratch_dir: See `external_sort.open_database`.
    counts_only: Whether to count the images and keep none.
  """

  def __init__(
    self, *, scratch_dir: str | None = None, counts_only: bool = False
  ) -> None:
    self.num_images = 0
    self._scratch_dir = scratch_dir
    self._is_sorted = False
    self._database: sqlite3.Connection | None = None
    if not counts_only:
      self._database = external_sort.open_database(scratch_dir)
      weakref.finalize(self, self._database.close)
      self._database.execute("CREATE TABLE images (key INTEGER, row BLOB, path TEXT)")

  def add(self, rows: np.ndarray, paths: Sequence[str]) -> None:
    """Adds some images before the first is read.

    Args:
      rows: base.ROW_DTYPE[images] with their keys.
      paths: Their paths.
    """
    self.num_images += len(rows)
    if self._database is None:
      return
    # SQLite's integers are signed; flipping the top bit keeps the order.
    keys = (rows["key"] ^ np.uint64(1 << 63)).view(np.int64).tolist()
    contents = rows.view(f"V{rows.itemsize}").tolist()
    with external_sort.full_disk_as_data_error(self._scratch_dir):
      self._database.executemany(
        "INSERT INTO images VALUES (?, ?, ?)", zip(keys, contents, paths, strict=True)
      )

  def ranked(self, first: int, count: int) -> Images:
    """Returns `count` images from rank `first`; those of one key as they came."""
    if self._database is None:
      raise ValueError("a plan that only counts holds no images")
    if not self._is_sorted:
      with external_sort.full_disk_as_data_error(self._scratch_dir):
        self._database.execute("CREATE TABLE ranked (row BLOB, path TEXT)")
        self._database.execute(
          "INSERT INTO ranked SELECT row, path FROM images ORDER BY key, rowid"
        )
        self._database.execute("DROP TABLE images")
      self._is_sorted = True
    found = self._database.execute(
      "SELECT row, path FROM ranked WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
      (first, first + count),
    ).fetchall()
    content = bytearray(b"".join(row for row, _ in found))
    return Images(np.frombuffer(content, base.ROW_DTYPE), [path for _, path in found])


@dataclasses.dataclass(frozen=True, slots=True)  # there may be a hundred thousand
class PlannedShard:
  """One shard to write.

  Attributes:
    split: 'train', 'val' or 'images'.
    number: Its number in the split, from 0.
    name: Its file's name.
    first: Rank in the split of its first image.
    num_images: Source images that belong to it.
  """

  split: str
  number: int
  name: str
  first: int
  num_images: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """All of a build's shards, in the manifest's order.

  Attributes:
    identities: Folder names, sorted; an identity's index is its label.
    num_images: Images that are planned; each is in exactly one shard.
    num_over: Images above `max_images` of an identity, which are in no shard.
    checksum: CRC-32C of the paths and the tables' rows, as eight hex digits.
    shards: The shards.
    images: The images by split.
    labels: int32[identities] by the identities' order in the source.
  """

  identities: tuple[str, ...]
  num_images: int
  num_over: int
  checksum: str
  shards: tuple[PlannedShard, ...]
  images: Mapping[str, RankedImages]
  labels: np.ndarray

  def images_of(self, shard: PlannedShard) -> Images:
    """Returns a shard's images in order, with their labels."""
    found = self.images[shard.split].ranked(shard.first, shard.num_images)
    found.rows["label"] = self.labels[found.rows["label"]]
    return found


def plan_training_set(
  groups: Iterable[base.IdentityGroup],
  *,
  seed: int,
  num_shards: int | None,
  val_fraction: float,
  max_images: int | None = None,
  is_held_out: Callable[[str], bool] | None = None,
  scratch_dir: str | None = None,
  counts_only: bool = False,
) -> Plan:
  """Plans train shards of shuffled images, and val shards of those held out.

  Args:
    groups: The images, in the order of their paths.
    seed: Decides order and hold-out.
    num_shards: Train shards; None is one for each IMAGES_A_SHARD, at least
      MIN_TRAIN_SHARDS. Val shards are in proportion.
    val_fraction: Fraction of each identity's images to hold out, rounded; one image of
      each always stays in train.
    max_images: Most images of an identity in train: those that come first in the order,
      as `tfrecords_tools.select` also chooses.
    is_held_out: Chooses the val images by their paths, instead of `val_fraction`.
    scratch_dir: Where the images are kept; None is the system's temporary folder.
    counts_only: Whether to plan the shards without their images.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  train, val = (
    RankedImages(scratch_dir=scratch_dir, counts_only=counts_only) for _ in range(2)
  )
  numbering = _Numbering()
  for group in numbering.watch(groups):
    group.rows["key"] = _hashes(group.paths, f"order {seed}")
    if is_held_out is None:
      held_out = _hold_out(group.paths, seed=seed, fraction=val_fraction)
    else:
      held_out = np.array([is_held_out(path) for path in group.paths])
    if held_out.any():
      kept_out, group = group.take(held_out), group.take(~held_out)
      val.add(kept_out.rows, kept_out.paths)
    if max_images is not None and len(group.paths) > max_images:
      first = np.argsort(group.rows["key"], kind="stable")[:max_images]
      group = group.take(np.sort(first))
    train.add(group.rows, group.paths)
  if num_shards is None:
    wanted = max(MIN_TRAIN_SHARDS, -(-train.num_images // IMAGES_A_SHARD))
    num_shards = min(wanted, train.num_images)
  shards = _split_evenly("train", train.num_images, num_shards=num_shards)
  if val.num_images:
    val_shards = max(1, round(num_shards * val.num_images / train.num_images))
    val_shards = min(val_shards, val.num_images)
    shards += _split_evenly("val", val.num_images, num_shards=val_shards)
  return numbering.plan(shards, {"train": train, "val": val})


def _hold_out(paths: Sequence[str], *, seed: int, fraction: float) -> np.ndarray:
  """Returns bool[images], true for those of an identity with the smallest hashes."""
  held_out = np.zeros(len(paths), bool)
  if fraction:
    wanted = min(int(len(paths) * fraction + 0.5), len(paths) - 1)
    order = np.argsort(_hashes(paths, f"val {seed}"), kind="stable")
    held_out[order[:wanted]] = True
  return held_out


def _hashes(paths: Sequence[str], key: str) -> np.ndarray:
  """Returns uint64[images], a keyed hash of each path."""
  keyed = hashlib.blake2b(key=key.encode(), digest_size=8)
  digests = bytearray()
  for path in paths:
    hasher = keyed.copy()
    hasher.update(path.encode())
    digests += hasher.digest()
  return np.frombuffer(bytes(digests), "<u8")


def plan_verification_set(
  groups: Iterable[base.IdentityGroup],
  *,
  num_shards: int | None,
  scratch_dir: str | None = None,
  counts_only: bool = False,
) -> Plan:
  """Plans shards in the order of the paths, so a row of the pairs names records.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  images = RankedImages(scratch_dir=scratch_dir, counts_only=counts_only)
  numbering = _Numbering()
  for group in numbering.watch(groups):
    first = images.num_images
    group.rows["key"] = np.arange(first, first + len(group.paths))
    images.add(group.rows, group.paths)
  num_shards = num_shards or -(-images.num_images // IMAGES_A_SHARD)
  shards = _split_evenly("images", images.num_images, num_shards=num_shards)
  return numbering.plan(shards, {"images": images})


def _split_evenly(
  split: str, num_images: int, *, num_shards: int
) -> tuple[PlannedShard, ...]:
  """Cuts the ranks into shards whose counts differ by at most one."""
  if num_shards > num_images:
    raise errors.UsageError(
      f"--num_shards={num_shards} is more than the {num_images} images of the split "
      f"{split!r}; each shard needs one."
    )
  shards = []
  size, larger = divmod(num_images, num_shards)
  for number in range(num_shards):
    name = shard_index.shard_name(split, number, num_shards)
    first = number * size + min(number, larger)
    count = size + (number < larger)
    shards.append(PlannedShard(split, number, name, first, count))
  return tuple(shards)


class _Numbering:
  """Numbers the identities as they come, and counts and checksums the images."""

  def __init__(self) -> None:
    self._identities: list[str] = []
    self._num_images = 0
    self._checksum = _InputChecksum()

  def watch(self, groups: Iterable[base.IdentityGroup]) -> Iterator[base.IdentityGroup]:
    """Yields the groups with their numbers as labels.

    Raises:
      ValueError: A reader or a selection broke the order.
    """
    before, shown = "", progress.CountLogger("planned %s images")
    for number, group in enumerate(groups):
      if not before < f"{group.identity}/":
        raise ValueError(f"{group.identity}/ comes after {before} in the source")
      before = f"{group.identity}/"
      group.rows["label"] = number
      self._identities.append(group.identity)
      self._num_images += len(group.paths)
      self._checksum.add(group)
      shown.update(self._num_images)
      yield group

  def plan(
    self, shards: tuple[PlannedShard, ...], images: Mapping[str, RankedImages]
  ) -> Plan:
    """Returns the plan; a label is an identity's index among the sorted identities.

    The groups come in another order: 'Ann-Lee/' sorts before 'Ann/'.
    """
    order = sorted(range(len(self._identities)), key=self._identities.__getitem__)
    labels = np.empty(len(order), np.int32)
    labels[order] = np.arange(len(order))
    identities = tuple(self._identities[number] for number in order)
    checksum = f"{self._checksum.value:08x}"
    planned = sum(split.num_images for split in images.values())
    over = self._num_images - planned
    return Plan(identities, planned, over, checksum, shards, images, labels)


class _InputChecksum:
  """CRC-32C of all paths, then all places, then all geometry, in one pass over them."""

  def __init__(self) -> None:
    self._paths = self._places = self._geometry = self._num_images = 0

  def add(self, group: base.IdentityGroup) -> None:
    """Adds the images that come next."""
    text = "\n".join(group.paths).encode()
    text = b"\n" + text if self._num_images else text
    extend = google_crc32c.extend
    self._paths = extend(self._paths, text)
    self._places = extend(self._places, group.rows["place"].tobytes())
    self._geometry = extend(self._geometry, group.rows["geometry"].tobytes())
    self._num_images += len(group.paths)

  @property
  def value(self) -> int:
    """The CRC-32C of the three, one after another."""
    checksum = _joined_crc(self._paths, self._places, length=self._num_images)
    num_bytes = base.ROW_DTYPE["geometry"].itemsize * self._num_images
    return _joined_crc(checksum, self._geometry, length=num_bytes)


def _joined_crc(first: int, second: int, *, length: int) -> int:
  """Returns the CRC-32C of two contents one after the other; `length` is the second's.

  A CRC is affine over bits, so zeros in the second one's place carry the first over.
  """
  nothing = 0
  while length:
    zeros = bytes(min(length, 1 << 20))
    first = google_crc32c.extend(first, zeros)
    nothing = google_crc32c.extend(nothing, zeros)
    length -= len(zeros)
  return first ^ nothing ^ second
