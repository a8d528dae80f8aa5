"""The running statistics of two heads, as functions of the global batch's sums.

Every replica computes the sums of its own batch. They are added up over replicas, so
the statistics that follow from the total are the same on each replica.
"""

import tensorflow as tf

_NORM_RANGE = (1e-3, 100.0)
_EPSILON = 1e-3  # keeps the score finite where all norms are the same


def curriculum_sums(target: tf.Tensor) -> tf.Tensor:
  """Returns float[2]: number and sum of the target cosines, float[batch]."""
  return tf.stack([_count(target), tf.reduce_sum(tf.stop_gradient(target))])


def next_curriculum(
  statistics: tf.Tensor, sums: tf.Tensor, *, momentum: float
) -> tf.Tensor:
  """Moves CurricularFace's t to the mean target cosine (arXiv:2004.00288, section 3.2).

  t ← momentum · t + (1 - momentum) · mean. The paper's formula has the two weights the
  other way round (t ← α r + (1 - α) t, α = 0.99); this is its code's, head/metrics.py.

  Args:
    statistics: float[1], t.
    sums: float[2] of `curriculum_sums`, over the global batch.
    momentum: Weight of the old t.
  """
  mean = sums[1:] / sums[:1]
  return momentum * statistics + (1 - momentum) * mean


def norm_sums(statistics: tf.Tensor, norms: tf.Tensor) -> tf.Tensor:
  """Returns float[3]: number, sum and sum of squares of norms minus the running mean.

  Subtracting a number near the mean keeps the squares small, and the variance exact.

  Args:
    statistics: float[2], running mean and standard deviation.
    norms: float[batch], L2 norms of the embeddings.
  """
  difference = _clipped(norms) - statistics[0]
  squares = tf.reduce_sum(difference * difference)
  return tf.stack([_count(norms), tf.reduce_sum(difference), squares])


def next_norms(statistics: tf.Tensor, sums: tf.Tensor, *, momentum: float) -> tf.Tensor:
  """Moves AdaFace's mean and deviation of norms (arXiv:2204.00964, image quality).

  x ← momentum · x + (1 - momentum) · the batch's, as in the authors' code; the paper's
  formula has these two weights the other way round.

  Args:
    statistics: float[2], running mean and standard deviation.
    sums: float[3] of `norm_sums`, over the global batch.
    momentum: Weight of the old statistics.
  """
  count, total, squares = tf.unstack(sums)
  offset = total / count
  variance = (squares - total * offset) / tf.maximum(count - 1, 1)
  deviation = tf.sqrt(tf.maximum(variance, 0))
  of_batch = tf.stack([statistics[0] + offset, deviation])
  return momentum * statistics + (1 - momentum) * of_batch


def norm_score(
  statistics: tf.Tensor, norms: tf.Tensor, *, concentration: float
) -> tf.Tensor:
  """Returns AdaFace's ẑ = clip((‖z‖ - μ) / (σ / h), -1, 1) (arXiv:2204.00964).

  Args:
    statistics: float[2], μ and σ.
    norms: float[batch], ‖z‖.
    concentration: h; with the default of 0.333, three deviations from μ give ±1.

  Returns:
    float[batch], without gradient.
  """
  deviations = (_clipped(norms) - statistics[0]) / (statistics[1] + _EPSILON)
  return tf.clip_by_value(deviations * concentration, -1, 1)


def _clipped(norms: tf.Tensor) -> tf.Tensor:
  """Returns norms without gradient, clipped so that a few huge ones do not dominate."""
  return tf.clip_by_value(tf.stop_gradient(norms), *_NORM_RANGE)


def _count(values: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.size(values), values.dtype)
