"""MobileFaceNet (arXiv:1804.07573), a network of a million parameters."""

import tensorflow as tf

from facedist.models.backbones import layers

# Table 1 of the paper: expansion, channels, repeats and stride of each row
_BOTTLENECKS = (
  (2, 64, 5, 2),
  (4, 128, 1, 2),
  (2, 128, 6, 1),
  (4, 128, 1, 2),
  (2, 128, 2, 1),
)


def build(image_size: int) -> tf.keras.Model:
  """Builds MobileFaceNet without its output layers, which are --pooling=gdconv.

  With them, for 128-float embeddings at 112 px, it has 221 M multiply-adds and 0.99 M
  parameters, both as in the paper, with batch norm folded into the convolutions
  (1.00 M without folding).

  Args:
    image_size: S, height and width in pixels; a multiple of 16.

  Returns:
    A model from float32[batch, S, S, 3] in [0, 255] to float[batch, S/16, S/16, 512].
  """
  images = layers.pixels(image_size)
  features = layers.conv(
    layers.centred(images), 64, kernel=3, strides=2, name="stem_conv"
  )
  features = _norm_prelu(features, name="stem_conv")
  features = layers.depthwise(features, strides=1, name="stem_depthwise")
  features = _norm_prelu(features, name="stem_depthwise")
  for row, (expansion, channels, repeats, strides) in enumerate(_BOTTLENECKS, 1):
    for number in range(repeats):
      features = _bottleneck(
        features,
        channels,
        expansion=expansion,
        strides=strides if number == 0 else 1,
        name=f"bottleneck{row}_{number}",
      )
  features = layers.conv(features, 512, kernel=1, strides=1, name="last_conv")
  features = _norm_prelu(features, name="last_conv")
  return tf.keras.Model(images, features, name="mobilefacenet")


def _bottleneck(
  features: tf.Tensor, channels: int, *, expansion: int, strides: int, name: str
) -> tf.Tensor:
  """Expands by a 1×1 convolution, convolves depthwise, then projects linearly."""
  before = features.shape[-1]
  inner = layers.conv(
    features, expansion * before, kernel=1, strides=1, name=f"{name}_expand"
  )
  inner = _norm_prelu(inner, name=f"{name}_expand")
  inner = layers.depthwise(inner, strides=strides, name=f"{name}_depthwise")
  inner = _norm_prelu(inner, name=f"{name}_depthwise")
  inner = layers.conv(inner, channels, kernel=1, strides=1, name=f"{name}_project")
  inner = layers.batch_norm(inner, name=f"{name}_project_bn")
  if strides > 1 or before != channels:
    return inner
  return tf.keras.layers.Add(name=f"{name}_add")([inner, features])


def _norm_prelu(features: tf.Tensor, *, name: str) -> tf.Tensor:
  """Batch norm, then PReLU."""
  features = layers.batch_norm(features, name=f"{name}_bn")
  return layers.prelu(features, name=f"{name}_prelu")
