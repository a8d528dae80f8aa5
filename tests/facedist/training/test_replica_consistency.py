"""Hashes of the weights, compared over replicas."""

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import replica_consistency


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_one_flipped_bit_changes_the_hash(place: tuple[int, int]):
  weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
  flipped = weights.copy()
  flipped.view(np.int32)[place] ^= 1
  assert hash_of(weights, np.ones(4)) != hash_of(flipped, np.ones(4))


def test_exchanged_weights_change_the_hash():
  assert hash_of([1.0, 2.0]) != hash_of([2.0, 1.0])
  one, two = [1.0, 2.0], [2.0, 1.0]
  assert hash_of(one, two) != hash_of(two, one)


def hash_of(*weights: np.ndarray | list[float]) -> int:
  tensors = [tf.constant(weight, tf.float32) for weight in weights]
  return int(replica_consistency.hash_bits(tensors))


def test_each_replica_reports_its_own_hash(
  two_replicas: tf.distribute.MirroredStrategy,
):
  with two_replicas.scope():
    weight = tf.Variable([1.0, 2.0, 3.0])
  hashes = replica_consistency.hash_loop([weight], two_replicas)
  same = hashes().numpy()
  assert same.shape == (2,)
  assert same[0] == same[1]
  two_replicas.experimental_local_results(weight)[1].assign([1.0, 2.0, 3.0000002])
  assert replica_consistency.outliers(hashes().numpy()) == [1]


@pytest.mark.parametrize(
  ("hashes", "expected"),
  [
    ([5, 5, 5], []),
    ([5, 7, 5], [1]),
    ([7, 5, 5], [0]),
    ([5, 7], [1]),
    ([1, 2, 3], [1, 2]),
  ],
)
def test_the_outlier_is_who_differs_from_most(hashes: list[int], expected: list[int]):
  assert replica_consistency.outliers(np.array(hashes, np.int64)) == expected
