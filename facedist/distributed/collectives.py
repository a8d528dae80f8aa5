"""Gradients of variables that all replicas mirror, and of those that one holds."""

from typing import TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


def over_replicas(
  gradients: list[Gradient],
  sums: tf.Tensor,
  *,
  norm: tf.Tensor,
  num_head: int,
  num_own: int,
) -> tuple[list[Gradient], tf.Tensor]:
  """Adds up over replicas; called in replica context.

  Args:
    gradients: One replica's parts, the head's, then the backbone's; the last `num_own`
      are of variables that this replica alone holds, so they are whole already.
    sums: float32[n] that travel with them, and so cost no collective of their own.
    norm: float32[], the global norm of this replica's gradients.
    num_head: How many are of the head.
    num_own: How many are not added up.

  Returns:
    The gradients, and float32[n + 1]: the sums and the global norm of all gradients.
  """
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync == 1:
    return gradients, tf.concat([sums, [norm]], axis=0)
  split = len(gradients) - num_own
  own = gradients[split:]
  squares = tf.square(tf.linalg.global_norm(own)) if own else tf.zeros([])
  sums = tf.concat([sums, [squares]], axis=0)
  # From the last to the first is the order in which they are there, the head's and then
  # the last layers' before all, and in which TensorFlow sends them off.
  head, backbone = gradients[:num_head], gradients[num_head:split]
  sums, *reduced = context.all_reduce(
    tf.distribute.ReduceOp.SUM, [sums, *backbone, *head]
  )
  shared = [*reduced[len(backbone) :], *reduced[: len(backbone)]]
  total = tf.linalg.global_norm(shared)
  if own:
    total = tf.sqrt(tf.square(total) + sums[-1])
  return [*shared, *own], tf.concat([sums[:-1], [total]], axis=0)
