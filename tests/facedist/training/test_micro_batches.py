"""A batch in micro-batches, beside the same batch at once."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.training import config as train_config
from facedist.training import metrics, schedules, train_step
from tests.facedist.training import steps
from tests.facedist.training.steps import FULL, HEAD, one

IDENTITIES = 11  # six on the first replica, five on the second; labels are below 5
RUN = dataclasses.replace(
  steps.SPECK, dropout=0.25, weight_decay=5e-4, augment_flip=True, augment_color=0.2
)
SAMPLED = {"head_sharding": "sampled", "head_sample_rate": 0.2}


def train(
  strategy: tf.distribute.Strategy,
  run: train_config.TrainConfig,
  phase: schedules.Phase,
  accumulate_steps: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Takes three steps; returns their rows, and all variables after them."""
  run = dataclasses.replace(run, accumulate_steps=accumulate_steps)
  rows, built, *_ = steps.train(strategy, run, 3, phase, identities=IDENTITIES)
  values = [*built.network.variables, *built.head.variables, built.step]
  for shard in built.rows.shards if built.rows else ():
    values += shard.variables.values()
  return rows, [value.numpy() for value in values]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("replicas", "count", "phase", "changes"),
  [
    (1, 4, FULL, {"ema_decay": 0.9}),
    # where samples or rows depend on the batch
    (2, 2, HEAD, {"head": "curricularface", "metric_loss": "triplet_hard"}),
    (2, 2, HEAD, {"head": "adaface", "head_sharding": "sharded"}),
    (2, 2, HEAD, {"head": "magface", "sub_centres": 2, **SAMPLED}),
  ],
)
def test_micro_batches_take_the_step_of_the_whole_batch(
  replicas: int,
  count: int,
  phase: schedules.Phase,
  changes: dict[str, Any],
  two_halves: tf.distribute.Strategy,
):
  strategy = one() if replicas == 1 else two_halves
  run = dataclasses.replace(RUN, **changes)
  rows, values = train(strategy, run, phase, count)
  expected_rows, expected = train(strategy, run, phase, 1)
  np.testing.assert_allclose(rows, expected_rows, rtol=1e-4, atol=1e-6)
  for value, wanted in zip(values, expected, strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_ways_to_add_up_move_batch_norm_alike():
  run = dataclasses.replace(RUN, embedding_batch_norm=True)
  rows, values = train(one(), run, HEAD, 2)
  # A metric loss needs gradient caching, and with a weight of 0 changes no gradient.
  run = dataclasses.replace(run, metric_loss="triplet_semihard", metric_weight=0.0)
  rows_in_two, values_in_two = train(one(), run, HEAD, 2)
  both = [metrics.COLUMNS.index(name) for name in ("loss", "gradient_norm")]
  np.testing.assert_allclose(rows[:, both], rows_in_two[:, both], rtol=1e-5)
  for value, other in zip(values, values_in_two, strict=True):
    np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("count", "replicas", "fitting"), [(3, 1, 2), (16, 1, 8), (5, 2, 4), (12, 2, 4)]
)
def test_what_does_not_divide_is_refused_with_what_would(
  count: int, replicas: int, fitting: int
):
  run = train_config.TrainConfig(global_batch=8, accumulate_steps=count)
  says = (
    rf"--accumulate_steps={count} does not divide a replica's batch of {8 // replicas} "
    rf".* over {replicas} replicas\); try --accumulate_steps={fitting}\."
  )
  with pytest.raises(errors.UsageError, match=says):
    train_step.micro_batch(run, replicas)
