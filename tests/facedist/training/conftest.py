"""The tests of training have a small backbone of their own, `--backbone=speck`."""

from collections.abc import Iterator
from unittest import mock

import pytest
import tensorflow as tf

from facedist.models.backbones import registry
from tests import speck


@pytest.fixture(scope="package", autouse=True)
def small_backbone() -> Iterator[None]:
  """Registers it for these tests alone."""
  with mock.patch.dict(registry.BACKBONES):
    speck.register()
    yield


@pytest.fixture
def two_halves() -> tf.distribute.Strategy:
  """Two replicas that reduce without collectives, whose keys outlive a strategy.

  A second strategy on the same devices takes the first one's keys, and TensorFlow
  refuses tensors of another shape under them; a head has shapes of its own.
  """
  reduction = tf.distribute.ReductionToOneDevice()
  return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduction)
