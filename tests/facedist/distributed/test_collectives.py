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
  def summed() -> tuple[collectives.Gradients, list[tf.Tensor], tf.Tensor]:
    context = tf.distribute.get_replica_context()
    parts = _parts(context.replica_id_in_sync_group)
    gradients = collectives.Gradients(parts[:2], parts[2:4], parts[4:])
    values = [tf.constant([1.0, 2.0]), tf.constant([3.0])]
    norm = tf.linalg.global_norm(parts)
    return collectives.sum_gradients(gradients, values, norm=norm)

  per_replica = [_parts(tf.constant(replica)) for replica in range(2)]
  whole = [first + second for first, second in zip(*per_replica, strict=True)][:-OWN]
  own = [parts[-1] for parts in per_replica]
  norm = tf.linalg.global_norm([*whole, *own])
  gradients, values, found_norm = two_replicas.run(summed)

  def of(replica: int, value: object) -> np.ndarray:
    return two_replicas.experimental_local_results(value)[replica].numpy()

  for replica in range(2):
    for value, expected in zip(gradients.flat(), [*whole, own[replica]], strict=True):
      np.testing.assert_allclose(of(replica, value), expected, rtol=1e-6)
    np.testing.assert_array_equal(of(replica, values[0]), [2.0, 4.0])
    np.testing.assert_array_equal(of(replica, values[1]), [6.0])
    np.testing.assert_allclose(of(replica, found_norm), norm, rtol=1e-6)
