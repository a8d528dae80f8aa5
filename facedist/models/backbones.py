"""Backbones: RGB pixels in [0, 255] to a feature map; each normalises its own input."""

import os
from collections.abc import Callable

import tensorflow as tf

from facedist import config, errors, storage

_RESNET50_FILE = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_IMAGENET_BGR_MEANS = (103.939, 116.779, 123.68)


class BgrMeans(tf.keras.layers.Layer):
  """RGB to BGR minus ImageNet's channel means: Keras' 'caffe' input of ResNet50."""

  def __init__(self) -> None:
    super().__init__(name="bgr_means", dtype="float32")

  def call(self, images: tf.Tensor) -> tf.Tensor:
    """Takes and returns float32[batch, height, width, 3]."""
    return images[..., ::-1] - tf.constant(_IMAGENET_BGR_MEANS)


def resnet50(image_size: int) -> tf.keras.Model:
  """ResNet50 without its classifier (arXiv:1512.03385), as in Keras applications.

  Takes float32[batch, S, S, 3] in [0, 255]; returns the feature map
  float[batch, ceil(S/32), ceil(S/32), 2048]. With random weights each residual block
  starts as the identity: the scale of its last batch norm is zero (arXiv:1706.02677,
  section 5.1).
  """
  images = tf.keras.Input((image_size, image_size, 3), name="images")
  layers = tf.keras.applications.ResNet50(
    include_top=False, weights=None, input_tensor=BgrMeans()(images)
  )
  for layer in layers.layers:
    if layer.name.endswith("_3_bn"):
      layer.gamma.assign(tf.zeros_like(layer.gamma))
  return tf.keras.Model(images, layers.output, name="resnet50")


def tinynet(image_size: int) -> tf.keras.Model:
  """A residual net of 0.7 M parameters with group norm, for demos and tests.

  No batch statistics: an image's features do not depend on its batch, so results do
  not depend on how a global batch is split over replicas. Takes
  float32[batch, S, S, 3] in [0, 255]; returns float[batch, S/16, S/16, 192].
  """
  images = tf.keras.Input((image_size, image_size, 3), name="images")
  features = tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images)
  for filters in (32, 64, 128, 192):
    features = _tiny_stage(features, filters)
  return tf.keras.Model(images, features, name="tinynet")


def _tiny_stage(features: tf.Tensor, filters: int) -> tf.Tensor:
  """A strided convolution and one residual block."""
  features = _conv_norm(features, filters, strides=2)
  residual = _conv_norm(features, filters, strides=1)
  return tf.keras.layers.Add()([features, residual])


def _conv_norm(features: tf.Tensor, filters: int, *, strides: int) -> tf.Tensor:
  """3×3 convolution, group norm over 8 channels a group, ReLU."""
  features = tf.keras.layers.Conv2D(
    filters,
    3,
    strides=strides,
    padding="same",
    use_bias=False,
    kernel_initializer="he_normal",
  )(features)
  features = tf.keras.layers.GroupNormalization(groups=filters // 8)(features)
  return tf.keras.layers.ReLU()(features)


BACKBONES: dict[str, Callable[[int], tf.keras.Model]] = {
  "resnet50": resnet50,
  "tinynet": tinynet,
}


def build(name: str, image_size: int) -> tf.keras.Model:
  """Builds the backbone of that name with random weights.

  Raises:
    errors.UsageError: There is no such backbone, or images are too small for it.
  """
  builder = config.lookup(BACKBONES, name, "backbone")
  if image_size < 32:
    raise errors.UsageError(
      f"--backbone={name} needs images of at least 32 pixels, not {image_size}; "
      "rebuild the shards with a larger --image_size."
    )
  return builder(image_size)


def load_weights(backbone: tf.keras.Model, source: str) -> None:
  """Sets the backbone's starting weights.

  Args:
    backbone: What `build` returned.
    source: 'imagenet', 'none' or the path of a Keras .h5 file for this backbone,
      local or gs://.

  Raises:
    errors.UsageError: The weights do not exist for this backbone, cannot be
      downloaded, or do not fit it.
  """
  if source == "none":
    return
  if source == "imagenet":
    backbone.set_weights(_imagenet(backbone.name).get_weights())
    return
  if not storage.is_bucket(source) and not os.path.isfile(source):
    raise errors.UsageError(
      f"--backbone_weights={source} is no file; give imagenet, none or a .h5 FILE."
    )
  try:
    with storage.local_copy(source) as path:
      backbone.load_weights(path)
  except (ValueError, OSError, KeyError) as error:
    reason = str(error).splitlines()[0]
    raise errors.UsageError(
      f"--backbone_weights={source} does not fit --backbone={backbone.name}: {reason} "
      "Give the .h5 file of this backbone without its classifier."
    ) from error


def _imagenet(name: str) -> tf.keras.Model:
  """Returns Keras' own model with ImageNet weights, downloaded on first use."""
  if name != "resnet50":
    raise errors.UsageError(
      f"--backbone_weights=imagenet: there are none for --backbone={name}; "
      "use --backbone_weights=none."
    )
  try:
    return tf.keras.applications.ResNet50(include_top=False, weights="imagenet")
  except Exception as error:  # Keras raises a bare Exception when a download fails
    raise errors.UsageError(
      "--backbone_weights=imagenet could not be downloaded; bring Keras' file "
      f"{_RESNET50_FILE} to this machine and name it with --backbone_weights=FILE, or "
      "start from random weights with --backbone_weights=none."
    ) from error
