"""A set's indexes one after another, read ahead, so that no set is too large."""

import collections
import dataclasses
from collections.abc import Collection, Iterator
from concurrent import futures

import numpy as np

from facedist import errors, storage
from facedist.data import manifest, shard_index

_READ_AHEAD = 8  # indexes; that of a shard of 10,000 records has 240 kB


@dataclasses.dataclass(frozen=True)
class IndexedShard:
  """A shard and its index.

  Attributes:
    split: The split's name.
    number: The shard's place in it.
    shard: The manifest's entry.
    rows: INDEX_DTYPE[records].
  """

  split: str
  number: int
  shard: manifest.Shard
  rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a record lies: its shard, byte and length; and its label in the index."""

  path: str
  offset: int
  length: int
  label: int


def walk(folder: str, made: manifest.Manifest) -> Iterator[IndexedShard]:
  """Yields every shard with its index, in the manifest's order.

  Raises:
    errors.DataError: An index is missing, damaged or not the manifest's.
  """
  shards = (
    (name, number, shard)
    for name, split in made.splits.items()
    for number, shard in enumerate(split.shards)
  )
  waiting: collections.deque[futures.Future[IndexedShard]] = collections.deque()
  with futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
    for split, number, shard in shards:
      waiting.append(pool.submit(_load, folder, made, split, number, shard))
      if len(waiting) == _READ_AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def find(
  folder: str,
  made: manifest.Manifest,
  *,
  numbers: Collection[int],
  labels: Collection[int],
  each: int,
) -> tuple[dict[int, Place], dict[int, list[Place]]]:
  """Finds records by their number and the first ones of some identities.

  Args:
    folder: Local or in a bucket.
    made: Its manifest.
    numbers: Records' places in the concatenation of all splits.
    labels: The identities.
    each: Most records to find of an identity.

  Returns:
    Places by number, and by label.
  """
  ordered = np.array(sorted(numbers), np.int64)
  found: dict[int, Place] = {}
  of_label: dict[int, list[Place]] = {label: [] for label in labels}
  first = 0
  for one in walk(folder, made):
    path = one.shard.path(folder)
    here = ordered[(ordered >= first) & (ordered < first + len(one.rows))]
    for number in here.tolist():
      found[number] = _place(path, one.rows[number - first])
    for row in np.flatnonzero(np.isin(one.rows["label"], list(of_label))):
      places = of_label[int(one.rows[row]["label"])]
      if len(places) < each:
        places.append(_place(path, one.rows[row]))
    first += len(one.rows)
  return found, of_label


def _load(
  folder: str, made: manifest.Manifest, split: str, number: int, shard: manifest.Shard
) -> IndexedShard:
  """Reads an index and compares it with the manifest."""
  path = shard.index_path(folder)
  content = storage.read_bytes(path)
  rows = shard_index.from_bytes(content, path)
  if storage.crc32c_of(content) != shard.index_crc32c or len(rows) != shard.records:
    raise errors.DataError(
      f"{path} is not the manifest's; python -m tfrecords_tools.verify {folder} says "
      "what is damaged."
    )
  shard_index.check_fits(
    rows, path=path, shard_bytes=shard.bytes, identities=made.num_identities
  )
  return IndexedShard(split, number, shard, rows)


def _place(path: str, row: np.void) -> Place:
  """Returns where a row of the index points."""
  return Place(path, int(row["offset"]), int(row["length"]), int(row["label"]))
