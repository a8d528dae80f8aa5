"""The BLAKE2b of every record's JPEG, kept so that a run that was stopped goes on."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence

import numpy as np

from facedist import progress, storage
from tfrecords_tools import merging, parallel

FOLDER = ".digests"
_DIGEST_BYTES = 16
_RECORDS_A_TASK = 512
_BYTES_A_TASK = 8 << 20
_RECORDS_WORTH_A_PROCESS = 20_000  # below, starting one takes longer than the records


@dataclasses.dataclass(frozen=True)
class Task:
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
  parts: Sequence[merging.Part], output_dir: str, *, num_processes: int | None
) -> np.ndarray:
  """Hashes the JPEG of every record; what was hashed before is read again.

  Args:
    parts: The shards.
    output_dir: A file for each shard is cached below it, in `.digests`, so that a
      run that was stopped goes on.
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


def tasks_of(part: merging.Part) -> Iterator[Task]:
  """Cuts a shard into stretches of records that are read at once."""
  rows = part.rows()
  firsts = rows["offset"].astype(np.int64) + rows["image_offset"]
  lasts = firsts + rows["image_length"]
  begin = 0
  while begin < len(rows):
    within = np.searchsorted(lasts, firsts[begin] + _BYTES_A_TASK)
    end = min(max(int(within), begin + 1), begin + _RECORDS_A_TASK)
    start = int(firsts[begin])
    yield Task(part.path, start, firsts[begin:end] - start, lasts[begin:end] - start)
    begin = end


def hash_records(task: Task) -> np.ndarray:
  """Returns uint64[records, 2], the digest of each JPEG."""
  content = memoryview(storage.read_range(task.path, task.start, int(task.lasts[-1])))
  digests = bytearray()
  for first, last in zip(task.firsts.tolist(), task.lasts.tolist(), strict=True):
    digests += hashlib.blake2b(content[first:last], digest_size=_DIGEST_BYTES).digest()
  return np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)


def _is_cached(path: str, digests: np.ndarray) -> bool:
  """Fills a shard's digests in from the cache; False if not there, or damaged."""
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
