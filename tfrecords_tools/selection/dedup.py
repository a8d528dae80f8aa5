"""Finds images that are there twice, byte for byte, by the BLAKE2b of their JPEGs.

Two copies under one identity are one image too many. Two under different identities
mean that at least one label is wrong, and nothing tells which. The hashes are cached
shard by shard, so a run that was stopped continues.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from facedist import errors, progress, storage
from facedist.data.shards import tfrecord as record_format
from tfrecords_tools import parallel
from tfrecords_tools.selection import filters, merge

FOLDER = ".digests"
REPORT_NAME = "duplicates.jsonl"
_READERS = 16  # threads that hide a bucket's latency
_DIGEST_BYTES = 16
_RECORDS_A_TASK = 512
_BYTES_A_TASK = 8 << 20
_RECORDS_WORTH_A_PROCESS = 20_000  # below, starting one takes longer than the records


@dataclasses.dataclass(frozen=True)
class HashTask:
  """Neighbouring records of a shard to hash: a process's unit of work.

  Attributes:
    path: The shard.
    start: Its first byte to read.
    firsts: int64[records], where each JPEG starts after that byte.
    lasts: int64[records], where it ends.
  """

  path: str
  start: int
  firsts: np.ndarray
  lasts: np.ndarray


def digest_parts(
  parts: Sequence[merge.MergePart], output_dir: str, *, num_processes: int | None
) -> np.ndarray:
  """Hashes the JPEG of every record; what was hashed before is read again.

  Args:
    parts: The shards.
    output_dir: A file for each shard is cached below it, in `.digests`, so a
      run that was stopped continues.
    num_processes: Processes; none is one for each core, fewer for few records.

  Returns:
    uint64[records, 2], BLAKE2b-128 in two halves.
  """
  names = [f"{p.shard.crc32c:08x}-{p.shard.index_crc32c:08x}.npy" for p in parts]
  paths = [storage.join(output_dir, FOLDER, name) for name in names]
  ends = np.cumsum([part.shard.records for part in parts], dtype=np.int64).tolist()
  total = ends[-1] if ends else 0
  digests = np.zeros((total, 2), np.uint64)
  own = [
    digests[end - part.shard.records : end]
    for part, end in zip(parts, ends, strict=True)
  ]
  todo = [place for place, path in enumerate(paths) if not _is_cached(path, own[place])]
  done = total - sum(len(own[place]) for place in todo)
  wanted = 1 + (total - done) // _RECORDS_WORTH_A_PROCESS
  hashed = parallel.ordered_map(
    hash_records,
    (task for place in todo for task in tasks_of(parts[place])),
    num_processes=num_processes or min(parallel.available_cores(), wanted),
  )
  shown = progress.Progress("hashed", total=total, done=done)
  with contextlib.closing(hashed), shown:
    for place in todo:
      count = 0
      while count < len(own[place]):
        chunk = next(hashed)
        own[place][count : count + len(chunk)] = chunk
        count += len(chunk)
        shown.advance(len(chunk))
      stream = io.BytesIO()
      np.save(stream, own[place], allow_pickle=False)
      storage.write_bytes(paths[place], stream.getvalue())
  return digests


def tasks_of(part: merge.MergePart) -> Iterator[HashTask]:
  """Splits a shard into tasks."""
  rows = part.rows()
  firsts = rows["offset"].astype(np.int64) + rows["image_offset"]
  lasts = firsts + rows["image_length"]
  begin = 0
  while begin < len(rows):
    within = np.searchsorted(lasts, firsts[begin] + _BYTES_A_TASK)
    end = min(max(int(within), begin + 1), begin + _RECORDS_A_TASK)
    start = int(firsts[begin])
    yield HashTask(
      part.path, start, firsts[begin:end] - start, lasts[begin:end] - start
    )
    begin = end


def hash_records(task: HashTask) -> np.ndarray:
  """Returns uint64[records, 2], the digest of each JPEG."""
  content = memoryview(storage.read_range(task.path, task.start, int(task.lasts[-1])))
  digests = bytearray()
  for first, last in zip(task.firsts.tolist(), task.lasts.tolist(), strict=True):
    digests += hashlib.blake2b(content[first:last], digest_size=_DIGEST_BYTES).digest()
  return np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)


def _is_cached(path: str, digests: np.ndarray) -> bool:
  """Fills a shard's digests in from the cache; False if not there, or corrupt."""
  if not storage.exists(path):
    return False
  try:
    found = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
  except (ValueError, EOFError):
    return False
  if found.shape != digests.shape or found.dtype != digests.dtype:
    return False
  digests[:] = found
  return True


@dataclasses.dataclass(frozen=True)
class DuplicateGroup:
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
) -> Iterator[DuplicateGroup]:
  """Yields the records that hold an image which others hold too.

  Args:
    digests: uint64[records, 2].
    labels: int32[records]; those LEFT_OUT are no copies.
    across: One of selection.ACROSS; within an identity the first copy stays.
  """
  present = _maybe_copies(digests)
  present = present[labels[present] != filters.LEFT_OUT]
  here = digests[present]
  order = np.lexsort((here[:, 1], here[:, 0]))  # stable: copies stay in their order
  in_order = here[order]
  is_copy = (in_order[1:] == in_order[:-1]).all(axis=1)
  edges = np.flatnonzero(np.diff(np.r_[0, is_copy, 0]))  # where runs begin and end
  for begin, end in edges.reshape(-1, 2):
    records = present[order[begin : end + 1]]
    differ = bool((labels[records] != labels[records[0]]).any())
    goes = differ and across == "drop_all"
    yield DuplicateGroup(records, differ, None if goes else int(records[0]))


def _maybe_copies(digests: np.ndarray) -> np.ndarray:
  """Returns the records whose first half of a digest others have too, rising.

  They are few, so the exact comparison needs little memory.
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
  parts: Sequence[merge.MergePart], records: np.ndarray
) -> dict[int, str | None]:
  """Reads what records say of the source image's path, a request each.

  Args:
    parts: The shards, in the records' order.
    records: int64[copies], places among all records.

  Returns:
    The paths by place; none for a record that is corrupt or names none.
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


class DuplicateReport:
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
    parts: Sequence[merge.MergePart],
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

  def add(self, group: DuplicateGroup) -> None:
    """Writes one group."""
    dropped = [int(record) for record in group.records if record != group.kept]
    line = {
      "across_identities": group.across,
      "kept": None if group.kept is None else self._place_of(group.kept),
      "dropped": [self._place_of(record) for record in dropped],
    }
    self._stream.write(json.dumps(line) + "\n")
    self.counts["images"] += 1
    self.counts["across_identities"] += group.across
    self.counts["dropped_records"] += len(dropped)

  def _place_of(self, record: int) -> dict[str, Any]:
    """Returns where a record lies: `record` is its place in the input's index."""
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
    return None  # hashing needs the image alone; verify names corrupt records
