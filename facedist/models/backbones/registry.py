"""The backbones by name: RGB pixels in [0, 255] to a feature map."""

import dataclasses
import difflib
from collections.abc import Callable

import tensorflow as tf

from facedist import config, errors
from facedist.models.backbones import iresnet, layers, mobilefacenet, tinynet, vgg

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
  section 5.1). At 224 px it has 3.8 G multiply-adds (Table 1 of the paper) and
  23.59 M weights, batch norm's averages included (Keras applications).
  """
  images = layers.pixels(image_size)
  built = tf.keras.applications.ResNet50(
    include_top=False, weights=None, input_tensor=BgrMeans()(images)
  )
  for layer in built.layers:
    if layer.name.endswith("_3_bn"):
      layer.gamma.assign(tf.zeros_like(layer.gamma))
  return tf.keras.Model(images, built.output, name="resnet50")


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A backbone, the output layers of its paper, and the image sizes that it takes.

  Attributes:
    build: Takes the image size in pixels, returns the model with random weights.
    millions: Of weights at 112 px, those of an embedding layer of 512 floats included.
    pooling: The value that --pooling=auto stands for.
    dropout: Fraction of features dropped where --dropout is not given.
    min_size: Smallest image size in pixels.
    size_multiple: The image size must be a multiple of this, in pixels.
    pixel_normalization: What its first layer makes of x, RGB pixels in [0, 255].
  """

  build: Callable[[int], tf.keras.Model]
  millions: float
  pooling: str = "avg"
  dropout: float = 0.0
  min_size: int = 32
  size_multiple: int = 1
  pixel_normalization: str = "(x - 127.5) / 127.5"


BACKBONES: dict[str, Backbone] = {
  "resnet50": Backbone(
    resnet50, 24.6, pixel_normalization=f"BGR of x, minus {_IMAGENET_BGR_MEANS}"
  ),
  **{
    # the dropout of output E in insightface's MXNet code
    name: Backbone(
      iresnet.builder(name),
      millions,
      pooling="e_type",
      dropout=0.4,
      min_size=16,
      size_multiple=16,
    )
    for name, millions in zip(iresnet.UNITS, (24.0, 34.1, 43.6, 65.1), strict=True)
  },
  "mobilefacenet": Backbone(
    mobilefacenet.build, 1.2, pooling="gdconv", min_size=16, size_multiple=16
  ),
  "vgg8": Backbone(
    vgg.build,
    6.5,
    pooling="e_type",
    dropout=0.5,
    min_size=8,
    pixel_normalization="x / 255",
  ),
  "tinynet": Backbone(tinynet.build, 0.94),
}


def build(name: str, image_size: int) -> tf.keras.Model:
  """Builds the backbone of that name with random weights.

  Raises:
    errors.UsageError: There is no such backbone, or it cannot take that image size.
  """
  backbone = config.lookup(BACKBONES, name, "backbone")
  if image_size < backbone.min_size:
    raise errors.UsageError(
      f"--backbone={name} needs images of at least {backbone.min_size} pixels, not "
      f"{image_size}; rebuild the shards with a larger --image_size."
    )
  if image_size % backbone.size_multiple:
    near = round(image_size / backbone.size_multiple) * backbone.size_multiple
    raise errors.UsageError(
      f"--backbone={name} needs images whose side is a multiple of "
      f"{backbone.size_multiple} pixels, not {image_size}; rebuild the shards with "
      f"--image_size={max(near, backbone.min_size)}."
    )
  return backbone.build(image_size)


def freeze(backbone: tf.keras.Model, until: str) -> None:
  """Freezes the layers up to and with the one named `until`.

  Their weights do not train and their batch norm runs in inference mode. The order is
  that of `backbone.layers`, from the pixels on.

  Raises:
    errors.UsageError: There is no such layer, or nothing would be left to train.
  """
  names = [layer.name for layer in backbone.layers]
  if until not in names:
    near = difflib.get_close_matches(until, names, n=4, cutoff=0.4) or names[-4:]
    raise errors.UsageError(
      f"--freeze_until={until} is not a layer of --backbone={backbone.name}; similar "
      f"names: {', '.join(near)}."
    )
  for layer in backbone.layers[: names.index(until) + 1]:
    layer.trainable = False
  if not backbone.trainable_variables:
    raise errors.UsageError(
      f"--freeze_until={until} leaves nothing of --backbone={backbone.name} to train; "
      "name an earlier layer, or train the head alone with --full_epochs=0."
    )
