"""Checks that mirrored weights are the same on all replicas, by comparing hashes.

Training sums gradients and never compares weights. So a replica that restored another
checkpoint, or whose memory flipped a bit, would train on unnoticed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

_MULTIPLIER = 0x5851F42D4C957F2D  # odd, of Knuth's MMIX generator


def hash_loop(
  variables: Sequence[tf.Variable], strategy: tf.distribute.Strategy
) -> Callable[[], tf.Tensor]:
  """Compiles the comparison.

  Args:
    variables: Mirrored, float32; batch norm's averages differ by design.
    strategy: Whose replicas hold them.

  Returns:
    A function that returns int64[replicas], each replica's hash of the bits of all
    variables; the same on every worker.
  """
  num_replicas = strategy.num_replicas_in_sync

  def replica_hashes() -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    place = tf.cast(context.replica_id_in_sync_group, tf.int32)
    own = hash_bits([variable.read_value() for variable in variables])
    row = tf.one_hot(place, num_replicas, on_value=own, off_value=tf.zeros_like(own))
    return context.all_reduce(tf.distribute.ReduceOp.SUM, row)

  @tf.function(autograph=False)
  def hashes() -> tf.Tensor:
    return strategy.experimental_local_results(strategy.run(replica_hashes))[0]

  return hashes


def hash_bits(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
  """Returns int64[]: Σ bits · odd weight of their place, modulo 2⁶⁴, over all tensors.

  Odd weights are invertible modulo 2⁶⁴, so any single changed value changes the sum.
  """
  total = tf.zeros([], tf.int64)
  for number, tensor in enumerate(tensors):
    bits = tf.cast(tf.reshape(tf.bitcast(tensor, tf.int32), [-1]), tf.int64)
    places = tf.range(tf.size(bits, tf.int64), dtype=tf.int64)
    weights = (places + number) * (_MULTIPLIER - 1) + 1  # odd
    total = total * 31 + tf.reduce_sum(bits * weights)
  return total


def outliers(hashes: np.ndarray) -> list[int]:
  """Returns the replicas whose hash differs from the most common one.

  Between equally common hashes that of replica 0 counts as right, since the chief's
  weights are the ones that are saved.

  Args:
    hashes: int64[replicas].
  """
  values, counts = np.unique(hashes, return_counts=True)
  most = set(values[counts == counts.max()].tolist())
  right = hashes[0] if hashes[0].item() in most else max(most)
  return np.flatnonzero(hashes != right).tolist()
