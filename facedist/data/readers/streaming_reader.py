"""Reads what an order of blocks will ask for: in parallel, each window once.

Records by number, from shards that stay where they are, a bucket or a disk.

Neighbouring records come in one request. Where the order of training is known
(`StreamReader.ahead`), they come ahead of time, each once an epoch.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from facedist import errors, storage
from facedist.data.readers.local_reader import RecordReader
from facedist.data.samplers.block_sampler import BlockSampler, Window
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest, shard_index, tfrecord


class PieceReader(Protocol):
  """What reads runs of neighbouring records; `stream_reader.StreamReader`."""

  record_bytes: float

  def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides records [first, last) into what one request can bring."""

  def fetch(self, first: int, last: int) -> Any:
    """Returns such a part."""

  def at_hand(self, pieces: dict[int, Any]) -> contextlib.AbstractContextManager[None]:
    """Lets this thread read the records of `pieces`, by number, from there."""


@dataclasses.dataclass
class _Held:
  """A window that was asked for: its parts by their first record, and what is left."""

  parts: dict[int, futures.Future]
  samples_left: int
  bytes: int


class ReadAhead:
  """Holds the windows of one worker's streams while they are in use, and the next ones.

  A window is fetched when the memory has room for it or when it is needed, which comes
  first. Windows come in the order in which they are needed, so what is held is never of
  less use than what waits. One is given up with its last sample. So nothing is fetched
  twice where each batch is asked for once, in nearly rising order, from any number of
  threads; batches asked for otherwise are right, and cost requests of their own.
  """

  def __init__(
    self,
    reader: PieceReader,
    sample_order: BlockSampler,
    *,
    steps: tuple[int, int | None],
    streams: tuple[int, int],
    most_bytes: int,
    requests: int,
  ):
    """Starts to read at once.

    Args:
      reader: Fetches.
      sample_order: Says what will be needed.
      steps: The first step, and the one at which training ends, if it does.
      streams: The first stream of this worker, and one past its last.
      most_bytes: What the windows held may add up to.
      requests: How many requests are under way at a time.
    """
    self._reader, self._order = reader, sample_order
    self._step, self._most_bytes = steps[0], most_bytes
    self._end_step = math.inf if steps[1] is None else steps[1]
    self._epoch_steps = sample_order.num_records // sample_order.global_batch
    self._coming = sample_order.windows(steps[0], *streams)
    self._next = next(self._coming)
    self._held: dict[int, _Held] = {}
    self._bytes = 0
    self._lock = threading.Lock()
    self._workers = _Workers(
      requests, when_done=functools.partial(_go_on, weakref.ref(self))
    )
    with self._lock:
      self._read_ahead()

  @contextlib.contextmanager
  def batch(self, positions: np.ndarray, records: np.ndarray) -> Iterator[None]:
    """Brings a batch's records; in the body, this thread reads them from memory.

    Args:
      positions: int64[batch], of one step, in the stream of batches.
      records: int64[batch], the order's records at these positions.

    Raises:
      errors.DataError: One of them could not be read.
    """
    keys = self._order.keys_at(positions).tolist()
    with self._lock:
      self._read_until(int(positions[-1]) // self._order.global_batch)
    try:
      with self._reader.at_hand(self._pieces(keys, records.tolist())):
        yield
    finally:
      with self._lock:
        self._release(collections.Counter(keys))
        self._read_ahead()

  def _pieces(self, keys: list[int], records: list[int]) -> dict[int, Any]:
    """Returns by record the parts of the windows of these keys, once they are there."""
    with self._lock:
      windows = {key: self._held[key] for key in set(keys) if key in self._held}
    return {
      record: _piece_of(windows[key], record)
      for key, record in zip(keys, records, strict=True)
      if key in windows
    }

  def read_on(self) -> None:
    """Reads further ahead, where the memory has room."""
    with self._lock:
      self._read_ahead()

  def _read_until(self, step: int) -> None:
    """Asks for all that a step needs, whatever the memory."""
    self._step = max(self._step, step)
    while self._next.first_step <= step:
      self._ask(self._next)

  def _read_ahead(self) -> None:
    """Asks for windows as long as there is room, and an epoch ahead at most.

    Only so many requests wait for their turn that what is needed at once soon has its.
    """
    while (
      self._next.first_step < self._end_step
      and self._next.first_step <= self._step + self._epoch_steps
      and self._bytes + self._bytes_of(self._next) <= self._most_bytes
      and self._workers.has_room
    ):
      self._ask(self._next)

  def _ask(self, window: Window) -> None:
    """Asks for a window, and looks at the one that comes then."""
    parts = {
      first: self._workers.submit(self._reader.fetch, first, last)
      for run in window.runs.tolist()
      for first, last in self._reader.pieces(*run)
    }
    held = _Held(parts, window.num_samples, self._bytes_of(window))
    self._held[window.key] = held
    self._bytes += held.bytes
    self._next = next(self._coming)

  def _release(self, samples: collections.Counter[int]) -> None:
    """Gives up windows whose samples were all read."""
    for key, count in samples.items():
      held = self._held.get(key)
      if held is not None:
        held.samples_left -= count
        if held.samples_left <= 0:
          self._bytes -= self._held.pop(key).bytes

  def _bytes_of(self, window: Window) -> int:
    """Returns a window's bytes, nearly: its index may not be there yet."""
    return int(window.num_records * self._reader.record_bytes)


def _go_on(ahead: weakref.ref[ReadAhead], done: futures.Future) -> None:
  """Reads further ahead after a request, if anybody still wants that."""
  if (alive := ahead()) is not None:
    alive.read_on()


def _piece_of(held: _Held, record: int) -> Any:
  """Returns the part of a window that holds a record, once it is there."""
  first = max(first for first in held.parts if first <= record)
  return held.parts[first].result()


class _Workers:
  """Threads that do not keep the process alive, unlike those of an executor.

  An executor ends only when all that was submitted is done: a run that is over, or that
  failed, would wait for what it read ahead.
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
    except Exception as error:  # whoever asks for the result gets it
      result.set_exception(error)
    del job, result, function, arguments  # or they would live until the next job


def _stop(jobs: queue.SimpleQueue, count: int) -> None:
  """Drops the jobs that wait, and ends the threads."""
  with contextlib.suppress(queue.Empty):
    while True:
      jobs.get_nowait()
  for _ in range(count):
    jobs.put(None)


_INDEX_SHARE = 8  # of the memory, one part in so many is for the index
_MEGABYTE = 1 << 20


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
    """Returns what stands behind a record's header: payload and CRC."""
    row = self.rows[record - self.first]
    start = int(row["offset"]) - self.start
    return self.content[start + tfrecord.HEADER_BYTES : start + int(row["length"])]


class StreamedSet:
  """A set of shards that are read where they are; nothing is brought here.

  Attributes:
    folder: Where they are.
  """

  def __init__(self, folder: str):
    """Looks at nothing yet."""
    self.folder = folder

  def __enter__(self) -> "StreamedSet":
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def follow(
    self,
    split: str,
    order: EpochSampler,
    *,
    start_step: int,
    worker: int,
    num_workers: int,
  ) -> None:
    """Does nothing: `StreamReader.ahead` fetches what steps need."""

  def reached(self, step: int) -> None:
    """Does nothing."""


class StreamReader(RecordReader):
  """Reads records by ranges of their shards; nothing is kept on a disk.

  Attributes:
    record_bytes: Bytes of a record, nearly.
  """

  def __init__(
    self,
    folder: str,
    split: str,
    *,
    verify_crc: bool = True,
    memory_mb: int = 1024,
    requests: int = 16,
  ):
    """Reads the manifest; shards and their indexes are looked at when needed.

    Args:
      folder: A folder with a manifest, local or gs://.
      split: 'train', 'val' or 'images'.
      verify_crc: Whether to check the CRC of each record read.
      memory_mb: MiB for what is read ahead and for the index.
      requests: How many requests are under way at a time.

    Raises:
      errors.DataError: There is no manifest, or no such split in it.
    """
    index_bytes = memory_mb * _MEGABYTE // _INDEX_SHARE
    super().__init__(
      folder,
      manifest.load(folder),
      split,
      index_of=lambda *where: shard_index.CachedIndex(*where, most_bytes=index_bytes),
      verify_crc=verify_crc,
    )
    self._memory_mb, self._requests = memory_mb, requests
    self._most_bytes = memory_mb * _MEGABYTE - index_bytes
    # On average in the shard whose records are the largest.
    self.record_bytes = max(
      shard.bytes / max(1, shard.records) for shard in self._shards
    )
    self._generations: dict[int, str] = {}
    self._at_hand = threading.local()

  def ahead(
    self,
    sample_order: EpochSampler,
    share: BatchShard,
    *,
    first_step: int,
    end_step: int | None,
  ) -> ReadAhead:
    """Returns what reads ahead, for one worker, of training from a step on.

    Raises:
      errors.UsageError: The order is not one of blocks, its streams do not divide over
        the workers, or the memory does not hold what is in use at one time.
    """
    if not isinstance(sample_order, BlockSampler):
      raise errors.UsageError(
        "--read_mode=stream with --shuffle_block=1 would ask for every image by "
        "itself; try --shuffle_block=256, or --read_mode=stage."
      )
    if sample_order.streams % share.num_workers:
      raise errors.UsageError(
        f"--streams={sample_order.streams} does not divide over "
        f"{share.num_workers} workers that --read_mode=stream; take a number of "
        "workers that divides it."
      )
    streams = sample_order.streams // share.num_workers
    self._check_memory(sample_order, streams)
    return ReadAhead(
      self,
      sample_order,
      steps=(first_step, end_step),
      streams=(share.worker * streams, (share.worker + 1) * streams),
      most_bytes=self._most_bytes,
      requests=self._requests,
    )

  def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides records [first, last) where a shard ends."""
    shard, last_shard = self._numbering.shards_of(np.array([first, last - 1])).tolist()
    ends = self._numbering.first_ids[shard + 1 : last_shard + 1]
    edges = [first, *np.unique(ends).tolist(), last]  # empty shards end where others do
    return list(itertools.pairwise(edges))

  def fetch(self, first: int, last: int) -> Piece:
    """Reads records [first, last) of one shard, at least one, in one request.

    Raises:
      errors.DataError: The shard or its index is missing, not the manifest's, or was
        replaced since it was first read.
    """
    rows = self._index.rows_of(np.arange(first, last))
    (shard,) = self._numbering.shards_of(np.array([first])).tolist()
    start = int(rows["offset"].min())
    end = int((rows["offset"] + rows["length"]).max())
    return Piece(first, rows, start, self._range(shard, start, end - start))

  @contextlib.contextmanager
  def at_hand(self, pieces: Mapping[int, Piece]) -> Iterator[None]:
    """Lets this thread read the records of `pieces`, by number, from there."""
    self._at_hand.pieces = pieces
    try:
      yield
    finally:
      del self._at_hand.pieces

  def _rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    pieces = getattr(self._at_hand, "pieces", {})
    numbers = ids.tolist()
    if not all(number in pieces for number in numbers):
      return super()._rows_of(ids)
    rows = b"".join(pieces[number].row(number) for number in numbers)
    return np.frombuffer(rows, shard_index.INDEX_DTYPE)

  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""
    pieces = getattr(self._at_hand, "pieces", {})
    numbers = ids.tolist()
    place = 0
    while place < len(numbers):
      if (piece := pieces.get(numbers[place])) is not None:
        yield piece.payload(numbers[place])
        place += 1
        continue
      end = place + 1
      while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
        end += 1
      for first, last in self.pieces(numbers[place], numbers[end - 1] + 1):
        piece = self.fetch(first, last)
        yield from map(piece.payload, range(first, last))
      place = end

  def _header(self, shard: int, offset: int) -> bytes:
    """Reads the header of a record."""
    return self._range(shard, offset, tfrecord.HEADER_BYTES)

  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was first read."""
    self._range(shard, 0, 1)

  def _range(self, shard: int, start: int, length: int) -> bytes:
    """Reads bytes of a shard; DataError unless it is, and stays, the manifest's."""
    path = self._shards[shard].path(self.folder)
    if shard not in self._generations:
      with integrity.missing_is_named(path):
        size, token = storage.status(path)
      integrity.check_size(path, size, self._shards[shard].bytes)
      self._generations.setdefault(shard, token)
    return storage.read_range(path, start, length, generation=self._generations[shard])

  def _check_memory(self, sample_order: BlockSampler, streams: int) -> None:
    """Refuses a memory that does not hold two windows of each stream.

    A batch may need the end of one and the start of the next, in all streams at once.
    """
    window = sample_order.shuffle_block * sample_order.window_blocks
    needed = 2 * streams * min(window, self.num_records) * self.record_bytes
    needed *= _INDEX_SHARE / (_INDEX_SHARE - 1) / _MEGABYTE
    if needed > self._memory_mb:
      raise errors.UsageError(
        f"--stream_memory_mb={self._memory_mb} does not hold two windows a stream: "
        f"{streams} streams on this worker, {sample_order.window_blocks} blocks of "
        f"{sample_order.shuffle_block} records; try --stream_memory_mb="
        f"{int(needed) + 1}, fewer --streams or a smaller --shuffle_block."
      )
