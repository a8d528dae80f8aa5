"""A batch in micro-batches, beside the same batch at once."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.training import config as train_config
from facedist.training import metrics, schedules, train_step
from facedist.training.config import resolve
from tests.facedist.training import steps
from tests.facedist.training.steps import FULL, HEAD, one

IDENTITIES = 11  # six on the first replica, five on the second; labels are below 5
RUN = dataclasses.replace(steps.SPECK, dropout=0.25, weight_decay=5e-4)
SAMPLED = {"head_sharding": "sampled", "head_sample_rate": 0.2}


def train(
  strategy: tf.distribute.Strategy,
  run: train_config.TrainConfig,
  phase: schedules.Phase,
  *,
  accumulate_steps: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Takes three steps; returns their rows, and all variables after them."""
  run = dataclasses.replace(run, accumulate_steps=accumulate_steps)
  built = steps.build(strategy, run, identities=IDENTITIES)
  settings = dataclasses.replace(
    train_step.settings_of(resolve(run)), augment_color=0.2
  )
  rows = steps.trainer(strategy, built, settings, phase)(3)
  values = [*built.network.variables, *built.head.variables, built.step]
  for shard in built.rows.shards if built.rows else ():
    values += shard.variables.values()
  return rows, [value.numpy() for value in values]


def compare(
  strategy: tf.distribute.Strategy,
  run: train_config.TrainConfig,
  phase: schedules.Phase,
  *,
  accumulate_steps: int = 2,
) -> None:
  (rows, values), (expected_rows, expected) = (
    train(strategy, run, phase, accumulate_steps=count)
    for count in (accumulate_steps, 1)
  )
  np.testing.assert_allclose(rows, expected_rows, rtol=1e-4, atol=1e-6)
  for value, wanted in zip(values, expected, strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_take_the_step_of_the_whole_batch():
  run = dataclasses.replace(RUN, ema_decay=0.9)
  compare(one(), run, FULL, accumulate_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"head": "curricularface", "metric_loss": "triplet_hard"},
    {"head": "adaface", "head_sharding": "sharded"},
    {"head": "magface", "sub_centres": 2, **SAMPLED},
  ],
  ids=lambda changes: str(changes["head"]),
)
def test_so_they_do_on_two_replicas_where_samples_or_rows_depend_on_the_batch(
  two_halves: tf.distribute.Strategy, changes: dict
):
  compare(two_halves, dataclasses.replace(RUN, **changes), HEAD)


@pytest.mark.slow
def test_both_ways_to_add_up_move_batch_norm_alike():
  run = dataclasses.replace(RUN, embedding_batch_norm=True, head="cosface")
  rows, values = train(one(), run, HEAD, accumulate_steps=2)
  # A metric loss needs gradient caching, and with a weight of 0 changes no gradient.
  run = dataclasses.replace(run, metric_loss="triplet_semihard", metric_weight=0.0)
  rows_in_two, values_in_two = train(one(), run, HEAD, accumulate_steps=2)
  both = [metrics.COLUMNS.index(name) for name in ("loss", "gradient_norm")]
  np.testing.assert_allclose(rows[:, both], rows_in_two[:, both], rtol=1e-5)
  for value, other in zip(values, values_in_two, strict=True):
    np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_gradients_that_overflow_in_one_micro_batch_skip_the_step():
  run = dataclasses.replace(RUN, policy="mixed_float16", accumulate_steps=2)
  built = steps.build(one(), run)
  built.loss_scale.scale.assign(2.0**40)
  weights = built.head.class_weights.numpy()
  steps.trainer(one(), built, train_step.settings_of(resolve(run)), HEAD)(1)
  assert built.loss_scale.skipped.numpy() == 1
  np.testing.assert_array_equal(built.head.class_weights.numpy(), weights)


@pytest.mark.parametrize(
  ("count", "replicas", "fitting"), [(3, 1, 2), (16, 1, 8), (5, 2, 4), (12, 2, 4)]
)
def test_what_does_not_divide_is_refused_with_what_would(
  count: int, replicas: int, fitting: int
):
  run = train_config.TrainConfig(global_batch=8, accumulate_steps=count)
  with pytest.raises(errors.UsageError) as caught:
    train_step.micro_batch(run, replicas)
  assert str(caught.value) == (
    f"--accumulate_steps={count} does not divide a replica's batch of {8 // replicas} "
    f"(--global_batch=8 over {replicas} replicas); try --accumulate_steps={fitting}."
  )
