"""Reads what an order of blocks will ask for: in parallel, each window once."""

import collections
import contextlib
import dataclasses
import functools
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from facedist.data.block_order import BlockOrder, Window


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
    sample_order: BlockOrder,
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
