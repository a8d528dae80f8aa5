"""What two heads remember between steps, as functions of the global batch's sums.

The sums of one replica add up over all replicas; what follows from the total is so the
same on each of them.
"""

import tensorflow as tf

_NORM_RANGE = (1e-3, 100.0)
_ROOM = 1e-3  # keeps the score finite where all norms are the same


def curriculum_sums(target: tf.Tensor) -> tf.Tensor:
  """Returns float[2]: number and sum of the target cosines, float[batch]."""
  return tf.stack([_count(target), tf.reduce_sum(tf.stop_gradient(target))])


def next_curriculum(
  memory: tf.Tensor, sums: tf.Tensor, *, momentum: float
) -> tf.Tensor:
  """Moves CurricularFace's t to the mean target cosine (arXiv:2004.00288, section 3.2).

  t ← momentum · t + (1 - momentum) · mean. The paper's formula has the two weights the
  other way round (t ← α r + (1 - α) t, α = 0.99); this is its code's, head/metrics.py.

  Args:
    memory: float[1], t.
    sums: float[2] of `curriculum_sums`, over the global batch.
    momentum: Weight of what was; 0.99 is usual.
  """
  mean = sums[1:] / sums[:1]
  return momentum * memory + (1 - momentum) * mean


def norm_sums(memory: tf.Tensor, norms: tf.Tensor) -> tf.Tensor:
  """Returns float[3]: number, sum and sum of squares of norms less the running mean.

  Taking away a number near the mean keeps the squares small, and the variance exact.

  Args:
    memory: float[2], running mean and standard deviation.
    norms: float[batch] lengths of the embeddings.
  """
  difference = _clipped(norms) - memory[0]
  squares = tf.reduce_sum(difference * difference)
  return tf.stack([_count(norms), tf.reduce_sum(difference), squares])


def next_norms(memory: tf.Tensor, sums: tf.Tensor, *, momentum: float) -> tf.Tensor:
  """Moves AdaFace's mean and deviation of norms (arXiv:2204.00964, image quality).

  x ← momentum · x + (1 - momentum) · batch's, as in the authors' code; the paper's
  formula has these weights, too, the other way round.

  Args:
    memory: float[2], running mean and standard deviation.
    sums: float[3] of `norm_sums`, over the global batch.
    momentum: Weight of what was; 0.99 is usual.
  """
  count, total, squares = tf.unstack(sums)
  offset = total / count
  variance = (squares - total * offset) / tf.maximum(count - 1, 1)
  deviation = tf.sqrt(tf.maximum(variance, 0))
  now = tf.stack([memory[0] + offset, deviation])
  return momentum * memory + (1 - momentum) * now


def norm_score(
  memory: tf.Tensor, norms: tf.Tensor, *, concentration: float
) -> tf.Tensor:
  """Returns AdaFace's ẑ = clip((‖z‖ - μ) / (σ / h), -1, 1) (arXiv:2204.00964).

  Args:
    memory: float[2], μ and σ.
    norms: float[batch], ‖z‖.
    concentration: h; 0.333 is usual: three deviations from μ reach the ends.

  Returns:
    float[batch], without gradient.
  """
  score = (_clipped(norms) - memory[0]) / (memory[1] + _ROOM) * concentration
  return tf.clip_by_value(score, -1, 1)


def _clipped(norms: tf.Tensor) -> tf.Tensor:
  """Returns norms without gradient; the few that are huge must not rule the mean."""
  return tf.clip_by_value(tf.stop_gradient(norms), *_NORM_RANGE)


def _count(values: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.size(values), values.dtype)
