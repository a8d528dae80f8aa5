"""The improved residual networks of ArcFace (arXiv:1801.07698)."""

from collections.abc import Callable

import tensorflow as tf

from facedist.models.backbones import layers

_FILTERS = (64, 128, 256, 512)
UNITS = {
  "iresnet18": (2, 2, 2, 2),
  "iresnet34": (3, 4, 6, 3),
  "iresnet50": (3, 4, 14, 3),
  "iresnet100": (3, 13, 30, 3),
}
"""Residual units of the four stages."""


def builder(name: str) -> Callable[[int], tf.keras.Model]:
  """Returns the function that builds the network of that name; see `build`."""
  return lambda image_size: build(name, image_size)


def build(name: str, image_size: int) -> tf.keras.Model:
  """Builds an IResNet without its output layers, which are --pooling=e_type.

  The stem keeps the resolution; the first unit of each stage halves it. Layers have
  arcface_torch's names, with `_` for `.`, and its initial values: kernels from
  N(0, 0.1²), slopes of 0.25.

  Parameters and multiply-adds with output E, 512-float embeddings and 112 px:
  iresnet18 24.03 M and 2.61 G, iresnet34 34.14 M and 4.46 G, iresnet50 43.59 M and
  6.31 G, iresnet100 65.16 M and 12.09 G. arcface_torch's README has 2.6, 6.3 and 12.1
  GFLOPs for 18, 50 and 100. Open Model Zoo has 34.129 M and 8.934 GFLOPs for
  LResNet34E-IR, 43.576 M and 12.637 GFLOPs for LResNet50E-IR and 65.131 M and 24.209
  GFLOPs for LResNet100E-IR, where a multiply-add counts twice and normalisation counts.
  No published count of iresnet18's parameters was found.

  Args:
    name: A key of `UNITS`.
    image_size: S, height and width in pixels; a multiple of 16.

  Returns:
    A model from float32[batch, S, S, 3] in [0, 255] to float[batch, S/16, S/16, 512].
  """
  images = layers.pixels(image_size)
  features = layers.conv(layers.centred(images), 64, kernel=3, strides=1, name="conv1")
  features = layers.batch_norm(features, name="bn1")
  features = layers.prelu(features, name="prelu")
  for stage, (filters, units) in enumerate(zip(_FILTERS, UNITS[name], strict=True), 1):
    for number in range(units):
      features = _unit(
        features,
        filters,
        strides=2 if number == 0 else 1,
        name=f"layer{stage}_{number}",
      )
  return tf.keras.Model(images, features, name=name)


def _unit(features: tf.Tensor, filters: int, *, strides: int, name: str) -> tf.Tensor:
  """BN-conv-BN-PReLU-conv-BN beside the identity or a strided 1×1 convolution."""
  residual = layers.batch_norm(features, name=f"{name}_bn1")
  residual = layers.conv(residual, filters, kernel=3, strides=1, name=f"{name}_conv1")
  residual = layers.batch_norm(residual, name=f"{name}_bn2")
  residual = layers.prelu(residual, name=f"{name}_prelu")
  residual = layers.conv(
    residual, filters, kernel=3, strides=strides, name=f"{name}_conv2"
  )
  residual = layers.batch_norm(residual, name=f"{name}_bn3")
  if strides > 1:
    features = layers.conv(
      features, filters, kernel=1, strides=strides, name=f"{name}_downsample_0"
    )
    features = layers.batch_norm(features, name=f"{name}_downsample_1")
  return tf.keras.layers.Add(name=f"{name}_add")([residual, features])
