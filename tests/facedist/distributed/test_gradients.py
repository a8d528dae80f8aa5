"""Sums over replicas."""

import numpy as np
import tensorflow as tf

from facedist.distributed import collectives

SHAPES = ((2,), (3, 1), (4,), (1, 5), (6,))
OWN = 1


def _parts(replica: tf.Tensor) -> list[tf.Tensor]:
  """One replica's gradients; no two values of them are the same."""
  factor = tf.cast(replica + 1, tf.float32)
  return [
    factor * (100.0 * number + tf.reshape(tf.range(float(np.prod(shape))), shape))
    for number, shape in enumerate(SHAPES)
  ]


def test_each_gradient_is_its_own_sum_and_the_norm_that_of_all(
  two_replicas: tf.distribute.MirroredStrategy,
):
  @tf.function
  def summed() -> tuple[list[tf.Tensor], tf.Tensor]:
    context = tf.distribute.get_replica_context()
    parts = _parts(context.replica_id_in_sync_group)
    norm = tf.linalg.global_norm(parts)
    return collectives.over_replicas(
      parts, tf.constant([1.0, 2.0]), norm=norm, num_head=2, num_own=OWN
    )

  per_replica = [_parts(tf.constant(replica)) for replica in range(2)]
  whole = [first + second for first, second in zip(*per_replica, strict=True)][:-OWN]
  own = [parts[-1] for parts in per_replica]
  norm = tf.linalg.global_norm([*whole, *own])
  found, sums = two_replicas.run(summed)
  for replica in range(2):
    values = [two_replicas.experimental_local_results(part)[replica] for part in found]
    for value, expected in zip(values, [*whole, own[replica]], strict=True):
      np.testing.assert_allclose(value, expected, rtol=1e-6)
  for row in two_replicas.experimental_local_results(sums):
    np.testing.assert_allclose(row, [2.0, 4.0, norm], rtol=1e-6)
