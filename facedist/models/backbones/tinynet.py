"""A small residual network without batch statistics, for demos and tests."""

import tensorflow as tf

from facedist.models.backbones import layers


def build(image_size: int) -> tf.keras.Model:
  """Builds a residual net of 0.8 M parameters with group norm.

  No batch statistics: an image's features do not depend on its batch, so results do
  not depend on how a global batch is split over replicas. Takes
  float32[batch, S, S, 3] in [0, 255]; returns float[batch, S/16, S/16, 192].
  """
  images = layers.pixels(image_size)
  features = layers.centred(images)
  for stage, filters in enumerate((32, 64, 128, 192), 1):
    features = _stage(features, filters, name=f"stage{stage}")
  return tf.keras.Model(images, features, name="tinynet")


def _stage(features: tf.Tensor, filters: int, *, name: str) -> tf.Tensor:
  """A strided convolution and one residual block."""
  features = _conv_norm(features, filters, strides=2, name=f"{name}_down")
  residual = _conv_norm(features, filters, strides=1, name=f"{name}_residual")
  return tf.keras.layers.Add(name=f"{name}_add")([features, residual])


def _conv_norm(
  features: tf.Tensor, filters: int, *, strides: int, name: str
) -> tf.Tensor:
  """3×3 convolution, group norm over 8 channels a group, ReLU."""
  features = tf.keras.layers.Conv2D(
    filters,
    3,
    strides=strides,
    padding="same",
    use_bias=False,
    kernel_initializer="he_normal",
    name=f"{name}_conv",
  )(features)
  norm = tf.keras.layers.GroupNormalization(groups=filters // 8, name=f"{name}_norm")
  return tf.keras.layers.ReLU(name=f"{name}_relu")(norm(features))
