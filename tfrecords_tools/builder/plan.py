"""The plan of a build: which image goes where, before any image is opened.

Order and hold-out come from a keyed hash of each path, so they depend on the seed and
the path alone, not on a random generator's version or on the other images. Tasks on
many machines therefore make the same plan without a word to each other.

The way of an image: a reader (`vggface2`, `lfw`, ...) yields `source.Group`s, an
identity at a time, in ascending order of identity + '/'; generators from groups to
groups look up faces (`source.locate`) and leave out or merge (whatever selects belongs
here, before the plan); the planner numbers the identities, hashes the paths and spills
every image to disk by its hash (`spill`). A shard is a range of ranks, read back when
it is written. Memory holds the names of the identities, one identity's images and a
block of the spill, whatever the number of images.

One number for a build's input, made in one pass over it.

Images by the rank of a key, kept on disk: memory does not grow with their number.

Images come in any order of key and are appended to one file without a name, a block at
a time, each block sorted into 256 buckets by the key's top byte. A shard is a range of
ranks; it is read through a window: a bucket or, where that has more images than a
block, as many parts of it, by the key's next byte, as a block has room for.
"""

import dataclasses
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import google_crc32c
import numpy as np

from facedist import errors, progress, storage
from facedist.data.shards import shard_index
from tfrecords_tools import checksums
from tfrecords_tools.sources import base


class InputChecksum:
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
    geometry = base.ROW_DTYPE["geometry"].itemsize * self._num_images
    combine = checksums.combine
    checksum = combine(self._paths, self._places, length=self._num_images)
    return combine(checksum, self._geometry, length=geometry)


IMAGES_A_BLOCK = 1 << 16
_BUCKETS = 256  # and parts of a bucket
_BUCKET_SHIFT, _PART_SHIFT = np.uint64(56), np.uint64(48)
_START_BYTES = 16  # of a bucket in a block's table: where its rows and paths start


@dataclasses.dataclass(frozen=True)
class Images:
  """Some images in their final order: `source.ROW_DTYPE[images]` and their paths."""

  rows: np.ndarray
  paths: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Window:
  """Images from rank `first` on: their rows, and their paths in UTF-8."""

  first: int
  rows: np.ndarray
  paths: Sequence[bytes]


_NO_PARTS = -1, np.empty(0, np.int64)  # of which bucket, and images in each
_NOTHING = _Window(0, np.empty(0, base.ROW_DTYPE), ())


class Spill:
  """Images by the rank of their key.

  Of a block only its place in the file is held: its table, int64[buckets + 1, 2] bytes
  at which each bucket's rows and paths start, goes before them.

  Args:
    scratch_dir: Where the file lies; None is the system's temporary folder.
    counts_only: Whether to count the images and keep none.
  """

  def __init__(
    self, *, scratch_dir: str | None = None, counts_only: bool = False
  ) -> None:
    self.num_images = 0
    self._counts_only = counts_only
    self._scratch_dir = scratch_dir
    self._waiting: list[tuple[np.ndarray, Sequence[str]]] = []
    self._num_waiting = 0
    self._blocks: list[int] = []
    self._end = 0
    self._bucket_counts = np.zeros(_BUCKETS, np.int64)
    self._parts, self._window = _NO_PARTS, _NOTHING
    if not counts_only:
      with storage.scratch(scratch_dir):
        self._file = tempfile.TemporaryFile(dir=scratch_dir)  # noqa: SIM115
      weakref.finalize(self, self._file.close)

  def add(self, rows: np.ndarray, paths: Sequence[str]) -> None:
    """Takes some images.

    Args:
      rows: source.ROW_DTYPE[images] with their keys.
      paths: Their paths.
    """
    self.num_images += len(rows)
    if self._counts_only:
      return
    self._waiting.append((rows, paths))
    self._num_waiting += len(rows)
    if self._num_waiting >= IMAGES_A_BLOCK:
      self._flush()

  def ranked(self, first: int, count: int) -> Images:
    """Returns `count` images from rank `first` on; those of one key as they came."""
    self._flush()
    rows, paths = [np.empty(0, base.ROW_DTYPE)], list[str]()
    while count > 0:
      held = self._window
      if not held.first <= first < held.first + len(held.rows):
        self._window = held = self._read_window(first)  # shards in a row share some
      some = slice(first - held.first, first - held.first + count)
      rows.append(held.rows[some])
      paths += [path.decode() for path in held.paths[some]]
      first, count = first + len(rows[-1]), count - len(rows[-1])
    return Images(np.concatenate(rows), paths)

  def _flush(self) -> None:
    """Writes what waits as a block."""
    if not self._waiting:
      return
    rows = np.concatenate([rows for rows, _ in self._waiting])
    paths = [path.encode() for _, some in self._waiting for path in some]
    self._waiting, self._num_waiting = [], 0
    rows["path_bytes"] = np.fromiter(map(len, paths), np.uint32, len(paths))
    buckets = (rows["key"] >> _BUCKET_SHIFT).astype(np.intp)
    order = np.argsort(buckets, kind="stable")
    rows = rows[order]
    counts = np.bincount(buckets, minlength=_BUCKETS)
    path_bytes = np.bincount(buckets[order], rows["path_bytes"], minlength=_BUCKETS)
    self._bucket_counts += counts
    self._parts, self._window = _NO_PARTS, _NOTHING
    self._blocks.append(self._end)
    self._end += (_BUCKETS + 1) * _START_BYTES
    table = np.stack(
      [self._starts(counts * rows.itemsize), self._starts(path_bytes.astype(np.int64))],
      axis=1,
    )
    try:
      self._file.write(table.tobytes())
      self._file.write(rows.tobytes())
      self._file.write(b"".join([paths[row] for row in order.tolist()]))
      self._file.flush()
    except OSError as error:
      folder = self._scratch_dir or tempfile.gettempdir()
      raise errors.DataError(
        f"--scratch_dir={folder}: {error.strerror} after {self._end:,} bytes of the "
        "plan, which needs about 100 an image; name a folder on a larger disk."
      ) from error

  def _starts(self, sizes: np.ndarray) -> np.ndarray:
    """Returns int64[n + 1] places in the file of n parts to be written next."""
    starts = self._end + np.concatenate([[0], np.cumsum(sizes)])
    self._end = int(starts[-1])
    return starts

  def _read_window(self, rank: int) -> _Window:
    """Returns the window with the image of that rank."""
    ends = np.cumsum(self._bucket_counts)
    bucket = int(np.searchsorted(ends, rank, side="right"))
    first = int(ends[bucket] - self._bucket_counts[bucket])
    if self._bucket_counts[bucket] <= IMAGES_A_BLOCK:
      return _Window(first, *self._read(bucket, 0, _BUCKETS))
    if self._parts[0] != bucket:
      self._parts = bucket, self._count_parts(bucket)
    ends = first + np.cumsum(self._parts[1])
    part = int(np.searchsorted(ends, rank, side="right"))
    first = int(ends[part] - self._parts[1][part])
    end = int(np.searchsorted(ends, first + IMAGES_A_BLOCK, side="right"))
    return _Window(first, *self._read(bucket, part, max(end, part + 1)))

  def _count_parts(self, bucket: int) -> np.ndarray:
    """Returns int64[parts], a bucket's images by the next byte of their keys."""
    counts = np.zeros(_BUCKETS, np.int64)
    for rows, _ in self._blocks_of(bucket):
      counts += np.bincount(_part_of(rows), minlength=_BUCKETS)
    return counts

  def _read(self, bucket: int, first: int, end: int) -> tuple[np.ndarray, list[bytes]]:
    """Returns rows and paths of parts [first, end) of a bucket, by key."""
    found, paths = [], list[bytes]()
    for rows, place in self._blocks_of(bucket):
      part = _part_of(rows)
      mine = np.flatnonzero((first <= part) & (part < end))
      lasts = np.cumsum(rows["path_bytes"], dtype=np.int64)
      content = os.pread(self._file.fileno(), int(lasts[-1]), place)
      starts = (lasts - rows["path_bytes"])[mine].tolist()
      paths += [
        content[start:last]
        for start, last in zip(starts, lasts[mine].tolist(), strict=True)
      ]
      found.append(rows[mine])
    rows = np.concatenate(found)
    order = np.argsort(rows["key"], kind="stable")
    return rows[order], [paths[row] for row in order.tolist()]

  def _blocks_of(self, bucket: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields a bucket's rows in each block, and where in the file their paths start."""
    descriptor = self._file.fileno()
    for block in self._blocks:
      entry = os.pread(descriptor, 2 * _START_BYTES, block + bucket * _START_BYTES)
      (start, paths), (end, _) = np.frombuffer(entry, np.int64).reshape(2, 2).tolist()
      if end > start:
        content = os.pread(descriptor, end - start, start)
        yield np.frombuffer(content, base.ROW_DTYPE), paths


def _part_of(rows: np.ndarray) -> np.ndarray:
  """Returns int64[rows], the byte of each key after the top one."""
  return (rows["key"] >> _PART_SHIFT & np.uint64(_BUCKETS - 1)).astype(np.int64)


IMAGES_A_SHARD = 10_000
MIN_TRAIN_SHARDS = 8


@dataclasses.dataclass(frozen=True, slots=True)  # there may be a hundred thousand
class PlannedShard:
  """One shard to write.

  Attributes:
    split: 'train', 'val' or 'images'.
    number: Its place in the split.
    name: Its file's name.
    first: Rank in the split of its first image.
    num_images: Images of the source that belong into it.
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
    identities: Folder names, sorted; the place is the label.
    num_images: Images that are planned; each is in exactly one shard.
    num_over: Images past the most of an identity, which are in none.
    checksum: Eight hex digits that change with any path or row of the tables.
    shards: The shards.
    spills: The images by split.
    labels: int32[identities] by the identities' order in the source.
  """

  identities: tuple[str, ...]
  num_images: int
  num_over: int
  checksum: str
  shards: tuple[PlannedShard, ...]
  spills: Mapping[str, Spill]
  labels: np.ndarray

  def images_of(self, shard: PlannedShard) -> Images:
    """Returns a shard's images in order, with their labels."""
    images = self.spills[shard.split].ranked(shard.first, shard.num_images)
    images.rows["label"] = self.labels[images.rows["label"]]
    return images


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
  """Shuffles the images over train shards, and those held out over val shards.

  Args:
    groups: The images, in the order of their paths.
    seed: Decides order and hold-out.
    num_shards: Train shards; None is one for each IMAGES_A_SHARD, at least
      MIN_TRAIN_SHARDS. Val shards are in proportion.
    val_fraction: Share of each identity's images to hold out, rounded; one image of
      each always stays in train.
    max_images: Images of each identity to take at most for train: those that come
      first in the order, which is what `selecting.Table.keep_images` takes too.
    is_held_out: Chooses the val images by their paths, instead of `val_fraction`.
    scratch_dir: Where the images are kept; None is the system's temporary folder.
    counts_only: Whether to plan the shards without their images.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  train, val = (
    Spill(scratch_dir=scratch_dir, counts_only=counts_only) for _ in range(2)
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


def plan_verification_set(
  groups: Iterable[base.IdentityGroup],
  *,
  num_shards: int | None,
  scratch_dir: str | None = None,
  counts_only: bool = False,
) -> Plan:
  """Puts the images into shards in the order of their paths, so that a row is a record.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  images = Spill(scratch_dir=scratch_dir, counts_only=counts_only)
  numbering = _Numbering()
  for group in numbering.watch(groups):
    first = images.num_images
    group.rows["key"] = np.arange(first, first + len(group.paths))
    images.add(group.rows, group.paths)
  num_shards = num_shards or -(-images.num_images // IMAGES_A_SHARD)
  shards = _split_evenly("images", images.num_images, num_shards=num_shards)
  return numbering.plan(shards, {"images": images})


class _Numbering:
  """Numbers the identities as they come and sums up the images."""

  def __init__(self) -> None:
    self._identities: list[str] = []
    self._num_images = 0
    self._checksum = InputChecksum()

  def watch(self, groups: Iterable[base.IdentityGroup]) -> Iterator[base.IdentityGroup]:
    """Passes the groups on with their numbers as labels.

    Raises:
      ValueError: A reader or a selection did not keep the order.
    """
    before, shown = "", progress.HeartbeatFile("planned %s images")
    for number, group in enumerate(groups):
      if not before < f"{group.identity}/":
        raise ValueError(f"{group.identity}/ comes after {before} in the source")
      before = f"{group.identity}/"
      group.rows["label"] = number
      self._identities.append(group.identity)
      self._num_images += len(group.paths)
      self._checksum.add(group)
      shown.beat(self._num_images)
      yield group

  def plan(self, shards: tuple[PlannedShard, ...], spills: Mapping[str, Spill]) -> Plan:
    """Returns the plan; labels are the places of the sorted identities.

    'Ann-Lee/' comes before 'Ann/', so the order of the paths is not quite that.
    """
    order = sorted(range(len(self._identities)), key=self._identities.__getitem__)
    labels = np.empty(len(order), np.int32)
    labels[order] = np.arange(len(order))
    identities = tuple(self._identities[number] for number in order)
    checksum = f"{self._checksum.value:08x}"
    planned = sum(images.num_images for images in spills.values())
    over = self._num_images - planned
    return Plan(identities, planned, over, checksum, shards, spills, labels)


def _hold_out(paths: Sequence[str], *, seed: int, fraction: float) -> np.ndarray:
  """Returns bool[images], true for those of an identity with the smallest hashes."""
  held_out = np.zeros(len(paths), bool)
  if fraction:
    wanted = min(int(len(paths) * fraction + 0.5), len(paths) - 1)
    order = np.argsort(_hashes(paths, f"val {seed}"), kind="stable")
    held_out[order[:wanted]] = True
  return held_out


def _hashes(paths: Sequence[str], key: str) -> np.ndarray:
  """Returns uint64[images] that look random, from the key and each path."""
  keyed = hashlib.blake2b(key=key.encode(), digest_size=8)
  digests = bytearray()
  for path in paths:
    hasher = keyed.copy()
    hasher.update(path.encode())
    digests += hasher.digest()
  return np.frombuffer(bytes(digests), "<u8")


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
  share, larger = divmod(num_images, num_shards)
  for number in range(num_shards):
    name = shard_index.shard_name(split, number, num_shards)
    first = number * share + min(number, larger)
    count = share + (number < larger)
    shards.append(PlannedShard(split, number, name, first, count))
  return tuple(shards)
