"""tfrecords_tools.selection: rules on columns, counted by hand and by hypothesis."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np

from tfrecords_tools.selection import filters

OUT = filters.LEFT_OUT


def column(*labels: int) -> np.ndarray:
  return np.array(labels, np.int32)


def test_a_list_names_an_identity_by_its_new_name_or_by_its_own():
  named = filters.listed(("a/n1", "a/n2", "new"), ("n1", "n2", "n3"), {"n1", "new"})
  assert named.tolist() == [True, False, True]


def test_images_of_train_and_val_count_together_towards_the_minimum():
  labels = column(0, 0, 1, 1, 2, 0, 1)  # the last two are val's
  stays = filters.keep_at_least(labels, num_train=5, num_identities=4, minimum=3)
  assert stays.tolist() == [True, True, False, False]


def test_an_identity_with_images_in_val_alone_goes_whatever_the_minimum():
  labels = column(0, OUT, 1, 1)
  stays = filters.keep_at_least(labels, num_train=2, num_identities=2, minimum=1)
  assert stays.tolist() == [True, False]


def test_the_images_with_the_smallest_draws_stay():
  labels = column(1, 0, 1, 1, OUT, 1)
  drawn = np.array([40, 99, 10, 30, 5, 20], np.uint64)
  stays = filters.keep_at_most(labels, drawn, num_identities=2, maximum=2)
  assert stays.tolist() == [False, True, True, False, False, True]


def test_draws_depend_on_seed_shard_and_place_alone():
  offsets = np.array([0, 700, 1500], np.uint64)
  drawn = filters.draws(3, 0xABCD, offsets)
  np.testing.assert_array_equal(filters.draws(3, 0xABCD, offsets[1:]), drawn[1:])
  others = [filters.draws(4, 0xABCD, offsets), filters.draws(3, 0xABCE, offsets)]
  assert not np.isin(drawn, others).any()


def test_draws_take_each_place_of_a_shard_as_often():
  """Half of the 4,096 fall below the middle, within five standard deviations (32)."""
  for seed in range(8):
    drawn = filters.draws(seed, 7, np.arange(4096, dtype=np.uint64) * 5000)
    assert abs(int((drawn < 2**63).sum()) - 2048) < 5 * 32


LABELS = st.lists(st.integers(-1, 5), max_size=60).map(lambda values: column(*values))


@hypothesis.given(labels=LABELS, maximum=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_of_each_identity_as_many_stay_as_may_and_more_keep_the_same(
  labels, maximum, seed
):
  drawn = filters.draws(seed, 1, np.arange(len(labels), dtype=np.uint64))
  fewer, more = (
    filters.keep_at_most(labels, drawn, num_identities=6, maximum=most)
    for most in (maximum, maximum + 1)
  )
  counts = collections.Counter(labels.tolist())
  kept = collections.Counter(labels[fewer].tolist())
  assert kept == {
    label: min(count, maximum) for label, count in counts.items() if label != OUT
  }
  assert not (fewer & ~more).any()


@hypothesis.given(labels=LABELS, kept=st.lists(st.booleans(), min_size=6, max_size=6))
def test_new_labels_have_no_gaps_and_keep_their_order(labels, kept):
  new = filters.renumber(labels, np.array(kept))
  assert new.dtype == np.int32
  for old_label, new_label in zip(labels.tolist(), new.tolist(), strict=True):
    stays = old_label != OUT and kept[old_label]
    assert new_label == (sum(kept[:old_label]) if stays else OUT)
