"""Steps compiled by XLA compute the same as uncompiled ones, in every mode."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.training import metrics, step_health, train_step
from facedist.training.config import TrainConfig, resolve
from tests.facedist.training import steps, test_train_step

MODES = {
  "whole": {"backbone": "tinynet", "backbone_weights": "none"},  # with batch norm
  "frozen": {},
  "accumulated": {"accumulate_steps": 2},
  "running statistics": {"head": "curricularface", "margin": None},
  "gradient caching": {"head": "curricularface", "margin": None, "accumulate_steps": 2},
  "triplets": {"metric_loss": "triplet_semihard"},
  "sharded": {"head_sharding": "sharded"},
  "sampled": {"head_sharding": "sampled", "head_sample_rate": 0.5},
  "average and lamb": {"ema_decay": 0.9, "optimizer": "lamb", "momentum": None},
  "loss scaling": {"policy": "mixed_float16"},
}


def rows_of(mode: str, strategy: tf.distribute.Strategy, jit_compile: str):
  """Trains four steps and returns float32[4, len(COLUMNS)] and the weights after."""
  config = dataclasses.replace(
    test_train_step.CONFIG,
    augment_flip=True,
    augment_color=0.3,
    jit_compile=jit_compile,
    **MODES[mode],
  )
  config = resolve(config)
  state = steps.build(strategy, config)
  loop = train_step.train_loop(
    state,
    steps.HEAD if mode == "frozen" else steps.FULL,
    train_step.settings_of(config),
    strategy,
    step_health.StepHealth(),
  )
  rows, _ = loop(steps.batches(strategy), tf.constant(4))
  weights = [variable.numpy() for variable in state.backbone_variables]
  return rows.numpy(), weights


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_have_the_losses_of_uncompiled_ones(
  mode: str, two_replicas: tf.distribute.Strategy
):
  off, weights_off = rows_of(mode, two_replicas, "off")
  on, weights_on = rows_of(mode, two_replicas, "on")
  columns = [
    metrics.COLUMNS.index(name) for name in ("loss", "correct", "gradient_norm")
  ]
  # float16 rounds to 11 bits, and the first steps may be skipped
  tolerance = 5e-2 if mode == "loss scaling" else 1e-4
  finite = np.isfinite(off[:, columns])
  np.testing.assert_array_equal(np.isfinite(on[:, columns]), finite)
  np.testing.assert_allclose(
    on[:, columns][finite], off[:, columns][finite], rtol=tolerance
  )
  for left, right in zip(weights_on, weights_off, strict=True):
    np.testing.assert_allclose(left, right, atol=tolerance)


def test_auto_compiles_nothing_until_a_gain_is_measured():
  assert resolve(TrainConfig()).jit_compile == "off"


def test_collectives_inside_the_network_cannot_be_compiled():
  config = TrainConfig(jit_compile="on", sync_batch_norm=True)
  with pytest.raises(errors.UsageError, match="cannot compile the collectives of"):
    resolve(config)
