"""Heads in the training step: on one device and two, resumed, and sharded.

tests/facedist/test_sharded_runs.py has sharded runs of several processes.
"""

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist.data import hashing
from facedist.models.heads.margins import MARGINS
from facedist.training import config as train_config
from facedist.training import step_health, train_state, trainer
from facedist.training.checkpoint import checkpoints
from tests.facedist.training import steps
from tests.facedist.training.steps import batches, build, column, one, train

HYPERPARAMETERS = {"norm_low": 0.01, "norm_high": 2.0}
HYPERPARAMETERS |= {"norm_weight": 0.01, "head_momentum": 0.5}
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
  return dataclasses.replace(steps.SPECK, head=kind, **(own | changes))


def values(built: train_state.TrainState) -> list[np.ndarray]:
  """All that is saved of the network and the head."""
  variables = [*built.network.variables, *built.head.variables]
  return [variable.numpy() for variable in variables]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WITH_STATISTICS, "subcentre_arcface"])
def test_a_head_learns_and_resumes_to_the_bit(kind: str, tmp_path: pathlib.Path):
  run = run_of(kind)
  built = build(one(), run)
  train_on = steps.trainer(one(), built, run)
  train_on(3)
  checkpoints.save(built.checkpoint(), str(tmp_path), step=3, is_chief=True, facts={})
  rows = train_on(3)
  resumed = build(one(), dataclasses.replace(run, seed=9))
  checkpoints.restore(
    resumed.checkpoint(), checkpoints.at(str(tmp_path), 3), is_whole=True
  )
  np.testing.assert_array_equal(steps.trainer(one(), resumed, run)(3), rows)
  for left, right in zip(values(resumed), values(built), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MARGINS)
def test_two_replicas_of_a_head_take_the_steps_of_one(
  kind: str, two_halves: tf.distribute.Strategy
):
  run = run_of(kind)
  alone, together = train(one(), run, 4), train(two_halves, run, 4)
  assert np.isfinite(column(alone.rows, "loss")).all()
  np.testing.assert_allclose(alone.rows, together.rows, rtol=1e-4, atol=1e-6)
  if kind in WITH_STATISTICS:
    held = two_halves.experimental_local_results(together.built.head.running_statistics)
    np.testing.assert_array_equal(held[0].numpy(), held[1].numpy())
    np.testing.assert_allclose(
      held[0].numpy(), alone.built.head.running_statistics.numpy(), rtol=1e-4
    )


def test_curricularfaces_statistic_is_the_moving_mean_of_target_cosines():
  run = run_of("curricularface", head_momentum=0.9)
  trained = train(one(), run, 3)
  expected = 0.0
  for total in column(trained.rows, "target_cosine"):
    expected = 0.9 * expected + 0.1 * total / run.global_batch
  np.testing.assert_allclose(
    trained.built.head.running_statistics.numpy(), [expected], rtol=1e-5
  )


def test_adafaces_statistics_follow_the_norms_of_the_batch():
  built = build(one(), run_of("adaface"))
  images = next(batches(one()))["image"]
  norms = np.linalg.norm(built.network.embed(images, training=True), axis=1)
  steps.trainer(one(), built, run_of("adaface"))(1)
  expected = [10 + 0.5 * norms.mean(), 50 + 0.5 * norms.std(ddof=1)]
  np.testing.assert_allclose(built.head.running_statistics.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_validation_uses_the_running_statistics_and_leaves_them(
  kind: str, two_halves: tf.distribute.Strategy
):
  built = build(two_halves, run_of(kind))
  loop = trainer.validation_loop(built, two_halves, step_health.StepHealth())
  losses = []
  for first in (0.0, 100.0):
    size = built.head.read_statistics().shape[0]
    statistics = np.array([first, 1.0][:size], np.float32)
    built.head.running_statistics.assign(statistics)
    totals, _ = loop(batches(two_halves), tf.constant(2))
    losses.append(float(totals[0]))
    np.testing.assert_array_equal(built.head.running_statistics.numpy(), statistics)
  assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "policy"), [("adaface", "mixed_float16"), ("magface", "mixed_bfloat16")]
)
def test_a_head_computes_in_float32_under_mixed_policies(kind: str, policy: str):
  trained = train(one(), run_of(kind, policy=policy), 2)
  assert np.isfinite(column(trained.rows, "loss")).all()
  head = trained.built.head
  assert {variable.dtype for variable in head.variables} == {tf.float32}
  assert all(np.isfinite(value).all() for value in values(trained.built))


IDENTITIES = 11  # six on the first replica, five on the second; labels are below 5


def column_of(built: train_state.TrainState, name: str) -> np.ndarray:
  """A column of the whole table of a sharded head, without the padding."""
  shards = built.rows.shards
  return np.concatenate([shard.variables[name][: shard.count] for shard in shards])


@pytest.mark.slow
def test_a_sharded_run_is_the_replicated_run(two_halves: tf.distribute.Strategy):
  plain = dataclasses.replace(
    steps.SPECK, head="adaface", policy="mixed_bfloat16", optimizer="adamw"
  )
  sharded = dataclasses.replace(plain, head_sharding="sharded")
  (rows, built, *_), (expected_rows, expected, *_) = (
    train(two_halves, run, 3, steps.HEAD, identities=IDENTITIES)
    for run in (sharded, plain)
  )
  np.testing.assert_allclose(rows, expected_rows, rtol=1e-4, atol=1e-6)
  totals, expected_totals = (
    trainer.validation_loop(state, two_halves, step_health.StepHealth())(
      batches(two_halves), tf.constant(2)
    )[0]
    for state in (built, expected)
  )
  np.testing.assert_allclose(totals, expected_totals, rtol=1e-4)
  np.testing.assert_allclose(
    column_of(built, "centres"), expected.head.class_weights, rtol=1e-3, atol=1e-6
  )
  statistics = (each.head.running_statistics.numpy() for each in (built, expected))
  np.testing.assert_allclose(*statistics, rtol=1e-5)
  mirrored = [variable.name for variable in built.head_variables]
  assert not [name for name in mirrored if "centres" in name]


@pytest.mark.slow
def test_a_sampled_run_trains_the_sample_alone_however_many_replicas(
  two_halves: tf.distribute.Strategy,
):
  run = dataclasses.replace(steps.SPECK, head_sharding="sampled", head_sample_rate=0.2)
  alone, together = (
    train(strategy, run, 1, steps.HEAD, identities=IDENTITIES)
    for strategy in (one(), two_halves)
  )
  np.testing.assert_allclose(alone.rows, together.rows, rtol=1e-4)
  hashes = hashing.combine(run.seed, np.array(0), np.arange(IDENTITIES))
  chosen = (hashes >> np.uint64(32)).astype(float) / 2**32 < 0.2
  chosen[next(batches(one()))["label"].numpy()] = True
  assert {5, 6, 7, 8, 9, 10} - set(np.flatnonzero(chosen)) == {5, 6, 7, 8, 10}
  fresh = column_of(build(one(), run, identities=IDENTITIES), "centres")
  for built in (alone.built, together.built):
    moved = (column_of(built, "centres") != fresh).any(axis=1)
    np.testing.assert_array_equal(moved, chosen)
    np.testing.assert_array_equal(column_of(built, "momentum").any(axis=1), chosen)
