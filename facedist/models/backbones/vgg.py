"""VGG8, the network of keras-arcface for images of MNIST's size."""

import tensorflow as tf

from facedist.models.backbones import layers


def build(image_size: int) -> tf.keras.Model:
  """Builds VGG8 without its output layers, which are --pooling=e_type.

  keras-arcface's `vgg8_arcface` (github.com/4uiiurz1/keras-arcface, archs.py): three
  blocks of two convolutions with bias, batch norm and ReLU, each block halved by max
  pooling; pixels divided by 255. That one reads grey images and this one RGB, so the
  first kernel has 288 more weights.

  Args:
    image_size: S, height and width in pixels, at least 8; 28 for MNIST.

  Returns:
    A model from float32[batch, S, S, 3] in [0, 255] to float[batch, S//8, S//8, 64].
  """
  images = layers.pixels(image_size)
  features = tf.keras.layers.Rescaling(1 / 255, name="unit_range")(images)
  for block, filters in enumerate((16, 32, 64), 1):
    for number in (1, 2):
      name = f"block{block}_conv{number}"
      features = tf.keras.layers.Conv2D(
        filters, 3, padding="same", kernel_initializer="he_normal", name=name
      )(features)
      norm = tf.keras.layers.BatchNormalization(name=f"{name}_bn")
      features = tf.keras.layers.ReLU(name=f"{name}_relu")(norm(features))
    features = tf.keras.layers.MaxPooling2D(name=f"block{block}_pool")(features)
  return tf.keras.Model(images, features, name="vgg8")
