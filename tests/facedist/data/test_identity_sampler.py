"""Batches of P identities x K images: balanced, and the same for all workers."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facedist import errors
from facedist.data import pipeline
from facedist.data.readers import local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers import epoch_sampler, identity_sampler
from facedist.data.samplers.identity_sampler import IdentitySampler
from tests import noise_sets
from tests.facedist.data.test_epoch_sampler import (
  assert_slices_do_not_depend_on_earlier_calls,
)

SIZE = 16

few = settings(max_examples=40)


@st.composite
def orders(draw: st.DrawFn) -> tuple[IdentitySampler, np.ndarray]:
  """Small orders of all shapes and the labels of their records; some have none."""
  counts = draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
  labels = np.repeat(np.arange(len(counts)), counts)
  present = np.count_nonzero(counts)
  if present < 2:
    labels = np.array([0, 3, 3])
    present = 2
  draw(st.randoms(use_true_random=False)).shuffle(labels)
  return make(
    labels,
    identities_per_batch=draw(st.integers(1, present)),
    images=draw(st.integers(2, 6)),
    seed=draw(st.integers(-(2**70), 2**70)),
  ), labels


def make(
  labels: np.ndarray, *, identities_per_batch: int, images: int, seed: int = 0
) -> IdentitySampler:
  return IdentitySampler(
    len(labels),
    identities_per_batch * images,
    seed,
    identities_per_batch,
    identity_sampler.group(labels),
  )


def of_rounds(sample_order: IdentitySampler, rounds: int) -> epoch_sampler.Batch:
  """Returns the samples of some rounds, each int64[steps, batch]."""
  shape = rounds * sample_order.steps_a_round, sample_order.global_batch
  samples = sample_order.samples_at(np.arange(shape[0] * shape[1]))
  return epoch_sampler.Batch(
    samples.records.reshape(shape), samples.epochs.reshape(shape)
  )


@few
@given(made=orders())
def test_each_batch_is_p_identities_of_k_images_which_repeat_only_where_they_must(made):
  sample_order, labels = made
  sizes = np.bincount(labels)
  for records in of_rounds(sample_order, 7).records:
    of_batch = labels[records].reshape(sample_order.images_of_each, -1)
    assert (of_batch == of_batch[0]).all()  # sample s is of identity s mod P
    assert len(set(of_batch[0])) == sample_order.identities_per_batch
    for record, count in collections.Counter(records.tolist()).items():
      each = sample_order.images_of_each / sizes[labels[record]]
      assert np.floor(each) <= count <= np.ceil(each)


@few
@given(made=orders())
def test_appearances_of_identities_differ_by_at_most_one_after_any_round(made):
  sample_order, labels = made
  records = of_rounds(sample_order, 30).records
  firsts = labels[records[:, : sample_order.identities_per_batch]]
  by_round = firsts.reshape(30, -1, 1) == np.unique(labels)
  appearances = by_round.sum(axis=1).cumsum(axis=0)  # [rounds, identities]
  assert (np.ptp(appearances, axis=1) <= 1).all()


@few
@given(made=orders())
def test_all_images_of_an_identity_are_used_about_equally_often(made):
  sample_order, labels = made
  records = of_rounds(sample_order, 50).records
  times = np.bincount(records.ravel(), minlength=len(labels))
  for label in np.unique(labels):
    of_label = times[labels == label]
    assert of_label.min() > 0
    assert np.ptp(of_label) <= 2  # one rested, and comes late in this round


@few
@given(made=orders())
def test_no_two_samples_have_record_and_epoch_alike(made):
  samples = of_rounds(made[0], 9)
  pairs = np.stack([samples.records.ravel(), samples.epochs.ravel()])
  assert np.unique(pairs, axis=1).shape == pairs.shape


@few
@given(made=orders(), step=st.integers(0, 60), data=st.data())
def test_a_step_and_its_slices_do_not_depend_on_earlier_calls(made, step, data):
  sample_order, _ = made
  assert_slices_do_not_depend_on_earlier_calls(sample_order, step, data)


def test_the_closed_form_equals_the_rounds_of_the_docstring():
  """Dealt out one by one, with counters: a resumed run relies on the closed form."""
  labels = np.repeat([0, 1, 2, 3, 4], [5, 2, 3, 4, 9])
  sample_order = make(labels, identities_per_batch=2, images=3, seed=11)
  seeds = [sample_order._derived_seed(use) for use in (1, 2)]
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
      batch = sample_order.batch_at(2 * turn + half)
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
  sample_order = make(labels, identities_per_batch=20, images=4)
  other = make(labels, identities_per_batch=20, images=4, seed=1)
  first = set(labels[sample_order.batch_at(0).records])
  rest = [sample_order.batch_at(step) for step in range(20, 40)]
  together = [len(first & set(labels[batch.records])) for batch in rest]
  assert sum(together) == 20  # each identity once a round
  assert max(together) < 8  # of 20 at random, one is expected
  assert len(first & set(labels[other.batch_at(0).records])) < 8


def test_a_large_set_takes_four_bytes_a_record():
  labels = np.arange(300_000) % 1000
  groups = identity_sampler.group(labels)
  assert groups.records.nbytes == 4 * 300_000
  assert groups.starts.nbytes == 8 * 1001
  np.testing.assert_array_equal(groups.records[:3], [0, 1000, 2000])


def test_siblings_are_the_other_records_of_the_identity_once_each():
  labels = np.array([2, 0, 2, 2, 0, 1])
  sample_order = make(labels, identities_per_batch=2, images=2)
  found = [list(sample_order.siblings(2, epoch)) for epoch in range(30)]
  assert {tuple(siblings) for siblings in found} == {(0, 3), (3, 0)}
  assert list(sample_order.siblings(5, 0)) == []
  assert list(sample_order.siblings(4, 7)) == [1]
  assert list(epoch_sampler.EpochSampler(6, 4, 0).siblings(2, 0)) == []


@pytest.mark.parametrize(
  ("global_batch", "identities", "nearest"),
  [(100, 32, 96), (64, 64, 128), (4, 6, 12)],
)
def test_a_batch_that_is_not_p_times_k_is_refused_with_one_that_is(
  global_batch: int, identities: int, nearest: int
):
  with pytest.raises(errors.UsageError, match=f"try --global_batch={nearest}\\."):
    identity_sampler.count_images(global_batch, identities)


def test_more_identities_in_a_batch_than_there_are_is_a_usage_error():
  with pytest.raises(errors.UsageError, match="more than the 2 identities"):
    make(np.array([0, 0, 7]), identities_per_batch=3, images=2)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> RecordReader:
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(folder, identities=5, images=7, size=SIZE, shards=3)
  return local_reader.open_reader(folder, "train")


def read(
  train: RecordReader, *, num_workers: int = 1, start_step: int = 0
) -> list[dict[str, np.ndarray]]:
  """Reads three global batches of 4 identities, put together from all workers."""
  sample_order = IdentitySampler(
    train.num_records, 8, 1, 4, identity_sampler.group(train.labels())
  )
  parts = [
    pipeline.training_dataset(
      train,
      sample_order,
      seed=2,
      start_step=start_step,
      worker=worker,
      num_workers=num_workers,
    )
    .take(3)
    .as_numpy_iterator()
    for worker in range(num_workers)
  ]
  return [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]


@pytest.mark.parametrize(("num_workers", "start_step"), [(2, 0), (4, 1), (1, 2)])
def test_batches_read_are_the_same_for_any_workers_and_from_any_step(
  train: RecordReader, num_workers: int, start_step: int
):
  alone = read(train)[start_step:]
  again = read(train, num_workers=num_workers, start_step=start_step)
  for first, second in zip(alone, again, strict=False):
    assert sorted(np.bincount(first["label"]).tolist())[-4:] == [2, 2, 2, 2]
    for name in first:
      np.testing.assert_array_equal(first[name], second[name], err_msg=name)
