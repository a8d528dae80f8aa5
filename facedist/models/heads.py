"""Margin heads: from embeddings and class centres to logits, in float32 always."""

from collections.abc import Callable

import tensorflow as tf


def cosines(embeddings: tf.Tensor, centres: tf.Tensor) -> tf.Tensor:
  """Returns the cosine of every embedding with every class centre.

  Args:
    embeddings: float[batch, embedding], of any length and dtype.
    centres: float32[identities, embedding], of any length.

  Returns:
    float32[batch, identities]; a zero vector has cosine 0 with everything.
  """
  unit_embeddings = tf.math.l2_normalize(tf.cast(embeddings, tf.float32), axis=-1)
  unit_centres = tf.math.l2_normalize(centres, axis=-1)
  return tf.matmul(unit_embeddings, unit_centres, transpose_b=True)


def cosface_logits(
  cosines: tf.Tensor, labels: tf.Tensor, *, margin: float, scale: float
) -> tf.Tensor:
  """Lowers each target cosine by `margin`, then scales (arXiv:1801.09414, eq. 4).

  Args:
    cosines: float32[batch, identities]; unit embedding · unit class centre.
    labels: int32[batch], in [0, identities).
    margin: Cosine units, not radians; 0.35 is usual.
    scale: Inverse softmax temperature; 64 is usual.

  Returns:
    float32[batch, identities] logits.
  """
  is_target = tf.one_hot(labels, tf.shape(cosines)[-1], dtype=cosines.dtype)
  return scale * (cosines - margin * is_target)


MARGINS: dict[str, Callable[..., tf.Tensor]] = {"cosface": cosface_logits}


class MarginHead(tf.Module):
  """Holds the class centres, float32[identities, embedding]."""

  def __init__(self, *, num_identities: int, embedding_size: int, seed: int) -> None:
    super().__init__(name="head")
    initial = tf.random.stateless_normal(
      (num_identities, embedding_size), seed=(seed, 0), stddev=0.01
    )
    self.centres = tf.Variable(initial, name="centres")

  def cosines(self, embeddings: tf.Tensor) -> tf.Tensor:
    """Returns float32[batch, identities] for float[batch, embedding]."""
    return cosines(embeddings, self.centres)
