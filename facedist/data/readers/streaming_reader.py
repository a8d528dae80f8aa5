"""Reads records of shards in place, in a bucket or on a disk, by ranges of bytes.

Neighbouring records are fetched in one request. In training, whole windows of
neighbouring records are prefetched, each once an epoch: `StreamedShards` fetches,
`WindowPrefetcher` decides what and when, and a batch is read from `PrefetchedRecords`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from facedist import errors, storage
from facedist.data.readers.record_reader import RecordReader, RecordSource
from facedist.data.samplers.block_sampler import BlockSampler, Window
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest, shard_index, tfrecord

_INDEX_FRACTION = 8  # 1 / 8 of the memory is for the index
_MEGABYTE = 1 << 20


def open_reader(
  folder: str,
  split: str,
  *,
  verify_crc: bool = True,
  memory_mb: int = 1024,
  requests: int = 16,
) -> RecordReader:
  """Opens a split whose shards are read in place; no shard is opened yet.

  Args:
    folder: A folder with a manifest, local or gs://.
    split: 'train', 'val' or 'images'.
    verify_crc: Whether to check the CRC of each record read.
    memory_mb: MiB for what is prefetched and for the index.
    requests: Requests at a time.

  Raises:
    errors.DataError: There is no manifest, or no such split in it.
  """
  content = manifest.load(folder)
  shards = StreamedShards(
    folder,
    content.split(split, folder).shards,
    memory_mb=memory_mb,
    requests=requests,
  )
  return RecordReader(folder, content, split, shards, verify_crc=verify_crc)


@dataclasses.dataclass(frozen=True)
class Piece:
  """Neighbouring records of one shard, as they are stored.

  Attributes:
    first: Number of the first record.
    rows: INDEX_DTYPE[records].
    start: Byte of the shard at which `content` starts.
    content: The framed records.
  """

  first: int
  rows: np.ndarray
  start: int
  content: bytes

  def row(self, record: int) -> bytes:
    """Returns the bytes of a record's row of the index."""
    return self.rows[record - self.first].tobytes()

  def payload(self, record: int) -> bytes:
    """Returns the bytes after a record's header: payload and CRC."""
    row = self.rows[record - self.first]
    start = int(row["offset"]) - self.start
    return self.content[start + tfrecord.HEADER_BYTES : start + int(row["length"])]


class StreamedShards:
  """Reads records by ranges of their shards, without a copy on disk.

  Attributes:
    record_bytes: Bytes of a record, on average in the shard whose records are largest.
  """

  def __init__(
    self,
    folder: str,
    shards: Sequence[manifest.Shard],
    *,
    memory_mb: int,
    requests: int,
  ):
    self._folder, self._shards = folder, shards
    self._memory_mb, self._requests = memory_mb, requests
    index_bytes = memory_mb * _MEGABYTE // _INDEX_FRACTION
    self._max_bytes = memory_mb * _MEGABYTE - index_bytes
    self._index = shard_index.CachedIndex(folder, shards, max_bytes=index_bytes)
    self._numbering = shard_index.Numbering(shards)
    self.record_bytes = max(shard.bytes / max(1, shard.records) for shard in shards)
    self._generations: dict[int, str] = {}

  def locate(self, ids: np.ndarray) -> np.ndarray:
    """Returns the index's INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._index.rows_of(ids)

  def fetch(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields payload and CRC of each record; a run of neighbours is one request."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    for run in np.split(ids, breaks) if len(ids) else ():
      for first, last in self.ranges(int(run[0]), int(run[-1]) + 1):
        piece = self.fetch_range(first, last)
        yield from map(piece.payload, range(first, last))

  def read_header(self, shard: int, offset: int) -> bytes:
    """Reads the header of the record that starts at a byte of a shard."""
    return self._read(shard, offset, tfrecord.HEADER_BYTES)

  def path(self, shard: int) -> str:
    """Returns a shard's path."""
    return self._shards[shard].path(self._folder)

  def check_shard(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was first read."""
    self._read(shard, 0, 1)

  def prefetcher(
    self,
    sampler: EpochSampler,
    batch_shard: BatchShard,
    *,
    first_step: int,
    end_step: int | None,
  ) -> "WindowPrefetcher":
    """Returns the prefetcher of one worker's batches; see `record_reader.Shards`.

    Raises:
      errors.UsageError: The sampler does not shuffle blocks, its streams do not divide
        over the workers, or the memory does not hold the windows of one batch.
    """
    if not isinstance(sampler, BlockSampler):
      raise errors.UsageError(
        "--read_mode=stream with --shuffle_block=1 would send a request for every "
        "image; try --shuffle_block=256, or --read_mode=stage."
      )
    if sampler.streams % batch_shard.num_workers:
      raise errors.UsageError(
        f"--streams={sampler.streams} does not divide over "
        f"{batch_shard.num_workers} workers that --read_mode=stream; take a number of "
        "workers that divides it."
      )
    streams = sampler.streams // batch_shard.num_workers
    self._check_memory(sampler, streams)
    return WindowPrefetcher(
      self,
      sampler,
      steps=(first_step, end_step),
      streams=(batch_shard.worker * streams, (batch_shard.worker + 1) * streams),
      max_bytes=self._max_bytes,
      requests=self._requests,
    )

  def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides records [first, last) where a shard ends."""
    shard, last_shard = self._numbering.shards_of(np.array([first, last - 1])).tolist()
    ends = self._numbering.first_ids[shard + 1 : last_shard + 1]
    edges = [first, *np.unique(ends).tolist(), last]  # unique: shards may be empty
    return list(itertools.pairwise(edges))

  def fetch_range(self, first: int, last: int) -> Piece:
    """Reads records [first, last) of one shard, at least one, in one request.

    Raises:
      errors.DataError: The shard or its index is missing, not the manifest's, or was
        replaced since it was first read.
    """
    rows = self._index.rows_of(np.arange(first, last))
    (shard,) = self._numbering.shards_of(np.array([first])).tolist()
    start = int(rows["offset"].min())
    end = int((rows["offset"] + rows["length"]).max())
    return Piece(first, rows, start, self._read(shard, start, end - start))

  def prefetched(self, pieces: Mapping[int, Piece]) -> "PrefetchedRecords":
    """Returns a source that reads the records that are keys of `pieces` from them."""
    return PrefetchedRecords(self, pieces)

  def _read(self, shard: int, start: int, length: int) -> bytes:
    """Reads bytes of a shard; DataError if it is not, or no longer, the manifest's."""
    path = self._shards[shard].path(self._folder)
    if shard not in self._generations:
      with integrity.missing_is_named(path):
        size, token = storage.status(path)
      integrity.check_size(path, size, self._shards[shard].bytes)
      self._generations.setdefault(shard, token)
    return storage.read_range(path, start, length, generation=self._generations[shard])

  def _check_memory(self, sampler: BlockSampler, streams: int) -> None:
    """Raises UsageError if the memory does not hold two windows of each stream.

    A batch may span the end of one window and the start of the next in every stream.
    """
    window = sampler.shuffle_block * sampler.window_blocks
    needed = 2 * streams * min(window, sampler.num_records) * self.record_bytes
    needed *= _INDEX_FRACTION / (_INDEX_FRACTION - 1) / _MEGABYTE
    if needed > self._memory_mb:
      raise errors.UsageError(
        f"--stream_memory_mb={self._memory_mb} does not hold two windows a stream: "
        f"{streams} streams on this worker, {sampler.window_blocks} blocks of "
        f"{sampler.shuffle_block} records; try --stream_memory_mb="
        f"{int(needed) + 1}, fewer --streams or a smaller --shuffle_block."
      )


class PrefetchedRecords:
  """The records of a batch in memory; other records are read from the shards."""

  def __init__(self, shards: StreamedShards, pieces: Mapping[int, Piece]):
    self._shards, self._pieces = shards, pieces

  def locate(self, ids: np.ndarray) -> np.ndarray:
    """Returns the index's INDEX_DTYPE[n] for int64[n] record numbers."""
    numbers = ids.tolist()
    if not all(number in self._pieces for number in numbers):
      return self._shards.locate(ids)
    rows = b"".join(self._pieces[number].row(number) for number in numbers)
    return np.frombuffer(rows, shard_index.INDEX_DTYPE)

  def fetch(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields the bytes after each record's header: payload and CRC."""
    start = 0
    for is_here, run in itertools.groupby(ids.tolist(), self._pieces.__contains__):
      numbers = list(run)
      end = start + len(numbers)
      if is_here:
        yield from (self._pieces[number].payload(number) for number in numbers)
      else:
        yield from self._shards.fetch(ids[start:end], rows[start:end])
      start = end


class RangeReader(Protocol):
  """Reads ranges of neighbouring records, as `StreamedShards` does."""

  record_bytes: float

  def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides records [first, last) into ranges for one request each."""

  def fetch_range(self, first: int, last: int) -> Any:
    """Fetches one of these ranges."""

  def prefetched(self, pieces: Mapping[int, Any]) -> RecordSource:
    """Returns a source that reads the records that are keys of `pieces` from them."""


@dataclasses.dataclass
class _RequestedWindow:
  """A window: its parts by their first record, and the samples not yet read."""

  parts: dict[int, futures.Future]
  samples_left: int
  bytes: int


class WindowPrefetcher:
  """Fetches the windows of one worker's streams, each once an epoch, in bounded memory.

  Windows are requested in the order in which steps need them, while the memory has
  room, and always when a step needs them. Each is dropped after its last sample.
  Nothing is fetched twice if each batch is read once, in nearly rising order, from any
  number of threads. Reading a batch again costs new requests.
  """

  def __init__(
    self,
    reader: RangeReader,
    sampler: BlockSampler,
    *,
    steps: tuple[int, int | None],
    streams: tuple[int, int],
    max_bytes: int,
    requests: int,
  ):
    """Starts to fetch at once.

    Args:
      reader: Fetches the ranges.
      sampler: The order of training.
      steps: The first step, and the one at which training ends, or None.
      streams: The first stream of this worker, and one past its last.
      max_bytes: Bytes of all windows in memory.
      requests: Requests at a time.
    """
    self._reader, self._sampler = reader, sampler
    self._step, self._max_bytes = steps[0], max_bytes
    self._end_step = math.inf if steps[1] is None else steps[1]
    self._epoch_steps = sampler.num_records // sampler.global_batch
    self._upcoming = sampler.windows(steps[0], *streams)
    self._next = next(self._upcoming)
    self._windows: dict[int, _RequestedWindow] = {}
    self._bytes = 0
    self._lock = threading.Lock()
    self._workers = _Workers(
      requests, when_done=functools.partial(_fetch_more_of, weakref.ref(self))
    )
    with self._lock:
      self._request_next()

  @contextlib.contextmanager
  def batch(self, positions: np.ndarray, records: np.ndarray) -> Iterator[RecordSource]:
    """Waits for a batch's records; yields a source that holds them in memory.

    Args:
      positions: int64[batch], of one step, in the stream of batches.
      records: int64[batch], the sampler's records at these positions.

    Raises:
      errors.DataError: One of them could not be read.
    """
    keys = self._sampler.keys_at(positions).tolist()
    with self._lock:
      self._request_until(int(positions[-1]) // self._sampler.global_batch)
    try:
      yield self._reader.prefetched(self._pieces(keys, records.tolist()))
    finally:
      with self._lock:
        self._release(collections.Counter(keys))
        self._request_next()

  def _pieces(self, keys: list[int], records: list[int]) -> dict[int, Any]:
    """Waits for the windows of these keys; returns their parts by record."""
    with self._lock:
      windows = {key: self._windows[key] for key in set(keys) if key in self._windows}
    return {
      record: _piece_of(windows[key], record)
      for key, record in zip(keys, records, strict=True)
      if key in windows
    }

  def fetch_more(self) -> None:
    """Requests further windows if the memory has room."""
    with self._lock:
      self._request_next()

  def _request_until(self, step: int) -> None:
    """Requests every window of a step, even if the memory is full."""
    self._step = max(self._step, step)
    while self._next.first_step <= step:
      self._request(self._next)

  def _request_next(self) -> None:
    """Requests windows while there is room, at most an epoch ahead.

    The queue is kept short, so that an urgent request starts soon.
    """
    while (
      self._next.first_step < self._end_step
      and self._next.first_step <= self._step + self._epoch_steps
      and self._bytes + self._bytes_of(self._next) <= self._max_bytes
      and self._workers.has_room
    ):
      self._request(self._next)

  def _request(self, window: Window) -> None:
    """Requests a window, and computes the next one."""
    parts = {
      first: self._workers.submit(self._reader.fetch_range, first, last)
      for run in window.runs.tolist()
      for first, last in self._reader.ranges(*run)
    }
    held = _RequestedWindow(parts, window.num_samples, self._bytes_of(window))
    self._windows[window.key] = held
    self._bytes += held.bytes
    self._next = next(self._upcoming)

  def _release(self, samples: collections.Counter[int]) -> None:
    """Drops windows whose samples were all read."""
    for key, count in samples.items():
      held = self._windows.get(key)
      if held is not None:
        held.samples_left -= count
        if held.samples_left <= 0:
          self._bytes -= self._windows.pop(key).bytes

  def _bytes_of(self, window: Window) -> int:
    """Estimates a window's bytes: its index may not be loaded yet."""
    return int(window.num_records * self._reader.record_bytes)


def _fetch_more_of(
  prefetcher: weakref.ref[WindowPrefetcher], done: futures.Future
) -> None:
  """Requests more after a request is done, if the prefetcher still exists."""
  if (alive := prefetcher()) is not None:
    alive.fetch_more()


def _piece_of(held: _RequestedWindow, record: int) -> Any:
  """Waits for the part of a window that holds a record."""
  first = max(first for first in held.parts if first <= record)
  return held.parts[first].result()


class _Workers:
  """Threads that do not keep the process alive, unlike those of an executor.

  An executor ends only when all of its jobs are done, so a run that ends or fails would
  wait for its prefetches.
  """

  def __init__(self, count: int, *, when_done: Callable[[futures.Future], None]):
    """Starts the threads, which call `when_done` after each job."""
    self._count, self._when_done = count, when_done
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(count):
      threading.Thread(target=_work, args=(self._jobs,), daemon=True).start()
    weakref.finalize(self, _stop, self._jobs, count).atexit = False

  @property
  def has_room(self) -> bool:
    """Says whether fewer jobs wait than there are threads."""
    return self._jobs.qsize() < self._count

  def submit(self, function: Any, *arguments: Any) -> futures.Future:
    """Calls the function in one of the threads, in the order of submission."""
    result: futures.Future = futures.Future()
    result.add_done_callback(self._when_done)
    self._jobs.put((result, function, arguments))
    return result


def _work(jobs: queue.SimpleQueue) -> None:
  """Does jobs until it finds a None."""
  while (job := jobs.get()) is not None:
    result, function, arguments = job
    try:
      result.set_result(function(*arguments))
    except Exception as error:  # raised where the result is read
      result.set_exception(error)
    del job, result, function, arguments  # they would otherwise live until the next job


def _stop(jobs: queue.SimpleQueue, count: int) -> None:
  """Drops the waiting jobs, and ends the threads."""
  with contextlib.suppress(queue.Empty):
    while True:
      jobs.get_nowait()
  for _ in range(count):
    jobs.put(None)
