"""Images that are there twice, byte for byte, found by the BLAKE2b of their JPEGs.

Two copies under one identity are one image too many. Two under different identities
are at least one wrong label, and nobody knows which.
"""

import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from facedist import errors, storage
from facedist.data import records as record_format
from tfrecords_tools import merging, selection

REPORT_NAME = "duplicates.jsonl"
_READERS = 16  # threads that hide a bucket's latency


@dataclasses.dataclass(frozen=True)
class Group:
  """Records that hold the same image.

  Attributes:
    records: int64[copies], rising.
    across: Whether they have different labels.
    kept: The record that stays; none where all go.
  """

  records: np.ndarray
  across: bool
  kept: int | None


def groups_of(
  digests: np.ndarray, labels: np.ndarray, *, across: str
) -> Iterator[Group]:
  """Yields the records that hold an image which others hold too.

  Args:
    digests: uint64[records, 2].
    labels: int32[records]; those LEFT_OUT are nobody's copy.
    across: One of selection.ACROSS; within an identity the first copy stays.
  """
  present = _maybe_copies(digests)
  present = present[labels[present] != selection.LEFT_OUT]
  here = digests[present]
  order = np.lexsort((here[:, 1], here[:, 0]))  # stable: copies stay in their order
  in_order = here[order]
  is_copy = (in_order[1:] == in_order[:-1]).all(axis=1)
  edges = np.flatnonzero(np.diff(np.r_[0, is_copy, 0]))  # where runs begin and end
  for begin, end in edges.reshape(-1, 2):
    records = present[order[begin : end + 1]]
    differ = bool((labels[records] != labels[records[0]]).any())
    goes = differ and across == "drop_all"
    yield Group(records, differ, None if goes else int(records[0]))


def _maybe_copies(digests: np.ndarray) -> np.ndarray:
  """Returns the records whose first half of a digest others have too, rising.

  They are few, so that what looks closer needs no memory for all records.
  """
  order = np.argsort(digests[:, 0], kind="stable")
  in_order = digests[order, 0]
  is_same = in_order[1:] == in_order[:-1]
  del in_order
  maybe = np.zeros(len(order), bool)
  maybe[1:] |= is_same
  maybe[:-1] |= is_same
  return np.sort(order[maybe])


def filenames_of(
  parts: Sequence[merging.Part], records: np.ndarray
) -> dict[int, str | None]:
  """Reads what records say of the source image's path, a request each.

  Args:
    parts: The shards, in the records' order.
    records: int64[copies], places among all records.

  Returns:
    The paths by place; none for a record that is damaged or names none.
  """
  named: dict[int, str | None] = {}
  records, first = np.sort(records), 0
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    for part in parts:
      last = first + part.shard.records
      begin, end = np.searchsorted(records, (first, last))
      places, first = records[begin:end] - first, last
      if len(places):
        rows = part.rows()[places]
        found = pool.map(_filename, itertools.repeat(part.path), rows)
        named.update(zip(records[begin:end].tolist(), found, strict=True))
  return named


class Report:
  """Writes a JSON line for each group, and counts.

  Args:
    stream: Where to write.
    parts: The shards, in the records' order.
    labels: int32[records].
    names: The identity of each label.
    filenames: Of `filenames_of`, of all records that groups will name.
  """

  def __init__(
    self,
    stream: IO[str],
    parts: Sequence[merging.Part],
    *,
    labels: np.ndarray,
    names: Sequence[str],
    filenames: Mapping[int, str | None],
  ) -> None:
    counts = [part.shard.records for part in parts]
    self._stream, self._parts = stream, parts
    self._labels, self._names, self._filenames = labels, names, filenames
    self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    self.counts = {"images": 0, "across_identities": 0, "dropped_records": 0}

  def add(self, group: Group) -> None:
    """Writes one group."""
    dropped = [int(record) for record in group.records if record != group.kept]
    line = {
      "across_identities": group.across,
      "kept": None if group.kept is None else self._describe(group.kept),
      "dropped": [self._describe(record) for record in dropped],
    }
    self._stream.write(json.dumps(line) + "\n")
    self.counts["images"] += 1
    self.counts["across_identities"] += group.across
    self.counts["dropped_records"] += len(dropped)

  def _describe(self, record: int) -> dict[str, Any]:
    """Says where a record lies: `record` is its place in the input's index."""
    place = int(np.searchsorted(self._firsts, record, side="right")) - 1
    part = self._parts[place]
    return {
      "identity": self._names[self._labels[record]],
      "split": part.split,
      "shard": part.path,
      "record": record - int(self._firsts[place]),
      "filename": self._filenames[record],
    }


def _filename(path: str, row: np.void) -> str | None:
  """Returns the source image's path that a record of the shard names."""
  framed = storage.read_range(path, int(row["offset"]), int(row["length"]))
  try:
    return record_format.parse(record_format.unframe(framed)).filename or None
  except errors.DataError:
    return None  # hashing needs the image alone; damage is for verify to name
