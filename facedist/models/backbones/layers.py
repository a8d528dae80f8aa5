"""Layers that several backbones use: convolutions with padding, batch norm, PReLU."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import tensorflow as tf

_EPSILON = 1e-5
"""Added to batch norm's variance; PyTorch's default, Keras' is 1e-3."""
_KERAS_PRELU = contextvars.ContextVar("keras_prelu", default=False)


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
  """A PReLU whose slopes, one a channel, start at 0.25."""
  return PReLU(
    alpha_initializer=tf.keras.initializers.Constant(0.25),
    shared_axes=(1, 2),
    name=name,
  )(features)


class PReLU(tf.keras.layers.PReLU):
  """Keras' PReLU with one slope a channel, in fewer passes over memory.

  Keras' own is relu(x) - a relu(-x). Its ten elementwise operations, forward and
  backward, took nearly half of a MobileFaceNet's step on CPUs.
  """

  def call(self, inputs: tf.Tensor) -> tf.Tensor:
    """Takes and returns float[batch, height, width, channels]."""
    if _KERAS_PRELU.get():
      return super().call(inputs)
    return rectify(inputs, tf.convert_to_tensor(self.alpha))


@contextlib.contextmanager
def keras_prelu() -> Iterator[None]:
  """Traces PReLU with Keras' own operations, for converters to other formats.

  TFLite's converter makes one operation of them. Of those of `rectify` it makes two
  that its fast kernels lack, and tf2onnx exchanges axes around each.
  """
  token = _KERAS_PRELU.set(True)
  try:
    yield
  finally:
    _KERAS_PRELU.reset(token)


@tf.custom_gradient
def rectify(
  features: tf.Tensor, slopes: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
  """Returns x where it is positive and a x elsewhere (equation 1 of arXiv:1502.01852).

  Args:
    features: x, float[batch, height, width, channels].
    slopes: a, float[1, 1, channels], of the same type.

  Returns:
    float[batch, height, width, channels]. The gradient of the slopes (equation 8) is
    summed by a matrix product, on CPUs the fastest way.
  """
  # Both have rank 4: if `where` gets tensors of lower rank, TensorFlow's layout
  # optimizer, which GPUs need, skips the whole graph (seen on an H100 and in the test).
  one = tf.ones([1, 1, 1, 1], features.dtype)
  factors = tf.where(features > 0, one, slopes[tf.newaxis])

  def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    products = tf.reshape(upstream * tf.minimum(features, 0), [-1, features.shape[-1]])
    ones = tf.ones([1, tf.shape(products)[0]], products.dtype)
    of_slopes = tf.reshape(tf.matmul(ones, products), slopes.shape)
    return upstream * factors, of_slopes

  return features * factors, gradients
