"""Triplet losses over the whole global batch, by tensorflow-addons, in float32 always.

A triplet is an anchor, another image of the same identity (the positive), and one of
another (the negative); its loss is max(0, d(anchor, positive) - d(anchor, negative) +
margin). Most triplets of a batch soon have none left, so what matters is which are
mined. Distances are those of embeddings of length 1.
"""

import tensorflow as tf

from facedist import addons
from facedist.config import lookup
from facedist.models.heads import replicated

_HALF_WORD = 1 << 16

TRIPLET_LOSSES = {"triplet_semihard": "squared-L2", "triplet_hard": "L2"}
"""The distance of each, by its name in tensorflow-addons.

triplet_semihard: FaceNet's (arXiv:1503.03832, section 3). The mean over all pairs of
  anchor and positive, each with the nearest negative that is farther than the positive,
  or with the farthest of all where none is.
triplet_hard: Batch hard (arXiv:1703.07737, section 2). The mean over all anchors, each
  with its farthest positive and its nearest negative; an anchor without a positive
  counts with a distance of 0 to it.
"""

FARTHEST = {"squared-L2": 4.0, "L2": 2.0}
"""The largest value of each distance between vectors of length 1."""


def triplet_loss(
  embeddings: tf.Tensor, labels: tf.Tensor, *, kind: str, margin: float
) -> tf.Tensor:
  """Returns the mean loss of the triplets that are mined in a batch.

  Args:
    embeddings: float[batch, embedding], of any length and dtype.
    labels: int32[batch].
    kind: A key of `TRIPLET_LOSSES`.
    margin: In the loss's own distance between unit vectors, which is at most 2, or 4
      where it is squared.

  Returns:
    float32[]; 0, with a gradient of zero, where no two are of one identity or none is
    of another. The distance of equal embeddings is 0 and has a gradient of zero.

  Raises:
    errors.UsageError: There is no such loss, or tensorflow-addons is not installed.
  """
  distance = lookup(TRIPLET_LOSSES, kind, "metric_loss")
  function = addons.get(kind)
  vectors = replicated.unit(tf.cast(embeddings, tf.float32))
  alike = tf.math.count_nonzero(labels[:, None] == labels[None, :], dtype=tf.int32)
  batch = tf.size(labels)
  return tf.cond(
    (alike > batch) & (alike < batch * batch),  # each is like itself, which is no pair
    lambda: function(labels, vectors, margin, distance_metric=distance),
    lambda: 0.0 * tf.reduce_sum(vectors),
  )


def gather(embeddings: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns what all replicas hold together; called in replica context.

  It is a sum over replicas, of rows that are zero but for the replica's own. So the
  gradient is the sum of those that come back on all replicas: exact where each takes
  its own share of the mean loss.

  Args:
    embeddings: float32[batch, embedding]; all replicas' batches are of one size.
    labels: int32[batch], at least 0.

  Returns:
    float32[global_batch, embedding] and int32[global_batch], the same on every replica.
  """
  context = tf.distribute.get_replica_context()
  replicas = context.num_replicas_in_sync
  if replicas == 1:
    return embeddings, labels
  # float32 holds integers up to 2^24 exactly: halves of a label, but not every label
  halves = tf.stack([labels // _HALF_WORD, labels % _HALF_WORD], axis=1)
  rows = tf.concat([embeddings, tf.cast(halves, tf.float32)], axis=1)
  place = tf.cast(context.replica_id_in_sync_group, tf.int32)
  is_mine = tf.equal(tf.range(replicas), place)[:, None, None]
  everyone = context.all_reduce(
    tf.distribute.ReduceOp.SUM, tf.where(is_mine, rows[None], 0.0)
  )
  vectors, high, low = tf.split(
    tf.reshape(everyone, [-1, rows.shape[1]]), [rows.shape[1] - 2, 1, 1], axis=1
  )
  found = tf.cast(high, tf.int32) * _HALF_WORD + tf.cast(low, tf.int32)
  return vectors, found[:, 0]
