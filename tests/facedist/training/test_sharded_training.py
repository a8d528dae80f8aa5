"""The sharded head in the training step, beside the replicated one.

In the head phase, at least cost; tests/facedist/test_sharded_runs.py has the other one.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist.data import hashing
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster as Cluster
from facedist.training import config as train_config
from facedist.training import step_health, train_state, train_step, trainer
from facedist.training.checkpoint.manager import CheckpointManager
from facedist.training.checkpoint.uploader import DiskUploader
from tests.facedist.training import steps, test_head_training

IDENTITIES = 11  # six on the first replica, five on the second; labels are below 5
RUN = dataclasses.replace(steps.SPECK, head_sharding="sharded")


@pytest.fixture(scope="module")
def two() -> tf.distribute.Strategy:
  return strategies.make_strategy("mirrored", Cluster())


@pytest.fixture(scope="module")
def one() -> tf.distribute.Strategy:
  return strategies.make_strategy("one", Cluster())


def build(
  strategy: tf.distribute.Strategy, run: train_config.TrainConfig
) -> train_state.TrainState:
  return steps.build(strategy, run, identities=IDENTITIES)


def train(
  strategy: tf.distribute.Strategy, run: train_config.TrainConfig, num_steps: int = 3
) -> tuple[np.ndarray, train_state.TrainState]:
  """Trains from scratch; returns the rows and the state."""
  built = build(strategy, run)
  return make_trainer(strategy, built, run)(num_steps), built


def make_trainer(
  strategy: tf.distribute.Strategy,
  built: train_state.TrainState,
  run: train_config.TrainConfig,
) -> Callable[[int], np.ndarray]:
  """Returns what trains some steps on from the state's and returns their rows."""
  settings = dataclasses.replace(
    test_head_training.SETTINGS,
    optimizer=run.optimizer,
    weight_decay=train_config.resolve(run).weight_decay,
  )
  return steps.trainer(strategy, built, settings, steps.HEAD)


def validate(
  strategy: tf.distribute.Strategy, built: train_state.TrainState
) -> np.ndarray:
  """Returns the metrics' sums over two batches."""
  validate = trainer.validation_loop(built, strategy, step_health.StepHealth())
  totals, _ = validate(steps.batches(strategy), tf.constant(2))
  return totals.numpy()


def column(built: train_state.TrainState, name: str) -> np.ndarray:
  """A column of the whole table, without the padding."""
  shards = built.rows.shards
  return np.concatenate([shard.variables[name][: shard.count] for shard in shards])


@pytest.mark.slow
def test_a_sharded_run_is_the_replicated_run(two: tf.distribute.Strategy):
  run = dataclasses.replace(
    RUN, head="adaface", policy="mixed_bfloat16", optimizer="adamw"
  )
  rows, built = train(two, run)
  expected_rows, expected = train(
    two, dataclasses.replace(run, head_sharding="replicated")
  )
  np.testing.assert_allclose(rows, expected_rows, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(validate(two, built), validate(two, expected), rtol=1e-4)
  np.testing.assert_allclose(
    column(built, "centres"), expected.head.class_weights.numpy(), rtol=1e-3, atol=1e-6
  )
  np.testing.assert_allclose(
    built.head.memory.numpy(), expected.head.memory.numpy(), rtol=1e-5
  )
  mirrored = [variable.name for variable in built.head_variables]
  assert not [name for name in mirrored if "centres" in name]


@pytest.mark.slow
def test_an_overflow_skips_the_rows_too(two: tf.distribute.Strategy):
  run = dataclasses.replace(RUN, policy="mixed_float16")
  built = build(two, run)
  built.loss_scale.scale.assign(2.0**40)  # any float16 gradient overflows
  first = column(built, "centres")
  loop = train_step.train_loop(
    built, steps.HEAD, test_head_training.SETTINGS, two, step_health.StepHealth()
  )
  rows, flags = loop(steps.batches(two), tf.constant(1))
  assert not flags.numpy().any()  # a step that scaling skips is no fault
  assert not np.isfinite(steps.column(rows, "gradient_norm")[0])
  assert built.loss_scale.skipped.numpy() == 1
  np.testing.assert_array_equal(column(built, "centres"), first)
  assert not column(built, "momentum").any()


@pytest.mark.slow
def test_a_sampled_run_trains_the_sample_alone_however_many_replicas(
  one: tf.distribute.Strategy, two: tf.distribute.Strategy
):
  run = dataclasses.replace(RUN, head_sharding="sampled", head_sample_rate=0.2)
  fresh = column(
    build(one, run),
    "centres",
  )
  (rows, alone), (rows_of_two, together) = (
    train(strategy, run, num_steps=1) for strategy in (one, two)
  )
  np.testing.assert_allclose(rows, rows_of_two, rtol=1e-4)
  hashes = hashing.combine(run.seed, np.array(0), np.arange(IDENTITIES))
  chosen = (hashes >> np.uint64(32)).astype(float) / 2**32 < 0.2
  chosen[next(steps.batches(one))["label"].numpy()] = True
  assert {5, 6, 7, 8, 9, 10} - set(np.flatnonzero(chosen)) == {5, 6, 7, 8, 10}
  for built in (alone, together):
    moved = (column(built, "centres") != fresh).any(axis=1)
    np.testing.assert_array_equal(moved, chosen)
    np.testing.assert_array_equal(column(built, "momentum").any(axis=1), chosen)


@pytest.mark.slow
def test_a_sampled_run_under_adamw_saved_by_two_replicas_goes_on_on_one(
  one: tf.distribute.Strategy, two: tf.distribute.Strategy, tmp_path: pathlib.Path
):
  run = dataclasses.replace(
    RUN, head_sharding="sampled", head_sample_rate=0.4, optimizer="adamw"
  )

  def checkpoint_manager(
    strategy: tf.distribute.Strategy, built: train_state.TrainState
  ) -> CheckpointManager:
    return CheckpointManager(
      built.checkpoint(),
      strategy,
      uploader=DiskUploader(str(tmp_path), is_chief=True, keep_last=1),
      facts={"data_fingerprint": "d"},
      rows=built.rows,
      piece_rows=2,
    )

  whole = build(two, run)
  train_on = make_trainer(two, whole, run)
  train_on(2)
  checkpoint_manager(two, whole).save(2)
  saved = {name: column(whole, name) for name in whole.rows.columns}
  assert sorted(saved) == ["centres", "m", "v"]
  assert len({row.tobytes() for row in saved["m"]}) > 5  # so that places tell
  expected = train_on(2)
  resumed = build(one, run)
  found = checkpoint_manager(one, resumed).restore()
  assert found is not None
  assert found.step == 2
  for name, rows in saved.items():
    np.testing.assert_array_equal(column(resumed, name), rows, err_msg=name)
  np.testing.assert_allclose(make_trainer(one, resumed, run)(2), expected, rtol=1e-4)
  for name in saved:
    np.testing.assert_allclose(
      column(resumed, name), column(whole, name), rtol=1e-3, atol=1e-6, err_msg=name
    )
