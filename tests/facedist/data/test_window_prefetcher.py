"""Prefetching windows: each once, in bounded memory, whatever is requested."""

import concurrent.futures
import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facedist import errors
from facedist.data.readers import streaming_reader
from facedist.data.samplers.block_sampler import BlockSampler

RECORD_BYTES = 100
ORDER = BlockSampler(400, 8, seed=0, shuffle_block=10, streams=4, window_blocks=2)


@dataclasses.dataclass(eq=False)
class Piece:
  """Stands for what a request brought; the reader knows when it is given up."""

  reader: "CountingReader"
  first: int
  last: int

  def __del__(self) -> None:
    self.reader.count(self, -1)


class CountingReader:
  """A reader of nothing that counts what is fetched and what is held."""

  record_bytes: float = RECORD_BYTES

  def __init__(self) -> None:
    self.fetched: list[int] = []
    self.held = self.max_held = 0
    self.broken: set[int] = set()
    self._lock = threading.Lock()

  def count(self, piece: Piece, sign: int) -> None:
    with self._lock:
      self.held += sign * (piece.last - piece.first)
      self.max_held = max(self.max_held, self.held)

  def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides at multiples of seven, as if shards were that short."""
    edges = [first, *range(first // 7 * 7 + 7, last, 7), last]
    return list(itertools.pairwise(edges))

  def fetch_range(self, first: int, last: int) -> Piece:
    if self.broken & set(range(first, last)):
      raise errors.DataError(f"record {first} is corrupt.")
    piece = Piece(self, first, last)
    self.count(piece, 1)
    with self._lock:
      self.fetched += range(first, last)
    return piece

  def prefetched(self, pieces: dict[int, Piece]) -> dict[int, Piece]:
    """Hands out what a source of records would be made of."""
    return pieces


def start(
  reader: CountingReader,
  sampler: BlockSampler = ORDER,
  *,
  first_step: int = 0,
  end_step: int | None = None,
  streams: tuple[int, int] | None = None,
  max_records: int = 0,
) -> streaming_reader.WindowPrefetcher:
  return streaming_reader.WindowPrefetcher(
    reader,
    sampler,
    steps=(first_step, end_step),
    streams=streams or (0, sampler.streams),
    max_bytes=max_records * RECORD_BYTES,
    requests=3,
  )


def missing_of(
  prefetcher: streaming_reader.WindowPrefetcher,
  step: int,
  sampler: BlockSampler = ORDER,
  *,
  streams: tuple[int, int] | None = None,
) -> set[int]:
  """Takes a batch; returns those of its records that were not prefetched."""
  first, last = streams or (0, sampler.streams)
  slice_size = sampler.global_batch // sampler.streams
  of_step = np.arange(first * slice_size, last * slice_size)
  positions = step * sampler.global_batch + of_step
  records = sampler.samples_at(positions).records
  with prefetcher.batch(positions, records) as pieces:
    return set(records.tolist()) - {
      record for record, piece in pieces.items() if piece.first <= record < piece.last
    }


@st.composite
def orders(draw: st.DrawFn) -> BlockSampler:
  streams = draw(st.sampled_from([1, 2, 4]))
  batch = streams * draw(st.integers(1, 4))
  return BlockSampler(
    num_records=batch * draw(st.integers(1, 20)),  # an epoch ends with a batch
    global_batch=batch,
    seed=draw(st.integers(0, 1000)),
    shuffle_block=draw(st.integers(1, 20)),
    streams=streams,
    window_blocks=draw(st.integers(1, 3)),
  )


def wait_until(is_true: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 30
  while not is_true():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@settings(max_examples=30)
@given(
  sampler=orders(),
  max_records=st.integers(0, 200),
  num_workers=st.sampled_from([1, 2, 4]),
  epochs=st.integers(1, 3),
)
def test_workers_together_fetch_each_record_once_an_epoch(
  sampler, max_records, num_workers, epochs
):
  num_workers = min(num_workers, sampler.streams)
  each = sampler.streams // num_workers
  end_step = epochs * sampler.num_records // sampler.global_batch
  fetched = []
  for worker in range(num_workers):
    streams = (worker * each, (worker + 1) * each)
    reader = CountingReader()
    prefetcher = start(
      reader,
      sampler,
      end_step=end_step,
      streams=streams,
      max_records=max_records,
    )
    for step in range(end_step):
      assert not missing_of(prefetcher, step, sampler, streams=streams)
    fetched += reader.fetched
    wait_until(lambda reader=reader: not reader.held)
  expected = sorted(list(range(sampler.num_records)) * epochs)
  assert sorted(fetched) == expected


@settings(max_examples=30)
@given(sampler=orders(), more=st.integers(0, 100))
def test_prefetched_windows_stay_within_the_memory(sampler, more):
  window = sampler.shuffle_block * sampler.window_blocks
  slice_size = sampler.global_batch // sampler.streams
  # A batch reads a slice of each stream, and so a part of two windows at its ends.
  max_records = sampler.streams * (2 * window + slice_size) + more
  reader = CountingReader()
  prefetcher = start(reader, sampler, max_records=max_records)
  for step in range(40):
    missing_of(prefetcher, step, sampler)
  # The pieces of the batch before, and a thread's last piece, may live a moment longer
  # than the windows that they were fetched for.
  late = sampler.global_batch + 3 * sampler.shuffle_block
  assert reader.max_held <= max_records + late


def test_the_next_windows_are_prefetched():
  reader = CountingReader()
  prefetcher = start(reader, max_records=200)
  wait_until(lambda: len(reader.fetched) >= 180)
  assert len(reader.fetched) <= 200
  del prefetcher


@pytest.mark.parametrize("first_step", [1, 7, 49, 50, 123])
def test_a_run_may_start_at_any_step(first_step):
  reader = CountingReader()
  prefetcher = start(reader, first_step=first_step, max_records=200)
  for step in range(first_step, first_step + 60):
    assert not missing_of(prefetcher, step)


def test_batches_may_be_read_by_many_threads_out_of_order():
  reader = CountingReader()
  prefetcher = start(reader, end_step=100, max_records=120)

  def read(step: int) -> set[int]:
    time.sleep(step % 3 * 0.001)
    return missing_of(prefetcher, step)

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert not any(pool.map(read, range(100)))
  assert sorted(reader.fetched) == sorted([*range(400), *range(400)])


def test_an_earlier_batch_is_read_by_the_reader_itself():
  prefetcher = start(CountingReader(), max_records=100)
  for step in range(50):
    missing_of(prefetcher, step)
  assert len(missing_of(prefetcher, 3)) == 8
  assert not missing_of(prefetcher, 50)


def test_nothing_is_prefetched_past_the_end():
  reader = CountingReader()
  prefetcher = start(reader, end_step=50, max_records=10_000)
  for step in range(50):
    missing_of(prefetcher, step)
  assert sorted(reader.fetched) == list(range(400))


def test_a_small_set_is_prefetched_at_most_an_epoch_ahead():
  reader = CountingReader()
  prefetcher = start(reader, max_records=10_000)
  time.sleep(0.3)
  assert len(reader.fetched) <= 400 + 4 * 20  # and the windows under way, of 20
  del prefetcher


def test_an_error_reaches_the_batch_that_needs_the_record():
  reader = CountingReader()
  reader.broken = {int(ORDER.batch_at(20).records[0])}
  prefetcher = start(reader, max_records=100)
  missing_of(prefetcher, 0)
  with pytest.raises(errors.DataError, match="is corrupt"):
    missing_of(prefetcher, 20)


def test_the_threads_of_a_prefetcher_end_with_it():
  before = set(threading.enumerate())
  prefetcher = start(CountingReader(), max_records=100)
  threads = set(threading.enumerate()) - before
  assert len(threads) == 3
  del prefetcher
  gc.collect()
  for thread in threads:
    thread.join(timeout=20)
    assert not thread.is_alive()
