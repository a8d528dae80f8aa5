"""Fetches shards to the cache in the background, in the order in which steps need them.

`prefetch_order` computes that order from the sampler; `ShardFetcher` fetches in it. A
set that fits into the cache is fetched whole, the shards of the first steps first, and
stays. Of a larger set the shards of the next steps are fetched while there is room, and
released after their steps, which `ShardFetcher.reached` reports. A shard stays in the
cache while a reader holds its file.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from facedist import errors
from facedist.data.cache import shard_cache
from facedist.data.cache.shard_cache import FetchStoppedError, Remote, ShardCache
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.shards import open_files
from facedist.data.shards.open_files import OpenFile

_RANGE_SAMPLES = 512  # fewer would cost more processor time


@dataclasses.dataclass(frozen=True)
class StepRange:
  """Consecutive steps of one worker, and the shards that they need.

  Attributes:
    first_step: The first of them.
    end_step: The step after the last.
    samples: Samples that the worker reads in them.
    shards: Numbers of these samples' shards, in the order of first need.
  """

  first_step: int
  end_step: int
  samples: int
  shards: tuple[int, ...]

  def moved(self, first: int) -> "StepRange":
    """Returns the range with `first` added to the numbers of its shards."""
    shards = tuple(first + shard for shard in self.shards)
    return dataclasses.replace(self, shards=shards)


def prefetch_order(
  sampler: EpochSampler,
  first_ids: np.ndarray,
  *,
  start_step: int,
  worker: int,
  num_workers: int,
) -> Iterator[StepRange]:
  """Yields the shards that a worker needs from `start_step` on, without end.

  Args:
    sampler: Which records make up which step.
    first_ids: int64[shards + 1], the first record of each shard, then their number.
    start_step: The first step.
    worker: The worker's number, from 0.
    num_workers: Workers that share each global batch evenly.
  """
  batch = max(1, sampler.global_batch // num_workers)  # `BatchShard` checks it
  length = max(1, _RANGE_SAMPLES // batch)
  places = worker * batch + np.arange(batch)
  while True:
    steps = np.arange(start_step, start_step + length)
    positions = steps[:, None] * sampler.global_batch + places
    records = sampler.samples_at(positions.ravel()).records
    shards = np.searchsorted(first_ids, records, side="right") - 1
    found, first_seen = np.unique(shards, return_index=True)
    in_order = tuple(found[np.argsort(first_seen)].tolist())
    yield StepRange(start_step, start_step + length, len(records), in_order)
    start_step += length


def sequential_order(first_ids: np.ndarray) -> Iterator[StepRange]:
  """Yields each shard alone, in order; here a step is a record.

  Args:
    first_ids: int64[shards + 1], the first record of each shard, then their number.
  """
  for shard, (first, end) in enumerate(itertools.pairwise(first_ids.tolist())):
    yield StepRange(first, end, end - first, (shard,))


def count_fetched(
  coming: Iterable[StepRange], sizes: Sequence[int], *, room: int
) -> tuple[int, int]:
  """Simulates a cache that evicts the least recently used shard; counts its fetches.

  Args:
    coming: The ranges of steps to go through.
    sizes: Bytes of each shard.
    room: Bytes of the cache.

  Returns:
    Bytes fetched, and samples read.
  """
  kept: collections.OrderedDict[int, None] = collections.OrderedDict()
  total = used = samples = 0
  for steps in coming:
    samples += steps.samples
    for shard in steps.shards:
      if shard in kept:
        kept.move_to_end(shard)
        continue
      total += sizes[shard]
      used += sizes[shard]
      kept[shard] = None
      while used > room and len(kept) > 1:
        used -= sizes[kept.popitem(last=False)[0]]
  return total, samples


_THREADS = 8
_TICK_SECONDS = 0.25
_ROOM_TIMEOUT_SECONDS = 120.0  # for other processes to make room
_JOIN_SECONDS = 2.0
_RANGES_AHEAD = 64
_LATE_STEPS = 8  # steps that threads may still read when a later one has begun
_PREFETCH_FRACTION = 0.9  # of the cache; the rest is for single reads


class ShardFetcher:
  """The shards of a set as open files of the cache; safe from many threads.

  Args:
    cache: Where the copies go.
    shards: All shards of the set; their places in this list are their numbers.
    check_unchanged: Raises DataError if the set was replaced since it was opened.
    keep: Whether a set that fits into the cache is fetched whole and stays.
  """

  def __init__(
    self,
    cache: ShardCache,
    shards: Sequence[Remote],
    *,
    check_unchanged: Callable[[], None],
    keep: bool = True,
  ) -> None:
    self.shards = shards
    self.total_bytes = sum(shard.size for shard in shards)
    limit = self.total_bytes if cache.limit_bytes is None else cache.limit_bytes
    self.is_whole = keep and self.total_bytes <= limit
    open_files.allow(len(shards))
    largest = max((shard.size for shard in shards), default=0)
    self._room = _PREFETCH_FRACTION * limit - largest  # for prefetching
    self._cache = cache
    self._check_unchanged = check_unchanged
    self._state = threading.Condition()
    self._stop = threading.Event()
    self._threads: list[threading.Thread] = []
    self._error: BaseException | None = None
    self._files: list[OpenFile | None] = [None] * len(shards)
    self._busy: set[int] = set()  # shards that a thread is fetching
    self._urgent: dict[int, None] = {}  # shards that a read waits for, in order
    self._queue = collections.deque(range(len(shards)) if self.is_whole else ())
    self._coming: Iterator[StepRange] = iter(())
    self._window: collections.deque[StepRange] = collections.deque()
    self._needed: collections.Counter[int] = collections.Counter()  # by the window

  def follow(self, coming: Iterator[StepRange]) -> None:
    """Fetches the shards of these ranges from now on, in their order."""
    with self._state:
      if self.is_whole:
        first = itertools.islice(coming, _RANGES_AHEAD)
        wanted = itertools.chain.from_iterable(steps.shards for steps in first)
        self._queue = collections.deque(dict.fromkeys([*wanted, *self._queue]))
      else:
        for begun in (self._window, self._needed, self._queue):
          begun.clear()
        self._coming = coming
    self._start()

  def reached(self, step: int) -> None:
    """Reports that this step is being read."""
    if self.is_whole:
      return
    with self._state:
      while self._window and self._window[0].end_step + _LATE_STEPS <= step:
        for shard in self._window.popleft().shards:
          self._needed[shard] -= 1
          if not self._needed[shard]:
            self._files[shard] = None
      for steps in itertools.islice(
        self._window, 2
      ):  # those that were released for lack of room
        self._queue.extend(n for n in steps.shards if self._files[n] is None)
      self._state.notify_all()

  def get(self, shard: int) -> OpenFile:
    """Waits for a shard; returns it, open and in the cache while it is held.

    Raises:
      errors.DataError: It cannot be fetched.
    """
    found = self._files[shard]  # without a lock, which would cost every record
    if found is not None:
      return found
    self._start()
    with self._state:
      while (found := self._files[shard]) is None:
        if self._error is not None:
          raise self._error
        if self._stop.is_set():
          raise errors.FacedistError("reading was stopped while a shard was awaited.")
        self._urgent[shard] = None
        self._state.notify_all()
        self._state.wait(_TICK_SECONDS)
      return found

  def discard(self, shard: int, file: OpenFile) -> None:
    """Removes a corrupt copy `file` of a shard from the cache."""
    self._cache.discard(self.shards[shard], file)

  def close(self) -> None:
    """Stops fetching and releases all shards; reads that wait end with an error."""
    self._stop.set()
    with self._state:
      self._state.notify_all()
    for thread in self._threads:
      thread.join(_JOIN_SECONDS)  # one that waits for a bucket ends with the process
    self._files = [None] * len(self.shards)

  def _start(self) -> None:
    """Starts the threads, once."""
    with self._state:
      if self._threads or self._stop.is_set():
        return
      self._threads = [
        threading.Thread(target=self._work, name=f"stage-{number}", daemon=True)
        for number in range(min(_THREADS, len(self.shards)))
      ]
      for thread in self._threads:
        thread.start()

  def _work(self) -> None:
    """Fetches shards until stopped; an error ends all threads."""
    try:
      self._fetch_all()
    except FetchStoppedError:
      pass
    except BaseException as error:  # raised in the waiting reads
      with self._state:
        self._error = error
        self._stop.set()
        self._state.notify_all()

  def _fetch_all(self) -> None:
    """Fetches shards until stopped, or until all are in the cache to stay."""
    try:
      while not self._stop.is_set():
        with self._state:
          shard = self._pick()
          if shard is not None:
            self._busy.add(shard)
          elif self.is_whole and not self._busy:
            return  # all are in the cache, and stay
          else:
            self._state.wait(_TICK_SECONDS)
        if shard is not None:
          self._fetch(shard)
    except errors.DataError:
      self._check_unchanged()  # raises the real reason if the set was replaced
      raise

  def _pick(self) -> int | None:
    """Returns the next shard to fetch, or None; those that reads wait for first."""
    while self._may_extend_window():
      steps = next(self._coming, None)
      if steps is None:
        break
      self._window.append(steps)
      self._needed.update(steps.shards)
      self._queue.extend(steps.shards)
    for shard in self._urgent:
      if shard not in self._busy:
        return shard
    while self._queue:
      shard = self._queue.popleft()
      if self._files[shard] is None and shard not in self._busy:
        return shard
    return None

  def _may_extend_window(self) -> bool:
    """Says whether the window may get another range; only if the set does not fit."""
    if self.is_whole or self._queue or len(self._window) >= _RANGES_AHEAD:
      return False
    needed = sum(self.shards[shard].size for shard in +self._needed)
    return needed < self._room or len(self._window) < 2

  def _fetch(self, shard: int) -> None:
    """Fetches and opens a shard; waits for room only if a read waits for the shard."""
    begun = time.monotonic()
    file: OpenFile | None = None
    while file is None:
      try:
        file = self._cache.acquire(self.shards[shard], stop=self._stop)
      except shard_cache.NoRoomError:
        if shard not in self._urgent:
          break
        if self._release_one():
          continue
        if time.monotonic() > begun + _ROOM_TIMEOUT_SECONDS:
          raise
        if self._stop.wait(_TICK_SECONDS):
          break
    with self._state:
      self._busy.discard(shard)
      if file is None:
        self._queue.append(shard)
        self._state.wait(_TICK_SECONDS)
        return
      self._urgent.pop(shard, None)
      self._files[shard] = file
      self._state.notify_all()

  def _release_one(self) -> bool:
    """Releases the shard that is needed last; returns whether there was one."""
    with self._state:
      if self.is_whole:
        return False
      here = [shard for shard, file in enumerate(self._files) if file is not None]
      spare = [shard for shard in here if not self._needed[shard]]
      spare += [shard for part in reversed(self._window) for shard in part.shards[::-1]]
      for shard in spare:
        if self._files[shard] is not None:
          self._files[shard] = None
          return True
      return False
