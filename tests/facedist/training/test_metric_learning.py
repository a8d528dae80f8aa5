"""Triplets in the training step: alone or added, on one replica and on two."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow as tf

from facedist.data import pipeline
from facedist.data.readers import local_reader
from facedist.training import inputs, metric_writer, schedules, train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig
from tests import noise_sets, processes
from tests.facedist.training import steps
from tests.facedist.training.steps import column, one

IDENTITIES = 6
ALONE = dataclasses.replace(
  steps.SPECK,
  embedding_size=16,
  scale=None,
  global_batch=16,
  head="none",
  metric_loss="triplet_hard",
  metric_margin=0.3,
  sampler="identities",
  identities_per_batch=4,
)
ADDED = dataclasses.replace(
  ALONE, head="cosface", scale=8.0, metric_loss="triplet_semihard", metric_weight=2.0
)
FULL = schedules.Phase("full", 0, 100, 0, 0.05, 0.05, tf.ones_like)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(
    folder, identities=IDENTITIES, images=9, val_images=4, size=32, shards=2
  )
  return folder


def build(strategy: tf.distribute.Strategy, run: TrainConfig) -> train_state.TrainState:
  return steps.build(strategy, run, identities=IDENTITIES)


def trainer(
  shards: str,
  strategy: tf.distribute.Strategy,
  built: train_state.TrainState,
  run: TrainConfig,
  phase: schedules.Phase = FULL,
) -> Callable[[int], np.ndarray]:
  """Returns what trains some steps on, compiled once."""

  def batches(strategy: tf.distribute.Strategy, first_step: int) -> Iterator:
    opened = local_reader.open_reader(shards, "train")
    dataset = pipeline.training_dataset(
      opened,
      inputs.make_sampler(run, opened),
      seed=run.seed,
      start_step=first_step,
      local_replicas=strategy.num_replicas_in_sync,
    )
    return iter(strategy.distribute_datasets_from_function(lambda _: dataset))

  return steps.trainer(strategy, built, run, phase, batches=batches)


def separation(shards: str, built: train_state.TrainState) -> float:
  """Returns how much nearer images of one identity are than others, in cosine.

  They are those of the split val, which nobody trained on.
  """
  opened = local_reader.open_reader(shards, "val")
  images, labels = opened.read_batch(np.arange(opened.num_records))
  embeddings = built.network.embed(tf.constant(images)).numpy()
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  cosines = embeddings @ embeddings.T
  is_same = labels[:, None] == labels
  is_pair = ~np.eye(len(labels), dtype=bool)
  return float(cosines[is_same & is_pair].mean() - cosines[~is_same].mean())


@pytest.fixture(scope="module")
def alone(shards: str) -> tuple[np.ndarray, float, float]:
  """Twenty steps of triplets alone: their rows, and the separation before and after."""
  built = build(one(), ALONE)
  assert built.head_variables == built.network.embedding.trainable_variables
  before = separation(shards, built)
  rows = trainer(shards, one(), built, ALONE)(20)
  return rows, before, separation(shards, built)


@pytest.mark.slow
def test_triplets_alone_lower_the_loss_and_tell_identities_apart(
  alone: tuple[np.ndarray, float, float],
):
  rows, before, after = alone
  losses = column(rows, "loss") / 16
  assert losses[0] > 0.2
  assert losses[-10:].mean() < 0.25 * losses[0]
  assert after > before + 0.15


@pytest.mark.slow
def test_without_class_weights_the_log_has_nothing_that_only_they_could_tell(
  alone: tuple[np.ndarray, float, float], tmp_path: pathlib.Path
):
  rows = alone[0]
  log = metric_writer.MetricWriter(str(tmp_path), total_steps=20, is_chief=True)
  waited = np.full((20, 1), np.nan, np.float32)
  log.interval(step=20, phase="full", rows=np.hstack([rows, waited]), seconds=4.0)
  log.close()
  entry = json.loads((tmp_path / metric_writer.LOG_NAME).read_text())
  mean = column(rows, "metric_loss").mean() / 16
  assert entry["metric_loss"] == pytest.approx(mean, rel=1e-5)
  assert entry["loss"] == pytest.approx(mean, rel=1e-5)
  assert not {"accuracy", "precision", "recall", "target_cosine"} & set(entry)


@pytest.mark.slow
def test_two_replicas_mine_the_batch_of_one(
  alone: tuple[np.ndarray, float, float],
  shards: str,
  two_halves: tf.distribute.Strategy,
):
  rows = trainer(shards, two_halves, build(two_halves, ALONE), ALONE)(3)
  np.testing.assert_allclose(rows, alone[0][:3], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_triplets_stopped_and_resumed_is_the_undisturbed_one_to_the_bit(
  alone: tuple[np.ndarray, float, float], shards: str, tmp_path: pathlib.Path
):
  stopped = build(one(), ALONE)
  trainer(shards, one(), stopped, ALONE)(2)
  checkpoints.save(stopped.checkpoint(), str(tmp_path), step=2, is_chief=True, facts={})
  resumed = build(one(), dataclasses.replace(ALONE, seed=9))
  found = checkpoints.at(str(tmp_path), 2)
  checkpoints.restore(resumed.checkpoint(), found, is_whole=True)
  # loss and norm of the gradient, of this step and those that follow from it
  rows = trainer(shards, one(), resumed, ALONE)(3)
  np.testing.assert_array_equal(rows, alone[0][2:5])


@pytest.mark.slow
def test_added_the_loss_is_the_heads_and_the_triplets_by_their_weight(
  shards: str, two_halves: tf.distribute.Strategy
):
  still = dataclasses.replace(FULL, learning_rate=0.0, backbone_learning_rate=1e-30)
  plain = dataclasses.replace(ADDED, metric_loss="none")
  both = trainer(shards, two_halves, build(two_halves, ADDED), ADDED, still)(2)
  head = trainer(shards, one(), build(one(), plain), plain, still)(2)
  assert np.isnan(column(head, "metric_loss")).all()
  expected = column(head, "loss") + 2.0 * column(both, "metric_loss")
  np.testing.assert_allclose(column(both, "loss"), expected, rtol=1e-5)
  np.testing.assert_array_equal(column(both, "correct"), column(head, "correct"))


@pytest.mark.slow
def test_a_dry_run_trains_triplets_without_class_weights():
  flags = "--head=none --metric_loss=triplet_semihard --sampler=identities"
  flags += " --backbone=speck --backbone_weights=none --embedding_size=16"
  flags += " --head_epochs=0 --accumulate_steps=4"
  result = processes.run("facedist.train", "--dry_run", *flags.split())
  assert result.returncode == 0, result.stderr
  assert "2 identities x 2 images a batch" in result.stderr
  assert "2 micro-batches x 2; seed 0" in result.stderr
  assert "no validation: what it measures needs class weights" in result.stderr
  assert "the config works" in result.stderr
