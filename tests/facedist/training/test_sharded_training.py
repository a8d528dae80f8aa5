"""The sharded head in the training step, beside the replicated one."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from facedist import cluster, strategies
from facedist.data import hashing
from facedist.training import config, phases, state, steps, validation, vitals
from tests.facedist.training import test_head_training as replicated

IDENTITIES = 11  # six on the first replica, five on the second; labels are below 5
FULL = replicated.FULL
HEAD = dataclasses.replace(FULL, name="head", backbone_rate=0.0)
RUN = dataclasses.replace(replicated.RUN, head_sharding="sharded", nesterov=True)


@pytest.fixture(scope="module")
def two() -> tf.distribute.Strategy:
  return strategies.make_strategy("mirrored", cluster.Cluster())


@pytest.fixture(scope="module")
def one() -> tf.distribute.Strategy:
  return strategies.make_strategy("one", cluster.Cluster())


def train(
  strategy: tf.distribute.Strategy,
  run: config.TrainConfig,
  *,
  phase: phases.Phase = FULL,
  num_steps: int = 3,
) -> tuple[np.ndarray, state.TrainState, np.ndarray]:
  """Trains from scratch, then validates; returns the rows, state and totals."""
  built = state.build_in(strategy, run, image_size=32, num_identities=IDENTITIES)
  settings = replicated.SETTINGS
  loop = steps.train_loop(built, phase, settings, strategy, vitals.Vitals())
  rows, signs = loop(replicated.batches(strategy), tf.constant(num_steps))
  assert not signs.numpy().any()
  judge = validation.validation_loop(built, strategy, vitals.Vitals())
  totals, _ = judge(replicated.batches(strategy), tf.constant(2))
  return rows.numpy()[:, :-1], built, totals.numpy()


def column(built: state.TrainState, name: str) -> np.ndarray:
  """A column of the whole table, without the padding."""
  shards = built.rows.shards
  return np.concatenate([shard.variables[name][: shard.count] for shard in shards])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "policy", "phase"),
  [
    ("cosface", "float32", FULL),
    ("adaface", "float32", HEAD),
    ("subcentre_arcface", "mixed_bfloat16", FULL),
  ],
)
def test_a_sharded_run_is_the_replicated_run(
  kind: str, policy: str, phase: phases.Phase, two: tf.distribute.Strategy
):
  run = dataclasses.replace(RUN, head=kind, policy=policy)
  rows, built, totals = train(two, run, phase=phase)
  run = dataclasses.replace(run, head_sharding="replicated")
  expected_rows, expected, expected_totals = train(two, run, phase=phase)
  np.testing.assert_allclose(rows, expected_rows, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(totals, expected_totals, rtol=1e-4)
  np.testing.assert_allclose(
    column(built, "centres"), expected.head.centres.numpy(), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    column(built, "momentum"),
    expected.head_optimizer.momentums[-1].numpy(),
    rtol=1e-3,
    atol=1e-6,
  )
  if expected.head.memory is not None:
    np.testing.assert_allclose(
      built.head.memory.numpy(), expected.head.memory.numpy(), rtol=1e-5
    )
  mirrored = [variable.name for variable in built.head_variables]
  assert not [name for name in mirrored if "centres" in name]


@pytest.mark.slow
def test_a_sampled_run_trains_the_sample_alone_however_many_replicas(
  one: tf.distribute.Strategy, two: tf.distribute.Strategy
):
  run = dataclasses.replace(RUN, head_sharding="sampled", head_sample_rate=0.2)
  fresh = column(
    state.build_in(one, run, image_size=32, num_identities=IDENTITIES), "centres"
  )
  (rows, alone, _), (rows_of_two, together, _) = (
    train(strategy, run, num_steps=1) for strategy in (one, two)
  )
  np.testing.assert_allclose(rows, rows_of_two, rtol=1e-4)
  hashes = hashing.combine(run.seed, np.array(0), np.arange(IDENTITIES))
  chosen = (hashes >> np.uint64(32)).astype(float) / 2**32 < 0.2
  chosen[next(replicated.batches(one))["label"].numpy()] = True
  assert {5, 6, 7, 8, 9, 10} - set(np.flatnonzero(chosen)) == {5, 6, 7, 8, 10}
  for built in (alone, together):
    moved = (column(built, "centres") != fresh).any(axis=1)
    np.testing.assert_array_equal(moved, chosen)
    np.testing.assert_array_equal(column(built, "momentum").any(axis=1), chosen)
