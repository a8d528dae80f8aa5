"""Steps compiled by XLA compute the same as uncompiled ones, in every mode."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from facedist.training import metrics
from facedist.training.config import TrainConfig, resolve
from tests.facedist.training import steps

COLUMNS = ("loss", "correct", "gradient_norm")
CONFIG = dataclasses.replace(
  steps.SPECK, momentum=0.0, weight_decay=0.0, clip_norm=0.0, augment_flip=True
)
STATISTICS = {"head": "curricularface", "metric_loss": "triplet_semihard"}
MODES = {
  "whole": {"backbone": "tinynet"},  # with batch norm
  "frozen": {},
  "accumulated": {"accumulate_steps": 2},
  "running statistics and triplets": STATISTICS,
  "gradient caching": STATISTICS | {"accumulate_steps": 2},
  "sharded": {"head_sharding": "sharded"},
  "sampled": {"head_sharding": "sampled", "head_sample_rate": 0.5},
  "average and lamb": {"ema_decay": 0.9, "optimizer": "lamb", "momentum": None},
  "loss scaling": {"policy": "mixed_float16"},
}


def train(
  mode: str, strategy: tf.distribute.Strategy, jit_compile: str
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns float32[4, columns] of the steps, and the weights after."""
  run = dataclasses.replace(
    CONFIG, augment_color=0.3, jit_compile=jit_compile, **MODES[mode]
  )
  phase = steps.HEAD if mode == "frozen" else steps.FULL
  trained = steps.train(strategy, run, 4, phase)
  columns = [metrics.COLUMNS.index(name) for name in COLUMNS]
  return trained.rows[:, columns], trained.after


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_have_the_losses_of_uncompiled_ones(
  mode: str, two_replicas: tf.distribute.Strategy
):
  off, weights_off = train(mode, two_replicas, "off")
  on, weights_on = train(mode, two_replicas, "on")
  # float16 rounds to 11 bits, and the first steps may be skipped
  tolerance = 5e-2 if mode == "loss scaling" else 1e-4
  np.testing.assert_allclose(on, off, rtol=tolerance)
  for left, right in zip(weights_on, weights_off, strict=True):
    np.testing.assert_allclose(left, right, atol=tolerance)


def test_auto_compiles_nothing_until_a_gain_is_measured():
  assert resolve(TrainConfig()).jit_compile == "off"
