"""The whole network: a backbone, and the embedding layer over its feature map."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

import tensorflow as tf

from facedist.config import lookup
from facedist.models import random
from facedist.models.backbones import layers, registry
from facedist.models.heads import class_weights

Drop: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
"""Drops values of float[batch, ...] in training; the identity without dropout."""


class FaceNetwork(tf.Module):
  """A backbone and the embedding layer over it."""

  def __init__(
    self, *, backbone: tf.keras.Model, embedding: tf.keras.Model, image_size: int
  ) -> None:
    super().__init__(name="network")
    self.backbone = backbone
    self.embedding = embedding
    self.image_size = image_size

  def embed(
    self,
    images: tf.Tensor,
    *,
    training: bool = False,
    training_backbone: bool | None = None,
    draws: tf.Tensor | None = None,
  ) -> tf.Tensor:
    """Returns raw embeddings, not normalised.

    Args:
      images: uint8 or float32[batch, S, S, 3], RGB in [0, 255].
      training: Whether dropout and batch statistics are in use.
      training_backbone: The same for the backbone alone; `training` if none.
      draws: float32[batch], random numbers that decide what is dropped of each sample
        in training; not needed without dropout.

    Returns:
      float32[batch, embedding].
    """
    in_backbone = training if training_backbone is None else training_backbone
    features = self.backbone(tf.cast(images, tf.float32), training=in_backbone)
    if len(self.embedding.inputs) == 1:
      return self.embedding(features, training=training)
    if training and draws is None:
      raise ValueError("dropout in training needs a draw for each sample")
    keys = tf.zeros(tf.shape(images)[:1]) if draws is None else draws
    return self.embedding([features, tf.bitcast(keys, tf.int32)], training=training)


@tf.autograph.experimental.do_not_convert
def build_network(
  *,
  backbone: str,
  image_size: int,
  embedding_size: int,
  policy: str,
  pooling: str = "auto",
  embedding_batch_norm: bool = True,
  dropout: float | None = None,
  batch_norm_momentum: float = 0.99,
  sync_batch_norm: bool = False,
  freeze_until: str | None = None,
) -> FaceNetwork:
  """Builds a network with random weights under the precision policy.

  Args:
    backbone: A key of `registry.BACKBONES`.
    image_size: Height and width in pixels.
    embedding_size: Floats of an embedding.
    policy: Keras' name of the precision, such as mixed_bfloat16.
    pooling: A key of `POOLINGS`, or auto for the backbone's default.
    embedding_batch_norm: Whether batch norm follows the embedding layer.
    dropout: Fraction of features dropped before the embedding layer; none for the
      backbone's default.
    batch_norm_momentum: Of the moving averages, for all layers.
    sync_batch_norm: Whether batch statistics are those of the global batch.
    freeze_until: The last of the backbone's layers that do not train; with none, all
      train.

  Raises:
    errors.UsageError: There is no such backbone, pooling or layer, or the backbone
      takes no images of that size.
  """
  defaults = lookup(registry.BACKBONES, backbone, "backbone")
  with _policy(policy):
    trunk = registry.build(backbone, image_size)
    embedding = build_embedding_layer(
      trunk.output_shape[1:],
      embedding_size=embedding_size,
      pooling=defaults.pooling if pooling == "auto" else pooling,
      batch_norm=embedding_batch_norm,
      dropout=defaults.dropout if dropout is None else dropout,
    )
  for layer in (*trunk.layers, *embedding.layers):
    if isinstance(layer, tf.keras.layers.BatchNormalization):
      layer.momentum = batch_norm_momentum
      if sync_batch_norm:
        # Keras applications make their own layers. These two attributes are all that
        # distinguishes them from SynchronizedBatchNormalization, which is not fused.
        layer.synchronized, layer.fused = True, False
  if freeze_until:
    registry.freeze(trunk, freeze_until)
  return FaceNetwork(backbone=trunk, embedding=embedding, image_size=image_size)


@contextlib.contextmanager
def _policy(name: str) -> Iterator[None]:
  """Sets Keras' global policy for the layers made in the body, then restores it."""
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(name)
  try:
    yield
  finally:
    tf.keras.mixed_precision.set_global_policy(before)


def is_decayed(variable: tf.Variable) -> bool:
  """Returns whether weight decay applies: to kernels and class weights only."""
  name = variable.name.split(":")[0].rsplit("/", 1)[-1]
  return name.endswith("kernel") or name == class_weights.CLASS_WEIGHTS


def build_embedding_layer(
  feature_shape: tuple[int, ...],
  *,
  embedding_size: int,
  pooling: str,
  batch_norm: bool,
  dropout: float,
) -> tf.keras.Model:
  """Builds the embedding layer: pooling, dropout, linear, and batch norm in float32.

  With dropout, the model also takes int32[batch], a key for each sample; the values
  that are dropped of a sample depend on its key.

  Args:
    feature_shape: Height, width and channels of the backbone's feature map.
    embedding_size: Floats of an embedding.
    pooling: A key of `POOLINGS`.
    batch_norm: Whether batch norm follows the linear layer.
    dropout: Fraction of values dropped before the linear layer.

  Raises:
    errors.UsageError: There is no such pooling.
  """
  layer = lookup(POOLINGS, pooling, "pooling")
  features = tf.keras.Input(feature_shape, name="features")
  keys = tf.keras.Input((), dtype=tf.int32, name="keys")

  def drop(values: tf.Tensor) -> tf.Tensor:
    return SampleDropout(dropout)((values, keys)) if dropout else values

  vector = tf.keras.layers.Dense(
    embedding_size, use_bias=layer.use_bias, name="linear"
  )(layer.vector(features, drop))
  vector = tf.keras.layers.Activation("linear", dtype="float32", name="float32")(vector)
  if batch_norm:
    vector = tf.keras.layers.BatchNormalization(
      epsilon=layer.epsilon, dtype="float32", name="norm"
    )(vector)
  inputs = [features, keys] if dropout else features
  return tf.keras.Model(inputs, vector, name="embedding")


@dataclasses.dataclass(frozen=True)
class Pooling:
  """How a feature map becomes the input of the linear layer, and that layer's options.

  Attributes:
    vector: Takes the feature map, float[batch, height, width, channels], and a function
      that drops values in training; returns float[batch, values].
    use_bias: Whether the linear layer has a bias.
    epsilon: Added to the variance by the batch norm after the linear layer.
  """

  vector: Callable[[tf.Tensor, Drop], tf.Tensor]
  use_bias: bool = False
  epsilon: float = 1e-3


def average(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Averages over the map, then drops."""
  vector = tf.keras.layers.GlobalAveragePooling2D(name="pool")(features)
  return drop(vector)


def flatten(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Flattens the whole map, then drops."""
  return drop(tf.keras.layers.Flatten(name="flatten")(features))


def e_type(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Output E of ArcFace: batch norm, dropout, flatten (arXiv:1801.07698)."""
  features = layers.batch_norm(features, name="map_norm")
  return tf.keras.layers.Flatten(name="flatten")(drop(features))


def gdconv(features: tf.Tensor, drop: Drop) -> tf.Tensor:
  """Global depthwise convolution, batch norm, then dropout (arXiv:1804.07573)."""
  convolve = tf.keras.layers.DepthwiseConv2D(
    features.shape[1:3], use_bias=False, name="gdconv"
  )
  features = layers.batch_norm(convolve(features), name="map_norm")
  return drop(tf.keras.layers.Flatten(name="flatten")(features))


POOLINGS: dict[str, Pooling] = {
  "avg": Pooling(average),
  "flatten": Pooling(flatten),
  "e_type": Pooling(e_type, use_bias=True, epsilon=1e-5),
  "gdconv": Pooling(gdconv, epsilon=1e-5),
}
"""The poolings by --pooling."""


class SampleDropout(tf.keras.layers.Layer):
  """Drops a fraction of each sample's values in training (arXiv:1207.0580).

  A hash of the sample's key and the value's index decides which. It needs no generator,
  whose state would be in no checkpoint, so a resumed run drops the same values as an
  uninterrupted one, on any number of replicas.
  """

  def __init__(self, rate: float, *, name: str = "dropout") -> None:
    """Makes the layer; `rate` is the fraction that is dropped, in [0, 1)."""
    super().__init__(name=name)
    self.rate = rate

  def call(
    self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False
  ) -> tf.Tensor:
    """Returns float[batch, ...], with the values that are kept divided by 1 - rate.

    Args:
      inputs: Values, float[batch, ...], and keys, int32[batch].
      training: Whether anything is dropped.
    """
    values, keys = inputs
    if not training:
      return values
    places = tf.range(tf.reduce_prod(tf.shape(values)[1:]), dtype=tf.int32)
    hashes = random.combine(
      0, tf.cast(keys[:, None], tf.int64), tf.cast(places, tf.int64)
    )
    is_dropped = tf.reshape(random.is_below(hashes, self.rate), tf.shape(values))
    kept = values / tf.cast(1 - self.rate, values.dtype)
    return tf.where(is_dropped, tf.zeros([], values.dtype), kept)
