"""Collects the embeddings of the global batch on every replica."""

import tensorflow as tf

_HALF_WORD = 1 << 16


def this_replica() -> int:
  """Returns the calling replica's number, which is known when its step is traced."""
  context = tf.distribute.get_replica_context()
  return int(tf.get_static_value(context.replica_id_in_sync_group))


def gather_batch(
  embeddings: tf.Tensor, labels: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns all replicas' embeddings and labels; call in replica context.

  It is one sum over replicas, of rows that are zero but for the replica's own.
  TensorFlow's own gathering does not use NCCL, exchanges shapes first, and has this sum
  as its gradient anyway. The gradient by a replica's embeddings is the sum of those
  that come back on all replicas. That is exact where each replica takes only its own
  part of the mean loss.

  Args:
    embeddings: float32[batch, embedding]; all replicas have the same batch size.
    labels: int32[batch], at least 0.

  Returns:
    float32[global_batch, embedding] and int32[global_batch], in the order of the
    replicas and the same on each.
  """
  context = tf.distribute.get_replica_context()
  replicas = context.num_replicas_in_sync
  if replicas == 1:
    return embeddings, labels
  # float32 holds integers up to 2^24 exactly: halves of a label, but not every label.
  halves = tf.stack([labels // _HALF_WORD, labels % _HALF_WORD], axis=-1)
  packed = tf.concat([embeddings, tf.cast(halves, tf.float32)], axis=-1)
  batch, place = tf.shape(labels)[0], this_replica()
  padding = [[place * batch, (replicas - 1 - place) * batch], [0, 0]]
  gathered = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.pad(packed, padding))
  high, low = tf.unstack(tf.cast(gathered[:, -2:], labels.dtype), num=2, axis=-1)
  return gathered[:, :-2], high * _HALF_WORD + low
