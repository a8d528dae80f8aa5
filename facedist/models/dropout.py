"""Dropout that is a function of the sample, not of a generator's hidden state."""

import tensorflow as tf

from facedist.models import hashing


class SampleDropout(tf.keras.layers.Layer):
  """Drops a share of each sample's values in training (arXiv:1207.0580).

  Which ones, a hash of the sample's key and the value's place says. So a run that goes
  on from a checkpoint, or on other replicas, drops what it would have dropped.
  """

  def __init__(self, rate: float, *, name: str = "dropout") -> None:
    """Makes the layer; `rate` is the share that is dropped, in [0, 1)."""
    super().__init__(name=name)
    self.rate = rate

  def call(
    self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False
  ) -> tf.Tensor:
    """Returns float[batch, ...], what is kept divided by 1 - rate.

    Args:
      inputs: Values, float[batch, ...], and keys, int32[batch].
      training: Whether anything is dropped.
    """
    values, keys = inputs
    if not training:
      return values
    places = tf.range(tf.reduce_prod(tf.shape(values)[1:]), dtype=tf.int32)
    hashes = hashing.combine(
      0, tf.cast(keys[:, None], tf.int64), tf.cast(places, tf.int64)
    )
    is_dropped = tf.reshape(hashing.is_below(hashes, self.rate), tf.shape(values))
    kept = values / tf.cast(1 - self.rate, values.dtype)
    return tf.where(is_dropped, tf.zeros([], values.dtype), kept)
