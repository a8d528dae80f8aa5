"""A backbone that is traced in no time, for tests of all that is around a backbone."""

from collections.abc import Iterator
from unittest import mock

import pytest
import tensorflow as tf

from facedist.models.backbones import layers, registry


@pytest.fixture(scope="package", autouse=True)
def speck() -> Iterator[None]:
  """`--backbone=speck`: two convolutions, and no batch statistics."""
  built = registry.Backbone(_build, 0.006)
  with mock.patch.dict(registry.BACKBONES, speck=built):
    yield


def _build(image_size: int) -> tf.keras.Model:
  images = layers.pixels(image_size)
  features = layers.centred(images)
  for filters in (16, 32):
    conv = tf.keras.layers.Conv2D(
      filters, 3, strides=2, activation="relu", kernel_initializer="he_normal"
    )
    features = conv(features)
  return tf.keras.Model(images, features, name="speck")
