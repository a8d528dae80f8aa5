"""The order of records: complete, reproducible, shuffled, and cheap at any size."""

import collections
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data.samplers import epoch_sampler

BILLION = 10**9


def permutation(num_records: int, *, epoch: int = 0, seed: int = 0) -> np.ndarray:
  return permutations(num_records, [epoch], seed=seed)[0]


def permutations(num_records: int, epochs, *, seed: int = 0) -> np.ndarray:
  """Returns int64[epochs, num_records], each row an epoch's records in order."""
  shape = (len(epochs), num_records)
  places = np.tile(np.arange(num_records), len(epochs))
  epochs = np.repeat(np.asarray(epochs), num_records)
  records = epoch_sampler.permute(
    places, epochs=epochs, num_records=num_records, seed=seed
  )
  return records.reshape(shape)


def excess(counts: np.ndarray, *, degrees: int) -> float:
  """Chi-squared of counts that should be equal, in standard deviations above it."""
  expected = counts.mean()
  return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@given(
  num_records=st.integers(1, 150),
  global_batch=st.integers(1, 200),
  seed=st.integers(-(2**70), 2**70),
)
def test_each_record_comes_exactly_once_an_epoch(num_records, global_batch, seed):
  sample_order = epoch_sampler.EpochSampler(num_records, global_batch, seed)
  steps = -(-4 * num_records // global_batch)
  batches = [sample_order.batch_at(step) for step in range(steps)]
  records = np.concatenate([batch.records for batch in batches])
  epochs = np.concatenate([batch.epochs for batch in batches])
  for epoch in range(4):
    assert sorted(records[epochs == epoch]) == list(range(num_records))
  assert (np.diff(epochs) >= 0).all()


def assert_slices_do_not_depend_on_earlier_calls(
  sample_order: epoch_sampler.EpochSampler, step: int, data: st.DataObject
) -> None:
  batch = sample_order.global_batch
  whole = sample_order.samples_at(np.arange((step + 1) * batch))
  start = data.draw(st.integers(0, batch))
  stop = data.draw(st.integers(start, batch))
  part = sample_order.slice_at(step, start, stop)
  expected = slice(step * batch + start, step * batch + stop)
  np.testing.assert_array_equal(part.records, whole.records[expected])
  np.testing.assert_array_equal(part.epochs, whole.epochs[expected])


@given(
  num_records=st.integers(1, 100),
  global_batch=st.integers(1, 150),
  step=st.integers(0, 50),
  data=st.data(),
)
def test_a_step_and_its_slices_do_not_depend_on_earlier_calls(
  num_records, global_batch, step, data
):
  sample_order = epoch_sampler.EpochSampler(num_records, global_batch, seed=3)
  assert_slices_do_not_depend_on_earlier_calls(sample_order, step, data)


def test_an_epoch_that_ends_inside_a_batch_is_followed_by_the_next():
  batch = epoch_sampler.EpochSampler(num_records=5, global_batch=4, seed=0).batch_at(1)
  assert batch.epochs.tolist() == [0, 1, 1, 1]


def test_a_batch_may_hold_several_epochs():
  batch = epoch_sampler.EpochSampler(num_records=3, global_batch=8, seed=0).batch_at(0)
  assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
  assert sorted(batch.records[:3]) == sorted(batch.records[3:6]) == [0, 1, 2]


def test_epochs_and_seeds_differ():
  first = permutation(1000)
  for other in (permutation(1000, epoch=1), permutation(1000, seed=1)):
    # Two random orders agree in one place on average; twenty is out of the question.
    assert (first == other).sum() < 20


def test_the_permutation_is_the_network_that_the_docstring_names():
  """A second implementation, one number at a time: a resumed run relies on it."""

  def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)

  def record_at(place: int, epoch: int) -> int:
    while True:
      left, right = divmod(place, 11)  # 11 is the root of 107, rounded up
      for number in range(10):
        key = mix(mix(mix(42) ^ epoch) ^ number)
        added = (right ^ key) * 0xBF58476D1CE4E5B9 % 2**64
        added = (added ^ (added >> 32)) * 0x94D049BB133111EB % 2**64
        left, right = right, (left + (added >> 32)) % 11
      place = left * 11 + right
      if place < 107:
        return place

  expected = [[record_at(place, epoch) for place in range(107)] for epoch in (0, 9)]
  np.testing.assert_array_equal(permutations(107, [0, 9], seed=42), expected)


def test_all_orders_of_three_records_come_equally_often():
  rows = permutations(3, range(6000))
  counts = collections.Counter(map(tuple, rows.tolist()))
  assert set(counts) == set(itertools.permutations(range(3)))
  assert excess(np.array(list(counts.values())), degrees=5) < 5


@pytest.mark.parametrize("num_records", [5, 16, 50])
def test_each_record_comes_at_each_place_equally_often(num_records):
  rows = permutations(num_records, range(5000))
  counts = np.stack([np.bincount(column, minlength=num_records) for column in rows.T])
  assert excess(counts, degrees=(num_records - 1) ** 2) < 5


@pytest.mark.parametrize("num_records", [5, 16, 50])
def test_neighbours_go_anywhere(num_records):
  rows = permutations(num_records, range(5000))
  steps = (np.diff(rows, axis=1) % num_records).ravel()
  assert excess(np.bincount(steps)[1:], degrees=num_records - 2) < 5


def test_a_large_order_is_even_in_every_region():
  records = permutation(200_000)
  counts, _, _ = np.histogram2d(np.arange(200_000), records, bins=50)
  assert excess(counts, degrees=49**2) < 5
  assert abs(np.corrcoef(np.arange(200_000), records)[0, 1]) < 0.01
  # Records one apart stay one apart twice in a random order, and rarely ten times.
  assert (np.abs(np.diff(records)) == 1).sum() < 10


def test_a_batch_of_a_billion_records_takes_little_memory():
  sample_order = epoch_sampler.EpochSampler(BILLION, 512, seed=1)
  sample_order.batch_at(0)
  tracemalloc.start()
  batches = [sample_order.batch_at(step) for step in range(10**6, 10**6 + 20)]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1_000_000  # bytes; an array of the order would take 8 billion
  records = np.concatenate([batch.records for batch in batches])
  assert records.min() >= 0
  assert records.max() < BILLION
  assert len(set(records.tolist())) == len(records)


def test_places_all_over_a_large_epoch_go_to_records_all_over_it():
  places = np.arange(0, BILLION, 999)
  records = epoch_sampler.permute(
    places, epochs=np.full(len(places), 2), num_records=BILLION, seed=0
  )
  assert len(np.unique(records)) == len(places)
  counts, _ = np.histogram(records, bins=100, range=(0, BILLION))
  assert excess(counts, degrees=99) < 5


def test_no_records_are_a_data_error():
  with pytest.raises(errors.DataError, match="no records"):
    epoch_sampler.EpochSampler(0, 4, seed=0)


def test_an_empty_batch_is_a_usage_error():
  with pytest.raises(errors.UsageError, match="--global_batch=0"):
    epoch_sampler.EpochSampler(4, 0, seed=0)
