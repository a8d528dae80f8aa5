import numpy as np
import pytest
import tensorflow as tf

from facedist.data import hashing
from facedist.models.heads import sharded


def sample(
  first: int, stop: int, *, step: int = 0, seed: int = 0, rate: float = 0.1
) -> np.ndarray:
  return sharded.is_sampled(
    tf.range(first, stop, dtype=tf.int64),
    seed=seed,
    step=tf.constant(step, tf.int64),
    rate=rate,
  ).numpy()


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 12345), (-3, 2**40)])
def test_the_hash_is_the_one_of_the_sample_order(seed: int, step: int):
  identities = np.arange(1000, 3000)
  hashes = hashing.combine(seed, np.array(step), identities)
  expected = (hashes >> np.uint64(32)).astype(np.float64) / 2**32 < 0.25
  found = sample(1000, 3000, seed=seed, step=step, rate=0.25)
  np.testing.assert_array_equal(found, expected)


def test_the_rate_is_met_and_steps_differ():
  count = 100_000
  draws = [sample(0, count, step=step, rate=0.1) for step in range(2)]
  for drawn in draws:  # a deviation is √(n · 0.1 · 0.9) = 95
    assert abs(drawn.sum() - 0.1 * count) < 4 * 95
  both = (draws[0] & draws[1]).sum()  # independent steps: 1 %, with a deviation of 31
  assert abs(both - 0.01 * count) < 4 * 32
  assert not np.array_equal(sample(0, 1000), sample(0, 1000, seed=1))


def test_the_sample_does_not_depend_on_the_range_asked_for():
  whole = sample(0, 5000, step=3)
  parts = [
    sample(0, 1700, step=3),
    sample(1700, 1701, step=3),
    sample(1701, 5000, step=3),
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_rate_of_one_samples_all_and_zero_none():
  assert sample(0, 1000, rate=1.0).all()
  assert not sample(0, 1000, rate=0.0).any()
