"""Which shards the coming steps need, in the order in which they need them.

Brings shards to the cache in the background, in the order in which they are needed.

A set that fits into the cache comes whole, what the first steps need first, and stays.
Of a larger one, the shards of the coming steps are fetched as far as there is room, and
let go when their steps are over; `ShardFetcher.reached` tells how far training is.
A file is held by those that read it too, so none goes while it is read.
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
from facedist.data.cache.shard_cache import Remote, ShardCache, StoppedError
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.shards import open_files
from facedist.data.shards.open_files import OpenFile

_STRETCH_SAMPLES = 512  # fewer would cost more of the processor


@dataclasses.dataclass(frozen=True)
class Stretch:
  """Some neighbouring steps of one worker.

  Attributes:
    first_step: The first of them.
    end_step: The step after the last.
    samples: Samples that the worker reads in them.
    shards: Numbers of the shards that these lie in, in the order of first need.
  """

  first_step: int
  end_step: int
  samples: int
  shards: tuple[int, ...]

  def moved(self, first: int) -> "Stretch":
    """Returns it with shards numbered from `first` on instead of 0."""
    shards = tuple(first + shard for shard in self.shards)
    return dataclasses.replace(self, shards=shards)


def stretches(
  order: EpochSampler,
  first_ids: np.ndarray,
  *,
  start_step: int,
  worker: int,
  num_workers: int,
) -> Iterator[Stretch]:
  """Yields what a worker needs from `start_step` on, without end.

  Args:
    order: Which records make up which step.
    first_ids: int64[shards + 1], the first record of each shard, then their number.
    start_step: The first step.
    worker: The worker's number, from 0.
    num_workers: Workers that share each global batch evenly.
  """
  share = max(1, order.global_batch // num_workers)  # the data set refuses less
  length = max(1, _STRETCH_SAMPLES // share)
  places = worker * share + np.arange(share)
  while True:
    steps = np.arange(start_step, start_step + length)
    positions = steps[:, None] * order.global_batch + places
    records = order.samples_at(positions.ravel()).records
    shards = np.searchsorted(first_ids, records, side="right") - 1
    found, first_seen = np.unique(shards, return_index=True)
    in_order = tuple(found[np.argsort(first_seen)].tolist())
    yield Stretch(start_step, start_step + length, len(records), in_order)
    start_step += length


def one_by_one(first_ids: np.ndarray) -> Iterator[Stretch]:
  """Yields each shard by itself, in order; a step is a record.

  Args:
    first_ids: int64[shards + 1], the first record of each shard, then their number.
  """
  for shard, (first, end) in enumerate(itertools.pairwise(first_ids.tolist())):
    yield Stretch(first, end, end - first, (shard,))


def fetched(
  coming: Iterable[Stretch], sizes: Sequence[int], *, room: int
) -> tuple[int, int]:
  """Counts what is fetched where the shards used last are kept while there is room.

  Args:
    coming: The stretches to go through.
    sizes: Bytes of each shard.
    room: Bytes of the shards that are kept.

  Returns:
    Bytes fetched, and samples read.
  """
  kept: collections.OrderedDict[int, None] = collections.OrderedDict()
  total = used = samples = 0
  for stretch in coming:
    samples += stretch.samples
    for shard in stretch.shards:
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
_STRETCHES_AHEAD = 64
_LATE_STEPS = 8  # that threads may still be reading when a later one has begun
_SHARE_OF_CACHE = 0.9  # for the coming steps; the rest is for single reads


class ShardFetcher:
  """The shards of a set as open files of the cache; safe from many threads.

  Args:
    cache: Where they go.
    shards: All shards of the set; their places in this list are their numbers.
    check_unchanged: Raises DataError if the set was replaced since it was opened.
    keep: Whether a set that fits into the cache comes whole and stays.
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
    self._room = _SHARE_OF_CACHE * limit - largest  # for what comes next
    self._cache = cache
    self._check_unchanged = check_unchanged
    self._state = threading.Condition()
    self._stop = threading.Event()
    self._threads: list[threading.Thread] = []
    self._error: BaseException | None = None
    self._files: list[OpenFile | None] = [None] * len(shards)
    self._busy: set[int] = set()  # those that a thread is at
    self._urgent: dict[int, None] = {}  # those that a read waits for, in order
    self._queue = collections.deque(range(len(shards)) if self.is_whole else ())
    self._coming: Iterator[Stretch] = iter(())
    self._window: collections.deque[Stretch] = collections.deque()
    self._needed: collections.Counter[int] = collections.Counter()  # by the window

  def follow(self, coming: Iterator[Stretch]) -> None:
    """Fetches from now on what these stretches need, in their order."""
    with self._state:
      if self.is_whole:
        first = itertools.islice(coming, _STRETCHES_AHEAD)
        wanted = itertools.chain.from_iterable(stretch.shards for stretch in first)
        self._queue = collections.deque(dict.fromkeys([*wanted, *self._queue]))
      else:
        for begun in (self._window, self._needed, self._queue):
          begun.clear()
        self._coming = coming
    self._start()

  def reached(self, step: int) -> None:
    """Tells that `step` of the stretches followed is being read."""
    if self.is_whole:
      return
    with self._state:
      while self._window and self._window[0].end_step + _LATE_STEPS <= step:
        for shard in self._window.popleft().shards:
          self._needed[shard] -= 1
          if not self._needed[shard]:
            self._files[shard] = None
      for stretch in itertools.islice(self._window, 2):  # some had to be given up
        self._queue.extend(n for n in stretch.shards if self._files[n] is None)
      self._state.notify_all()

  def get(self, shard: int) -> OpenFile:
    """Waits for a shard; returns it, open and kept for as long as it is held.

    Raises:
      errors.DataError: It cannot be brought.
    """
    found = self._files[shard]  # at once: a lock here would cost every record
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
    """Stops fetching and lets go of all shards; reads that wait end with an error."""
    self._stop.set()
    with self._state:
      self._state.notify_all()
    for thread in self._threads:
      thread.join(_JOIN_SECONDS)  # one that waits for a bucket goes with the process
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
    """Fetches shard after shard until told to stop; an error ends all threads."""
    try:
      self._fetch_all()
    except StoppedError:
      pass
    except BaseException as error:  # handed to the readers, which wait for it
      with self._state:
        self._error = error
        self._stop.set()
        self._state.notify_all()

  def _fetch_all(self) -> None:
    """Fetches shard after shard until told to stop, or all are there to stay."""
    try:
      while not self._stop.is_set():
        with self._state:
          shard = self._pick()
          if shard is not None:
            self._busy.add(shard)
          elif self.is_whole and not self._busy:
            return  # all are there, and stay
          else:
            self._state.wait(_TICK_SECONDS)
        if shard is not None:
          self._bring(shard)
    except errors.DataError:
      self._check_unchanged()  # says more, if that is why
      raise

  def _pick(self) -> int | None:
    """Returns the next shard to fetch, if any: those that reads wait for first."""
    while self._may_look_further():
      stretch = next(self._coming, None)
      if stretch is None:
        break
      self._window.append(stretch)
      self._needed.update(stretch.shards)
      self._queue.extend(stretch.shards)
    for shard in self._urgent:
      if shard not in self._busy:
        return shard
    while self._queue:
      shard = self._queue.popleft()
      if self._files[shard] is None and shard not in self._busy:
        return shard
    return None

  def _may_look_further(self) -> bool:
    """Says whether another stretch of a set that does not fit may be begun."""
    if self.is_whole or self._queue or len(self._window) >= _STRETCHES_AHEAD:
      return False
    needed = sum(self.shards[shard].size for shard in +self._needed)
    return needed < self._room or len(self._window) < 2

  def _bring(self, shard: int) -> None:
    """Fetches and opens a shard; where there is no room, only a read waits for it."""
    begun = time.monotonic()
    file: OpenFile | None = None
    while file is None:
      try:
        file = self._cache.acquire(self.shards[shard], stop=self._stop)
      except shard_cache.NoRoomError:
        if shard not in self._urgent:
          break
        if self._give_one_up():
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

  def _give_one_up(self) -> bool:
    """Lets go of the shard that is needed last; says whether there was any."""
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
