"""Every head in the training step: on one device, on two, stopped and resumed."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads.margins import MARGINS
from facedist.training import config as train_config
from facedist.training import (
  metrics,
  step_health,
  train_state,
  train_step,
  trainer,
)
from facedist.training.checkpoint import checkpoints
from tests.facedist.training import steps
from tests.facedist.training.steps import BATCH, batches, build, column, one

RUN = steps.SPECK
HYPERPARAMETERS = {"norm_low": 0.01, "norm_high": 2.0}
HYPERPARAMETERS |= {"norm_weight": 0.01, "head_momentum": 0.5}
SETTINGS = train_step.StepSettings(
  global_batch=BATCH,
  weight_decay=5e-4,
  clip_norm=5.0,
  augment_flip=False,
  augment_crop=0.0,
  augment_color=0.0,
  deterministic=False,
)
WITH_STATISTICS = [
  kind for kind, margin in MARGINS.items() if margin.initial_statistics
]


def run_of(kind: str, **changes: object) -> train_config.TrainConfig:
  """A run with that head and those HYPERPARAMETERS that it has."""
  own = {
    flag: HYPERPARAMETERS[flag]
    for flag in MARGINS[kind].defaults()
    if flag in HYPERPARAMETERS
  }
  return dataclasses.replace(RUN, head=kind, **own, **changes)


def train(
  strategy: tf.distribute.Strategy, built: train_state.TrainState, num_steps: int
) -> np.ndarray:
  return steps.trainer(strategy, built, SETTINGS)(num_steps)


def values(built: train_state.TrainState) -> list[np.ndarray]:
  """All that is saved of the network and the head."""
  variables = [*built.network.variables, *built.head.variables]
  return [variable.numpy() for variable in variables]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MARGINS)
def test_a_head_learns_and_resumes_to_the_bit(kind: str, tmp_path: pathlib.Path):
  run = run_of(kind)
  undisturbed = build(one(), run)
  rows = train(one(), undisturbed, 6)
  without = [metrics.COLUMNS.index("metric_loss")]
  assert np.isfinite(np.delete(rows, without, axis=1)).all()
  stopped = build(one(), run)
  train(one(), stopped, 3)
  checkpoints.save(stopped.checkpoint(), str(tmp_path), step=3, is_chief=True, facts={})
  resumed = build(one(), dataclasses.replace(run, seed=9))
  checkpoints.restore(
    resumed.checkpoint(), checkpoints.at(str(tmp_path), 3), is_whole=True
  )
  np.testing.assert_array_equal(train(one(), resumed, 3), rows[3:])
  for left, right in zip(values(resumed), values(undisturbed), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WITH_STATISTICS, "magface", "subcentre_arcface"])
def test_two_replicas_of_a_head_take_the_steps_of_one(
  kind: str, two_halves: tf.distribute.Strategy
):
  run = run_of(kind)
  alone, together = build(one(), run), build(two_halves, run)
  rows = [train(one(), alone, 4), train(two_halves, together, 4)]
  np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-6)
  if kind in WITH_STATISTICS:
    held = two_halves.experimental_local_results(together.head.running_statistics)
    np.testing.assert_array_equal(held[0].numpy(), held[1].numpy())
    np.testing.assert_allclose(
      held[0].numpy(), alone.head.running_statistics.numpy(), rtol=1e-4
    )


def test_curricularfaces_statistic_is_the_moving_mean_of_target_cosines():
  built = build(one(), run_of("curricularface"))
  rows = train(one(), built, 3)
  expected = 0.0
  for total in column(rows, "target_cosine"):
    expected = 0.5 * expected + 0.5 * total / BATCH
  np.testing.assert_allclose(
    built.head.running_statistics.numpy(), [expected], rtol=1e-5
  )


def test_adafaces_statistics_follow_the_norms_of_the_batch():
  built = build(one(), run_of("adaface"))
  images = next(batches(one()))["image"]
  norms = np.linalg.norm(built.network.embed(images, training=True), axis=1)
  train(one(), built, 1)
  expected = [10 + 0.5 * norms.mean(), 50 + 0.5 * norms.std(ddof=1)]
  np.testing.assert_allclose(built.head.running_statistics.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_validation_uses_the_running_statistics_and_leaves_them(
  kind: str, two_halves: tf.distribute.Strategy
):
  built = build(two_halves, run_of(kind))
  losses = []
  for first in (0.0, 100.0):
    statistics = np.array(
      [first, 1.0][: built.head.read_statistics().shape[0]], np.float32
    )
    built.head.running_statistics.assign(statistics)
    loop = trainer.validation_loop(built, two_halves, step_health.StepHealth())
    totals, _ = loop(batches(two_halves), tf.constant(2))
    losses.append(float(totals[0]))
    np.testing.assert_array_equal(built.head.running_statistics.numpy(), statistics)
  assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "policy"),
  [
    ("curricularface", "mixed_float16"),
    ("adaface", "mixed_float16"),
    ("magface", "mixed_float16"),
    ("combined", "mixed_bfloat16"),
  ],
)
def test_a_head_computes_in_float32_under_mixed_policies(kind: str, policy: str):
  built = build(one(), run_of(kind, policy=policy))
  rows = train(one(), built, 2)
  assert np.isfinite(column(rows, "loss")).all()
  assert {variable.dtype for variable in built.head.variables} == {tf.float32}
  assert all(np.isfinite(value).all() for value in values(built))
