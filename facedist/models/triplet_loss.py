"""Triplet losses of a batch, always in float32.

A triplet is an anchor, another image of the same identity (the positive), and an image
of another identity (the negative). Its loss is max(0, d(anchor, positive) - d(anchor,
negative) + margin), with distances between embeddings of norm 1. Most triplets soon
have a loss of 0, so the two losses mine the batch for those that do not.
"""

import tensorflow as tf

from facedist import addons
from facedist.config import lookup
from facedist.models.heads import replicated

TRIPLET_LOSSES = {"triplet_semihard": "squared-L2", "triplet_hard": "L2"}
"""The distance of each loss, a key of `addons.FEATURES`.

triplet_semihard: FaceNet's (arXiv:1503.03832, section 3). The mean over all pairs of
  anchor and positive, each with the nearest negative that is farther than the positive,
  or with the farthest negative where none is.
triplet_hard: Batch hard (arXiv:1703.07737, section 2). The mean over all anchors, each
  with its farthest positive and its nearest negative; an anchor without a positive
  counts with a distance of 0 to it.
"""

MAX_DISTANCES = {"squared-L2": 4.0, "L2": 2.0}
"""The largest value of each distance between vectors of norm 1."""


def triplet_loss(
  embeddings: tf.Tensor, labels: tf.Tensor, *, kind: str, margin: float
) -> tf.Tensor:
  """Returns the mean loss of the triplets that are mined in a batch.

  Args:
    embeddings: float[batch, embedding], of any norm and dtype.
    labels: int32[batch].
    kind: A key of `TRIPLET_LOSSES`.
    margin: In the loss's own distance between unit vectors, which is at most 2, or 4
      where it is squared.

  Returns:
    float32[]; 0, with a gradient of zero, where no two are of one identity or none is
    of another. The distance of equal embeddings is 0 and has a gradient of zero.

  Raises:
    errors.UsageError: There is no such loss.
  """
  distance = lookup(TRIPLET_LOSSES, kind, "metric_loss")
  function = addons.get(kind)
  vectors = replicated.unit(tf.cast(embeddings, tf.float32))
  same = tf.math.count_nonzero(labels[:, None] == labels[None, :], dtype=tf.int32)
  batch = tf.size(labels)  # each label equals itself, which is not a pair
  return tf.cond(
    (same > batch) & (same < batch * batch),
    lambda: function(labels, vectors, margin, distance_metric=distance),
    lambda: 0.0 * tf.reduce_sum(vectors),
  )
