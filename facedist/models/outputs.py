"""From a backbone's feature map to an embedding: what --pooling chooses from."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from facedist import config
from facedist.models import layers
from facedist.models.dropout import SampleDropout

Drop: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Output:
  """The layers of one kind of output.

  Attributes:
    vector: Takes the feature map, float[batch, height, width, channels], and what
      drops values in training; returns float[batch, values].
    use_bias: Whether the linear layer after it has a bias.
    epsilon: Added to the variance by the batch norm after that.
  """

  vector: Callable[[tf.Tensor, Drop], tf.Tensor]
  use_bias: bool = False
  epsilon: float = 1e-3


def average(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Averages over the map, then drops."""
  vector = tf.keras.layers.GlobalAveragePooling2D(name="pool")(features)
  return drop(vector)


def flatten(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Takes the whole map, then drops."""
  return drop(tf.keras.layers.Flatten(name="flatten")(features))


def e_type(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Output E of ArcFace: batch norm, dropout, all of the map (arXiv:1801.07698)."""
  features = layers.batch_norm(features, name="map_norm")
  return tf.keras.layers.Flatten(name="flatten")(drop(features))


def gdconv(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Weighs each channel's map as a whole, then batch norm (arXiv:1804.07573)."""
  weigh = tf.keras.layers.DepthwiseConv2D(
    features.shape[1:3], use_bias=False, name="gdconv"
  )
  features = layers.batch_norm(weigh(features), name="map_norm")
  return drop(tf.keras.layers.Flatten(name="flatten")(features))


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

  With dropout, the model takes int32[batch] beside the feature map: a key a sample,
  which says what is dropped of it.

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
  keys = tf.keras.Input((), dtype=tf.int32, name="keys")

  def drop(values: tf.Tensor) -> tf.Tensor:
    return SampleDropout(dropout)((values, keys)) if dropout else values

  vector = tf.keras.layers.Dense(
    embedding_size, use_bias=output.use_bias, name="linear"
  )(output.vector(features, drop))
  vector = tf.keras.layers.Activation("linear", dtype="float32", name="float32")(vector)
  if batch_norm:
    vector = tf.keras.layers.BatchNormalization(
      epsilon=output.epsilon, dtype="float32", name="norm"
    )(vector)
  inputs = [features, keys] if dropout else features
  return tf.keras.Model(inputs, vector, name="embedding")
