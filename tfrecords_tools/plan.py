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
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from facedist import errors
from facedist.data import shard_index
from tfrecords_tools import heartbeat, input_checksum, source, spill

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
  spills: Mapping[str, spill.Spill]
  labels: np.ndarray

  def images_of(self, shard: PlannedShard) -> spill.Images:
    """Returns a shard's images in order, with their labels."""
    images = self.spills[shard.split].ranked(shard.first, shard.num_images)
    images.rows["label"] = self.labels[images.rows["label"]]
    return images


def plan_training_set(
  groups: Iterable[source.Group],
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
    spill.Spill(scratch_dir=scratch_dir, counts_only=counts_only) for _ in range(2)
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
  groups: Iterable[source.Group],
  *,
  num_shards: int | None,
  scratch_dir: str | None = None,
  counts_only: bool = False,
) -> Plan:
  """Puts the images into shards in the order of their paths, so that a row is a record.

  Raises:
    errors.UsageError: There are more shards than images.
  """
  images = spill.Spill(scratch_dir=scratch_dir, counts_only=counts_only)
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
    self._checksum = input_checksum.InputChecksum()

  def watch(self, groups: Iterable[source.Group]) -> Iterator[source.Group]:
    """Passes the groups on with their numbers as labels.

    Raises:
      ValueError: A reader or a selection did not keep the order.
    """
    before, shown = "", heartbeat.Heartbeat("planned %s images")
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

  def plan(
    self, shards: tuple[PlannedShard, ...], spills: Mapping[str, spill.Spill]
  ) -> Plan:
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
