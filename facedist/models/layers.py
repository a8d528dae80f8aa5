"""What the backbones are built of: convolutions with batch norm, and their padding."""

import tensorflow as tf

_EPSILON = 1e-5
"""Added to batch norm's variance; PyTorch's default, Keras' is 1e-3."""


def pixels(image_size: int) -> tf.Tensor:
  """Returns the input of a backbone: float32[batch, S, S, 3], RGB in [0, 255]."""
  return tf.keras.Input((image_size, image_size, 3), name="images")


def centred(images: tf.Tensor) -> tf.Tensor:
  """Returns (x - 127.5) / 127.5, in [-1, 1].

  The same to rounding as arcface_torch, which divides by 255, then subtracts 0.5 and
  divides by 0.5, also in RGB order.
  """
  return tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="centred")(images)


def conv(
  features: tf.Tensor, filters: int, *, kernel: int, strides: int, name: str
) -> tf.Tensor:
  """A convolution without bias, (kernel - 1) / 2 zeros on every side.

  Keras' own padding puts the odd zero of strided convolutions on one side, so that
  weights from PyTorch would see images shifted by a pixel.
  """
  if kernel > 1 and strides > 1:
    padding = tf.keras.layers.ZeroPadding2D(kernel // 2, name=f"{name}_padding")
    features = padding(features)
  return tf.keras.layers.Conv2D(
    filters,
    kernel,
    strides=strides,
    padding="same" if strides == 1 else "valid",
    use_bias=False,
    kernel_initializer=tf.keras.initializers.RandomNormal(stddev=0.1),
    name=name,
  )(features)


def depthwise(features: tf.Tensor, *, strides: int, name: str) -> tf.Tensor:
  """A 3×3 convolution of each channel by itself, one zero on every side."""
  if strides > 1:
    features = tf.keras.layers.ZeroPadding2D(1, name=f"{name}_padding")(features)
  return tf.keras.layers.DepthwiseConv2D(
    3,
    strides=strides,
    padding="same" if strides == 1 else "valid",
    use_bias=False,
    depthwise_initializer=tf.keras.initializers.RandomNormal(stddev=0.1),
    name=name,
  )(features)


def batch_norm(features: tf.Tensor, *, name: str) -> tf.Tensor:
  """Batch norm; `network.build_network` sets its momentum."""
  return tf.keras.layers.BatchNormalization(epsilon=_EPSILON, name=name)(features)


def prelu(features: tf.Tensor, *, name: str) -> tf.Tensor:
  """A rectifier with one slope a channel for negative values, 0.25 at first."""
  return tf.keras.layers.PReLU(
    alpha_initializer=tf.keras.initializers.Constant(0.25),
    shared_axes=(1, 2),
    name=name,
  )(features)
