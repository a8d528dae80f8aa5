"""The order in blocks: complete, shuffled, fetched once, the same for all workers."""

import collections
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data.samplers import epoch_sampler
from facedist.data.samplers.block_sampler import BlockSampler, make_block_sampler
from tests.facedist.data.test_epoch_sampler import (
  assert_slices_do_not_depend_on_earlier_calls,
)

BILLION = 10**9


@st.composite
def orders(draw: st.DrawFn) -> BlockSampler:
  """Small orders of all shapes: sets smaller than a batch, a block or a window too."""
  streams = draw(st.integers(1, 6))
  return BlockSampler(
    num_records=draw(st.integers(1, 150)),
    global_batch=streams * draw(st.integers(1, 5)),
    seed=draw(st.integers(-(2**70), 2**70)),
    shuffle_block=draw(st.integers(1, 20)),
    streams=streams,
    window_blocks=draw(st.integers(1, 4)),
  )


def large(num_records: int = 100_000, *, seed: int = 0) -> BlockSampler:
  return BlockSampler(
    num_records, 64, seed, shuffle_block=50, streams=16, window_blocks=4
  )


def epoch_of(sample_order: BlockSampler, epoch: int) -> np.ndarray:
  """Returns int64[num_records], an epoch's records in the order of training."""
  first = epoch * sample_order.num_records
  return sample_order.samples_at(
    np.arange(first, first + sample_order.num_records)
  ).records


@given(sample_order=orders())
def test_each_record_comes_exactly_once_an_epoch(sample_order):
  num_records = sample_order.num_records
  samples = sample_order.samples_at(np.arange(4 * num_records))
  assert samples.epochs.tolist() == np.repeat(np.arange(4), num_records).tolist()
  for epoch in range(4):
    records = samples.records[samples.epochs == epoch]
    assert sorted(records) == list(range(num_records))


@given(sample_order=orders(), step=st.integers(0, 60), data=st.data())
def test_a_step_and_its_slices_do_not_depend_on_earlier_calls(sample_order, step, data):
  assert_slices_do_not_depend_on_earlier_calls(sample_order, step, data)


@given(sample_order=orders(), first_step=st.integers(0, 40), data=st.data())
def test_windows_hold_the_samples_in_the_order_of_need(sample_order, first_step, data):
  first = data.draw(st.integers(0, sample_order.streams - 1))
  last = data.draw(st.integers(first + 1, sample_order.streams))
  slice_size, batch = (
    sample_order.global_batch // sample_order.streams,
    (sample_order.global_batch),
  )
  steps = np.arange(first_step, first_step + 12)
  positions = steps[:, None] * batch + np.arange(first * slice_size, last * slice_size)
  needed = collections.OrderedDict()
  for step, row in zip(steps.tolist(), positions, strict=True):
    for key in sample_order.keys_at(row).tolist():
      needed.setdefault(key, step)
  windows = {}
  for window in sample_order.windows(first_step, first, last):
    if window.first_step > steps[-1]:
      break
    assert window.key not in windows, "a window came twice"
    windows[window.key] = window
  assert {key: window.first_step for key, window in windows.items()} == needed
  held = {key: _records_of(window.runs) for key, window in windows.items()}
  records = sample_order.samples_at(positions.ravel()).records
  for key, record in zip(
    sample_order.keys_at(positions.ravel()).tolist(), records, strict=True
  ):
    assert record in held[key]


@given(sample_order=orders())
def test_the_windows_of_an_epoch_hold_each_record_once(sample_order):
  num_records = sample_order.num_records
  last_step = -(-num_records // sample_order.global_batch)
  held = collections.Counter()
  for window in sample_order.windows(0, 0, sample_order.streams):
    if window.first_step > last_step:
      break
    if window.key < num_records:  # of the first epoch
      held.update(_records_of(window.runs))
      assert window.num_records == len(_records_of(window.runs))
  assert held == dict.fromkeys(range(num_records), 1)


def _records_of(runs: np.ndarray) -> list[int]:
  return [record for first, last in runs.tolist() for record in range(first, last)]


def test_a_window_is_as_many_runs_as_it_has_blocks():
  sample_order = large()
  windows = sample_order.windows(0, 0, 16)
  pieces = [len(next(windows).runs) for _ in range(400)]
  # Of 2,000 blocks the 15 inner ends of segments cut one each, and the offset one.
  assert max(pieces) <= 5
  assert np.mean(pieces) < 4.1


def test_blocks_of_one_record_in_one_stream_still_mix_everything():
  sample_order = BlockSampler(
    1000, 4, seed=0, shuffle_block=1, streams=1, window_blocks=1
  )
  records = epoch_of(sample_order, 0)
  assert (np.abs(np.diff(records)) == 1).sum() < 20


def test_epochs_and_seeds_differ():
  first = epoch_of(large(), 0)
  for other in (epoch_of(large(), 1), epoch_of(large(seed=1), 0)):
    # Two random orders of 100,000 agree in one place on average.
    assert (first == other).sum() < 30


def test_a_step_mixes_records_of_all_over_the_set():
  batches = [large().batch_at(step).records for step in range(300)]
  # 64 records of 16 streams are of at least a dozen different blocks of 50.
  assert min(len(np.unique(batch // 50)) for batch in batches) > 16
  counts = np.histogram(np.concatenate(batches[::10]), bins=8, range=(0, 100_000))[0]
  assert counts.min() > 0.5 * counts.mean()


def test_neighbours_stay_within_a_window_and_are_mixed_in_it():
  places = np.empty(100_000, np.int64)
  places[epoch_of(large(), 0)] = np.arange(100_000)
  distances = np.abs(np.diff(places))
  # A window is 200 samples of one of 16 streams: 50 steps of 64 samples.
  same_block = np.sort(distances)[: int(0.97 * len(distances))]
  assert same_block.max() <= 51 * 64
  # Two random places among 200 are a third of 200 apart on average.
  assert same_block.mean() == pytest.approx(50 * 64 / 3, rel=0.1)
  assert (distances == 1).mean() < 0.03


def test_each_place_of_an_epoch_has_each_record_equally_often():
  sample_order = BlockSampler(
    23, 6, seed=0, shuffle_block=4, streams=3, window_blocks=2
  )
  epochs = 4000
  rows = sample_order.samples_at(np.arange(23 * epochs)).records.reshape(epochs, 23)
  for column in rows.T[::5]:
    counts = np.bincount(column, minlength=23)
    squares = ((counts - epochs / 23) ** 2 / (epochs / 23)).sum()
    assert (squares - 22) / (2 * 22) ** 0.5 < 5  # standard deviations


def test_a_batch_of_a_billion_records_takes_little_memory():
  sample_order = BlockSampler(
    BILLION, 512, seed=1, shuffle_block=256, streams=64, window_blocks=4
  )
  sample_order.batch_at(0)
  tracemalloc.start()
  batches = [sample_order.batch_at(step) for step in range(10**6, 10**6 + 20)]
  windows = sample_order.windows(10**6, 0, 64)
  some = [next(windows) for _ in range(100)]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1_000_000  # bytes
  records = np.concatenate([batch.records for batch in batches])
  assert len(np.unique(records)) == len(records)
  held = np.concatenate([window.runs for window in some])
  starts, ends = np.sort(held[:, 0]), np.sort(held[:, 1])
  assert all(
    ((held[:, 0] <= record) & (record < held[:, 1])).any() for record in records[:512]
  )
  assert (starts[1:] >= ends[:-1]).all(), "runs overlap"


def test_block_size_one_is_the_order_of_single_records():
  blocks = epoch_sampler.EpochSampler(100, 4, seed=3).batch_at(7).records
  made = make_block_sampler(100, 4, 3, shuffle_block=1, streams=3, window_blocks=9)
  assert type(made) is epoch_sampler.EpochSampler
  np.testing.assert_array_equal(made.batch_at(7).records, blocks)


def test_streams_that_do_not_divide_the_batch_are_refused_with_a_batch_that_does():
  with pytest.raises(
    errors.UsageError,
    match=r"--global_batch=10 does not divide over --streams=4; try --global_batch=8\.",
  ):
    BlockSampler(100, 10, seed=0, shuffle_block=8, streams=4, window_blocks=2)
