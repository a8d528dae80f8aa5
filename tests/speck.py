"""A backbone that is traced in no time, for tests of all that is around a backbone."""

import tensorflow as tf

from facedist.models.backbones import layers, registry


def register() -> None:
  """Makes `--backbone=speck` known to this process."""
  registry.BACKBONES["speck"] = registry.Backbone(_build, 0.006)


def _build(image_size: int) -> tf.keras.Model:
  """Builds two convolutions; without batch statistics, so that batches may be split."""
  images = layers.pixels(image_size)
  features = layers.centred(images)
  for filters in (16, 32):
    conv = tf.keras.layers.Conv2D(
      filters, 3, strides=2, activation="relu", kernel_initializer="he_normal"
    )
    features = conv(features)
  return tf.keras.Model(images, features, name="speck")
