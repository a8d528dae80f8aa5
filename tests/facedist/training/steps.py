"""Training steps on random images, for the tests of what a step does."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from facedist.data import augment
from facedist.training import metrics, schedules, step_health, train_state, train_step
from facedist.training.config import TrainConfig, resolve

IDENTITIES = 5
BATCH = 8
SPECK = TrainConfig(
  backbone="speck",
  backbone_weights="none",
  embedding_size=8,
  embedding_batch_norm=False,
  global_batch=BATCH,
  scale=8.0,
  augment_flip=False,
  augment_crop=0.0,
  augment_color=0.0,
)
FULL = schedules.Phase("full", 0, 100, 0, 0.1, 0.1, tf.ones_like)
HEAD = dataclasses.replace(FULL, name="head", backbone_learning_rate=0.0)


@functools.cache
def one() -> tf.distribute.Strategy:
  return tf.distribute.OneDeviceStrategy("CPU:0")


def dataset(
  num_replicas: int, first_step: int = 0, *, num_batches: int = 8
) -> tf.data.Dataset:
  """Each replica's part of the same global batches in turn; some are damaged."""
  rng = np.random.default_rng(0)
  count = num_batches * BATCH
  content = {
    "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
    "label": rng.integers(0, IDENTITIES, count).astype(np.int32),
    "draws": rng.uniform(size=(count, augment.NUM_DRAWS)).astype(np.float32),
    "weight": np.ones(count, np.float32),
    "damaged": (np.arange(count) % 4 == 0).astype(np.float32),
  }
  records = tf.data.Dataset.from_tensor_slices(content).skip(first_step * BATCH)
  return records.batch(BATCH // num_replicas, drop_remainder=True).repeat()


def distribute(strategy: tf.distribute.Strategy, parts: tf.data.Dataset) -> Iterator:
  return iter(strategy.distribute_datasets_from_function(lambda _: parts))


def batches(
  strategy: tf.distribute.Strategy, first_step: int = 0, *, num_batches: int = 8
) -> Iterator:
  """The same global batches, however many replicas share them."""
  replicas = strategy.num_replicas_in_sync
  return distribute(strategy, dataset(replicas, first_step, num_batches=num_batches))


def build(
  strategy: tf.distribute.Strategy, run: TrainConfig, *, identities: int = IDENTITIES
) -> train_state.TrainState:
  return train_state.build_train_state(
    strategy, resolve(run), image_size=32, num_identities=identities
  )


def trainer(
  strategy: tf.distribute.Strategy,
  built: train_state.TrainState,
  run: TrainConfig,
  phase: schedules.Phase = FULL,
  *,
  batches: Callable[[tf.distribute.Strategy, int], Iterator] = batches,
) -> Callable[[int], np.ndarray]:
  """Returns what trains on from the state's step; its rows lack the time waited."""
  settings = train_step.settings_of(resolve(run))
  loop = train_step.train_loop(
    built, phase, settings, strategy, step_health.StepHealth()
  )

  def train_on(num_steps: int) -> np.ndarray:
    content = batches(strategy, int(built.step.numpy()))
    rows, flags = loop(content, tf.constant(num_steps))
    assert not flags.numpy().any()
    return rows.numpy()[:, :-1]

  return train_on


class Trained(NamedTuple):
  """A run from its first step on: its rows and state, and its weights then and now."""

  rows: np.ndarray
  built: train_state.TrainState
  before: list[np.ndarray]
  after: list[np.ndarray]


def train(
  strategy: tf.distribute.Strategy,
  run: TrainConfig,
  num_steps: int,
  phase: schedules.Phase = FULL,
  *,
  identities: int = IDENTITIES,
) -> Trained:
  built = build(strategy, run, identities=identities)
  before = weights(built)
  rows = trainer(strategy, built, run, phase)(num_steps)
  return Trained(rows, built, before, weights(built))


def weights(built: train_state.TrainState) -> list[np.ndarray]:
  """What is trained, the head's group first."""
  variables = [*built.head_variables, *built.backbone_variables]
  return [variable.numpy() for variable in variables]


def column(rows: np.ndarray, name: str) -> np.ndarray:
  return rows[:, metrics.COLUMNS.index(name)]
