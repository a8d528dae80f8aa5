"""Hashes of the weights, compared over replicas."""

import struct

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import replica_consistency


def test_the_hash_is_the_weighted_sum_of_the_bits():
  values = [1.5, -2.0, 0.0]
  expected = 0
  for place, value in enumerate(values):
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    expected += bits * (place * (0x5851F42D4C957F2D - 1) + 1)
  expected = (expected + 2**63) % 2**64 - 2**63
  assert replica_consistency.hash_bits([tf.constant(values)]).numpy() == expected


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_one_flipped_bit_changes_the_hash(place: tuple[int, int]):
  weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
  other = np.ones(4, np.float32)
  flipped = weights.copy()
  flipped.view(np.int32)[place] ^= 1
  hashes = [
    replica_consistency.hash_bits([tf.constant(one), tf.constant(other)]).numpy()
    for one in (weights, flipped)
  ]
  assert hashes[0] != hashes[1]


def test_exchanged_weights_change_the_hash():
  one, two = tf.constant([1.0, 2.0]), tf.constant([2.0, 1.0])
  assert (
    replica_consistency.hash_bits([one]).numpy()
    != replica_consistency.hash_bits([two]).numpy()
  )
  assert replica_consistency.hash_bits([one, two]).numpy() != (
    replica_consistency.hash_bits([two, one]).numpy()
  )


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
