"""From a backbone's feature map to an embedding: what --pooling chooses from."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from facedist import config
from facedist.models import layers


@dataclasses.dataclass(frozen=True)
class Output:
  """The layers of one kind of output.

  Attributes:
    vector: Takes the feature map, float[batch, height, width, channels], and the share
      to drop; returns float[batch, values].
    use_bias: Whether the linear layer after it has a bias.
    epsilon: Added to the variance by the batch norm after that.
  """

  vector: Callable[[tf.Tensor, float], tf.Tensor]
  use_bias: bool = False
  epsilon: float = 1e-3


def average(features: tf.Tensor, dropout: float) -> tf.Tensor:
  """Averages over the map, then drops."""
  vector = tf.keras.layers.GlobalAveragePooling2D(name="pool")(features)
  return _drop(vector, dropout)


def flatten(features: tf.Tensor, dropout: float) -> tf.Tensor:
  """Takes the whole map, then drops."""
  return _drop(tf.keras.layers.Flatten(name="flatten")(features), dropout)


def e_type(features: tf.Tensor, dropout: float) -> tf.Tensor:
  """Output E of ArcFace: batch norm, dropout, all of the map (arXiv:1801.07698)."""
  features = layers.batch_norm(features, name="map_norm")
  return tf.keras.layers.Flatten(name="flatten")(_drop(features, dropout))


def gdconv(features: tf.Tensor, dropout: float) -> tf.Tensor:
  """Weighs each channel's map as a whole, then batch norm (arXiv:1804.07573)."""
  weigh = tf.keras.layers.DepthwiseConv2D(
    features.shape[1:3], use_bias=False, name="gdconv"
  )
  features = layers.batch_norm(weigh(features), name="map_norm")
  return _drop(tf.keras.layers.Flatten(name="flatten")(features), dropout)


OUTPUTS: dict[str, Output] = {
  "avg": Output(average),
  "flatten": Output(flatten),
  "e_type": Output(e_type, use_bias=True, epsilon=1e-5),
  "gdconv": Output(gdconv, epsilon=1e-5),
}


def build(
  feature_shape: tuple[int, ...],
  *,
  embedding_size: int,
  pooling: str,
  batch_norm: bool,
  dropout: float,
) -> tf.keras.Model:
  """Builds the embedding layer: pooling, dropout, linear, and batch norm in float32.

  Args:
    feature_shape: Height, width and channels of the backbone's feature map.
    embedding_size: Floats of an embedding.
    pooling: A key of `OUTPUTS`.
    batch_norm: Whether batch norm follows the linear layer.
    dropout: Share of values dropped before the linear layer.

  Raises:
    errors.UsageError: There is no such pooling.
  """
  output = config.lookup(OUTPUTS, pooling, "pooling")
  features = tf.keras.Input(feature_shape, name="features")
  vector = tf.keras.layers.Dense(
    embedding_size, use_bias=output.use_bias, name="linear"
  )(output.vector(features, dropout))
  vector = tf.keras.layers.Activation("linear", dtype="float32", name="float32")(vector)
  if batch_norm:
    vector = tf.keras.layers.BatchNormalization(
      epsilon=output.epsilon, dtype="float32", name="norm"
    )(vector)
  return tf.keras.Model(features, vector, name="embedding")


def _drop(values: tf.Tensor, share: float) -> tf.Tensor:
  """Drops a share of the values in training."""
  return tf.keras.layers.Dropout(share, name="dropout")(values) if share else values
