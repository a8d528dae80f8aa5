"""The orders of records: complete, reproducible, shuffled, and cheap at any size."""

import collections
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facedist import errors
from facedist.data import hashing
from facedist.data.samplers import block_sampler, epoch_sampler, identity_sampler
from facedist.data.samplers.block_sampler import BlockSampler
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.samplers.identity_sampler import IdentitySampler

BILLION = 10**9
SEEDS = st.integers(-(2**70), 2**70)

few = settings(max_examples=40)


@st.composite
def block_orders(draw: st.DrawFn) -> BlockSampler:
  """Small orders of all shapes: sets smaller than a batch, a block or a window too."""
  streams = draw(st.integers(1, 6))
  return BlockSampler(
    num_records=draw(st.integers(1, 150)),
    global_batch=streams * draw(st.integers(1, 5)),
    seed=draw(SEEDS),
    shuffle_block=draw(st.integers(1, 20)),
    streams=streams,
    window_blocks=draw(st.integers(1, 4)),
  )


@st.composite
def labelled_orders(draw: st.DrawFn) -> tuple[IdentitySampler, np.ndarray]:
  """Small orders of all shapes and the labels of their records; some have none."""
  counts = draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
  labels = np.repeat(np.arange(len(counts)), counts)
  present = np.count_nonzero(counts)
  if present < 2:
    labels = np.array([0, 3, 3])
    present = 2
  draw(st.randoms(use_true_random=False)).shuffle(labels)
  return of_identities(
    labels,
    identities_per_batch=draw(st.integers(1, present)),
    images=draw(st.integers(2, 6)),
    seed=draw(SEEDS),
  ), labels


def of_identities(
  labels: np.ndarray, *, identities_per_batch: int, images: int, seed: int = 0
) -> IdentitySampler:
  return IdentitySampler(
    len(labels),
    identities_per_batch * images,
    seed,
    identities_per_batch,
    identity_sampler.group(labels),
  )


EPOCH_ORDERS = st.builds(EpochSampler, st.integers(1, 150), st.integers(1, 200), SEEDS)
LABELLED = labelled_orders()


def large(*, seed: int = 0) -> BlockSampler:
  return BlockSampler(100_000, 64, seed, shuffle_block=50, streams=16, window_blocks=4)


def epochs_of(sampler: EpochSampler, count: int = 1) -> np.ndarray:
  """Returns int64[epochs, num_records], each row an epoch's records in order."""
  samples = sampler.samples_at(np.arange(count * sampler.num_records))
  return samples.records.reshape(count, sampler.num_records)


def excess(counts: np.ndarray, *, degrees: int) -> float:
  """Chi-squared of counts that should be equal, in standard deviations above it."""
  expected = counts.mean()
  return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@given(sampler=EPOCH_ORDERS | block_orders())
def test_each_record_comes_exactly_once_an_epoch(sampler):
  num_records = sampler.num_records
  samples = sampler.samples_at(np.arange(4 * num_records))
  assert samples.epochs.tolist() == np.repeat(np.arange(4), num_records).tolist()
  for records in samples.records.reshape(4, num_records):
    assert sorted(records) == list(range(num_records))


@given(
  sampler=EPOCH_ORDERS | block_orders() | LABELLED.map(lambda made: made[0]),
  step=st.integers(0, 60),
  data=st.data(),
)
def test_a_step_and_its_slices_do_not_depend_on_earlier_calls(sampler, step, data):
  batch = sampler.global_batch
  whole = sampler.samples_at(np.arange((step + 1) * batch))
  start = data.draw(st.integers(0, batch))
  stop = data.draw(st.integers(start, batch))
  part = sampler.slice_at(step, start, stop)
  expected = slice(step * batch + start, step * batch + stop)
  np.testing.assert_array_equal(part.records, whole.records[expected])
  np.testing.assert_array_equal(part.epochs, whole.epochs[expected])


@pytest.mark.parametrize(
  "of_seed",
  [lambda seed: EpochSampler(100_000, 64, seed), lambda seed: large(seed=seed)],
  ids=["records", "blocks"],
)
def test_epochs_and_seeds_differ(of_seed):
  first, second = epochs_of(of_seed(0), 2)
  for other in (second, epochs_of(of_seed(1))[0]):
    # Two random orders agree in one place on average.
    assert (first == other).sum() < 30


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

  expected = [[record_at(place, epoch) for place in range(107)] for epoch in range(3)]
  np.testing.assert_array_equal(epochs_of(EpochSampler(107, 4, 42), 3), expected)


@pytest.mark.parametrize("num_records", [3, 5, 16, 50])
def test_records_come_at_each_place_and_after_each_other_equally_often(num_records):
  rows = epochs_of(EpochSampler(num_records, 4, seed=0), 5000)
  counts = np.stack([np.bincount(column, minlength=num_records) for column in rows.T])
  assert excess(counts, degrees=(num_records - 1) ** 2) < 5
  steps = (np.diff(rows, axis=1) % num_records).ravel()
  assert excess(np.bincount(steps)[1:], degrees=num_records - 2) < 5


def test_a_large_order_is_even_in_every_region():
  (records,) = epochs_of(EpochSampler(200_000, 4, seed=0))
  counts, _, _ = np.histogram2d(np.arange(200_000), records, bins=50)
  assert excess(counts, degrees=49**2) < 5
  assert abs(np.corrcoef(np.arange(200_000), records)[0, 1]) < 0.01
  # Records one apart stay one apart twice in a random order, and rarely ten times.
  assert (np.abs(np.diff(records)) == 1).sum() < 10


@pytest.mark.parametrize(
  "sampler",
  [
    EpochSampler(BILLION, 512, seed=1),
    BlockSampler(BILLION, 512, seed=1, shuffle_block=256, streams=64, window_blocks=4),
  ],
  ids=["records", "blocks"],
)
def test_a_batch_of_a_billion_records_takes_little_memory(sampler):
  sampler.batch_at(0)
  tracemalloc.start()
  batches = [sampler.batch_at(step).records for step in range(10**6, 10**6 + 20)]
  if isinstance(sampler, BlockSampler):
    windows = sampler.windows(10**6, 0, 64)
    runs = np.concatenate([next(windows).runs for _ in range(100)])
    runs = runs[np.argsort(runs[:, 0])]
    assert (runs[1:, 0] >= runs[:-1, 1]).all(), "runs overlap"
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1_000_000  # bytes; an array of the order would take 8 billion
  records = np.concatenate(batches)
  assert 0 <= records.min() <= records.max() < BILLION
  assert len(np.unique(records)) == len(records)


def test_a_set_and_a_batch_have_at_least_one_record():
  with pytest.raises(errors.DataError, match="no records"):
    EpochSampler(0, 4, seed=0)
  with pytest.raises(errors.UsageError, match="--global_batch=0"):
    EpochSampler(4, 0, seed=0)


@given(sampler=block_orders(), first_step=st.integers(0, 40), data=st.data())
def test_windows_hold_the_samples_in_the_order_of_need(sampler, first_step, data):
  first = data.draw(st.integers(0, sampler.streams - 1))
  last = data.draw(st.integers(first + 1, sampler.streams))
  slice_size = sampler.global_batch // sampler.streams
  steps = np.arange(first_step, first_step + 12)
  of_step = np.arange(first * slice_size, last * slice_size)
  positions = steps[:, None] * sampler.global_batch + of_step
  needed: dict[int, int] = {}
  for step, row in zip(steps.tolist(), positions, strict=True):
    for key in sampler.keys_at(row).tolist():
      needed.setdefault(key, step)
  windows = {}
  for window in sampler.windows(first_step, first, last):
    if window.first_step > steps[-1]:
      break
    assert window.key not in windows, "a window came twice"
    windows[window.key] = window
  assert {key: window.first_step for key, window in windows.items()} == needed
  held = {key: records_of(window.runs) for key, window in windows.items()}
  keys = sampler.keys_at(positions.ravel()).tolist()
  records = sampler.samples_at(positions.ravel()).records
  assert all(record in held[key] for key, record in zip(keys, records, strict=True))


@given(sampler=block_orders())
def test_the_windows_of_an_epoch_hold_each_record_once(sampler):
  last_step = -(-sampler.num_records // sampler.global_batch)
  held: list[int] = []
  for window in sampler.windows(0, 0, sampler.streams):
    if window.first_step > last_step:
      break
    if window.key < sampler.num_records:  # of the first epoch
      held += records_of(window.runs)
      assert window.num_records == len(records_of(window.runs))
  assert sorted(held) == list(range(sampler.num_records))


def records_of(runs: np.ndarray) -> list[int]:
  return [record for first, last in runs.tolist() for record in range(first, last)]


def test_a_window_is_as_many_runs_as_it_has_blocks():
  windows = large().windows(0, 0, 16)
  pieces = [len(next(windows).runs) for _ in range(400)]
  # Of 2,000 blocks the 15 inner ends of segments cut one each, and the offset one.
  assert max(pieces) <= 5
  assert np.mean(pieces) < 4.1


def test_a_window_has_other_blocks_together_in_another_epoch():
  windows = itertools.islice(large().windows(0, 0, 1), 50)
  starts = {window.key: window.runs[:, 0] for window in windows}
  first, second = (starts[key][1:] - starts[key][0] for key in (0, 100_000))
  assert (first % 100_000 != second % 100_000).all()


def test_a_step_mixes_records_of_all_over_the_set():
  batches = [large().batch_at(step).records for step in range(300)]
  # 64 records of 16 streams are of at least a dozen different blocks of 50.
  assert min(len(np.unique(batch // 50)) for batch in batches) > 16
  counts = np.histogram(np.concatenate(batches[::10]), bins=8, range=(0, 100_000))[0]
  assert counts.min() > 0.5 * counts.mean()


def test_neighbours_stay_within_a_window_and_are_mixed_in_it():
  places = np.empty(100_000, np.int64)
  places[epochs_of(large())[0]] = np.arange(100_000)
  distances = np.abs(np.diff(places))
  # A window is 200 samples of one of 16 streams: 50 steps of 64 samples.
  same_block = np.sort(distances)[: int(0.97 * len(distances))]
  assert same_block.max() <= 51 * 64
  # Two random places among 200 are a third of 200 apart on average.
  assert same_block.mean() == pytest.approx(50 * 64 / 3, rel=0.1)
  assert (distances == 1).mean() < 0.03


def test_each_place_of_blocks_has_each_record_equally_often():
  sampler = BlockSampler(23, 6, seed=0, shuffle_block=4, streams=3, window_blocks=2)
  for column in epochs_of(sampler, 4000).T[::5]:
    assert excess(np.bincount(column, minlength=23), degrees=22) < 5


def test_block_size_one_is_the_order_of_single_records():
  made = block_sampler.make_block_sampler(
    100, 4, 3, shuffle_block=1, streams=3, window_blocks=9
  )
  assert type(made) is EpochSampler
  np.testing.assert_array_equal(epochs_of(made), epochs_of(EpochSampler(100, 4, 3)))


def test_streams_that_do_not_divide_the_batch_are_refused_with_a_batch_that_does():
  with pytest.raises(
    errors.UsageError,
    match=r"--global_batch=10 does not divide over --streams=4; try --global_batch=8\.",
  ):
    BlockSampler(100, 10, seed=0, shuffle_block=8, streams=4, window_blocks=2)


def of_rounds(sampler: IdentitySampler, rounds: int) -> epoch_sampler.Batch:
  """Returns the samples of some rounds, each int64[steps, batch]."""
  shape = rounds * sampler.steps_a_round, sampler.global_batch
  samples = sampler.samples_at(np.arange(shape[0] * shape[1]))
  return epoch_sampler.Batch(
    samples.records.reshape(shape), samples.epochs.reshape(shape)
  )


@few
@given(made=LABELLED)
def test_each_batch_is_p_identities_of_k_images_which_repeat_only_where_they_must(made):
  sampler, labels = made
  sizes = np.bincount(labels)
  for records in of_rounds(sampler, 7).records:
    of_batch = labels[records].reshape(sampler.images_of_each, -1)
    assert (of_batch == of_batch[0]).all()  # sample s is of identity s mod P
    assert len(set(of_batch[0])) == sampler.identities_per_batch
    for record, count in collections.Counter(records.tolist()).items():
      each = sampler.images_of_each / sizes[labels[record]]
      assert np.floor(each) <= count <= np.ceil(each)


@few
@given(made=LABELLED)
def test_appearances_of_identities_differ_by_at_most_one_after_any_round(made):
  sampler, labels = made
  records = of_rounds(sampler, 30).records
  firsts = labels[records[:, : sampler.identities_per_batch]]
  by_round = firsts.reshape(30, -1, 1) == np.unique(labels)
  appearances = by_round.sum(axis=1).cumsum(axis=0)  # [rounds, identities]
  assert (np.ptp(appearances, axis=1) <= 1).all()


@few
@given(made=LABELLED)
def test_all_images_of_an_identity_are_used_about_equally_often(made):
  sampler, labels = made
  records = of_rounds(sampler, 50).records
  times = np.bincount(records.ravel(), minlength=len(labels))
  for label in np.unique(labels):
    of_label = times[labels == label]
    assert of_label.min() > 0
    assert np.ptp(of_label) <= 2  # one rested, and comes late in this round


@few
@given(made=LABELLED)
def test_no_two_samples_have_record_and_epoch_alike(made):
  samples = of_rounds(made[0], 9)
  pairs = np.stack([samples.records.ravel(), samples.epochs.ravel()])
  assert np.unique(pairs, axis=1).shape == pairs.shape


def test_the_closed_form_equals_the_rounds_of_the_docstring():
  """Dealt out one by one, with counters: a resumed run relies on the closed form."""
  labels = np.repeat([0, 1, 2, 3, 4], [5, 2, 3, 4, 9])
  sampler = of_identities(labels, identities_per_batch=2, images=3, seed=11)
  seeds = [int(hashing.combine(11, np.array(use))[0]) for use in (1, 2)]
  appeared = np.zeros(5, int)
  for turn in range(40):  # 5 identities: 2 batches of 2 a round, and one rests
    sitting = [(turn + 1 + place) % 5 for place in range(4)]
    seats = epoch_sampler.permute(
      np.arange(4), epochs=np.full(4, turn), num_records=4, seed=seeds[0]
    )
    for half in (0, 1):
      expected = []
      for identity in [sitting[seat] for seat in seats[2 * half : 2 * half + 2]]:
        own = np.flatnonzero(labels == identity).tolist()
        expected.append(dealt(own, identity, appeared[identity], seeds[1]))
        appeared[identity] += 1
      batch = sampler.batch_at(2 * turn + half)
      assert batch.records.reshape(3, 2).T.tolist() == expected


def dealt(own: list[int], identity: int, appeared: int, seed: int) -> list[int]:
  """Returns the three images of the identity's next appearance."""
  whole, hand = divmod(3, len(own))
  images = own * whole
  if hand:
    hands = len(own) // hand
    turn, place = divmod(appeared, hands)
    resting = len(own) % hand
    first = turn * resting + resting
    deck = [own[(first + card) % len(own)] for card in range(hands * hand)]
    cards = epoch_sampler.permute_groups(
      np.arange(place * hand, (place + 1) * hand),
      groups=np.full(hand, turn * 5 + identity),
      sizes=np.full(hand, hands * hand),
      seed=seed,
    )
    images += [deck[card] for card in cards]
  return images


def test_batches_mix_other_identities_in_each_round_and_with_each_seed():
  labels = np.repeat(np.arange(400), 4)
  sampler = of_identities(labels, identities_per_batch=20, images=4)
  other = of_identities(labels, identities_per_batch=20, images=4, seed=1)
  first = set(labels[sampler.batch_at(0).records])
  rest = [sampler.batch_at(step) for step in range(20, 40)]
  together = [len(first & set(labels[batch.records])) for batch in rest]
  assert sum(together) == 20  # each identity once a round
  assert max(together) < 8  # of 20 at random, one is expected
  assert len(first & set(labels[other.batch_at(0).records])) < 8


def test_a_large_set_takes_four_bytes_a_record():
  groups = identity_sampler.group(np.arange(300_000) % 1000)
  assert groups.records.nbytes == 4 * 300_000
  assert groups.starts.nbytes == 8 * 1001
  np.testing.assert_array_equal(groups.records[:3], [0, 1000, 2000])


def test_siblings_are_the_other_records_of_the_identity_once_each():
  labels = np.array([2, 0, 2, 2, 0, 1])
  sampler = of_identities(labels, identities_per_batch=2, images=2)
  found = {tuple(sampler.siblings(2, epoch)) for epoch in range(30)}
  assert found == {(0, 3), (3, 0)}
  assert list(sampler.siblings(5, 0)) == []
  assert list(sampler.siblings(4, 7)) == [1]
  assert list(EpochSampler(6, 4, 0).siblings(2, 0)) == []


@pytest.mark.parametrize(
  ("global_batch", "identities", "nearest"),
  [(100, 32, 96), (64, 64, 128), (4, 6, 12)],
)
def test_a_batch_that_is_not_p_times_k_is_refused_with_one_that_is(
  global_batch, identities, nearest
):
  with pytest.raises(errors.UsageError, match=f"try --global_batch={nearest}\\."):
    identity_sampler.count_images(global_batch, identities)


def test_more_identities_in_a_batch_than_there_are_is_a_usage_error():
  with pytest.raises(errors.UsageError, match="more than the 2 identities"):
    of_identities(np.array([0, 0, 7]), identities_per_batch=3, images=2)
