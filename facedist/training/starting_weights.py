"""Where a new run's weights come from, another run's checkpoint among it."""

import os

import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.models import weights
from facedist.models.network import FaceNetwork
from facedist.training import checkpoints, restoring
from facedist.training.config import TrainConfig

_LAYER_SETTINGS = ("embedding_size", "pooling", "embedding_batch_norm")


def check(config: TrainConfig) -> None:
  """Finds what can be told to be wrong with --backbone_weights without a network.

  Raises:
    errors.UsageError: The weights do not exist or are of another backbone.
  """
  found = _checkpoint_of(config.backbone_weights)
  if found is None:
    weights.check(config.backbone, config.backbone_weights)
  else:
    _run_of(config, found[0])


def load(network: FaceNetwork, config: TrainConfig) -> None:
  """Sets a network's weights to those that --backbone_weights names.

  Call it in the strategy's scope, on every worker.

  Raises:
    errors.UsageError: They do not exist, are of another backbone or not finite.
    errors.DataError: The checkpoint is damaged.
  """
  found = _checkpoint_of(config.backbone_weights)
  if found is None:
    weights.load(network, config.backbone_weights)
  else:
    _from_checkpoint(network, config, *found)


def _checkpoint_of(source: str) -> tuple[str, checkpoints.Checkpoint] | None:
  """Returns the workdir and the checkpoint that a source names; none if it is no run's.

  Raises:
    errors.UsageError: It is a run without a checkpoint.
  """
  source = source.rstrip("/")
  if storage.exists(storage.join(source, "config.json")):
    found = checkpoints.list_checkpoints(source)
    if not found:
      raise errors.UsageError(
        f"--backbone_weights={source} is a run without a checkpoint; wait for its "
        "first or name another."
      )
    return source, found[-1]
  # step-00000100, or any of its files
  stem = os.path.splitext(source)[0]
  folder, name = os.path.split(stem)
  step = checkpoints.step_of(name)
  is_in_run = os.path.basename(folder) == "checkpoints"
  if step is not None and is_in_run and storage.exists(stem + ".json"):
    workdir = os.path.dirname(folder)
    return workdir, checkpoints.at(workdir, step)
  return None


def _run_of(config: TrainConfig, workdir: str) -> TrainConfig:
  """Returns the config of the run that weights come from, if its backbone is ours."""
  theirs = checkpoints.load_config(workdir)
  if theirs.backbone != config.backbone:
    raise errors.UsageError(
      f"--backbone_weights={config.backbone_weights} is of "
      f"--backbone={theirs.backbone}, not {config.backbone}; give its "
      "backbone or other weights."
    )
  return theirs


def _from_checkpoint(
  network: FaceNetwork,
  config: TrainConfig,
  workdir: str,
  checkpoint: checkpoints.Checkpoint,
) -> None:
  """Restores the backbone, and the embedding layer if that run's was the same."""
  theirs = _run_of(config, workdir)
  is_same = checkpoint.marker()["image_size"] == network.image_size and all(
    getattr(theirs, name) == getattr(config, name) for name in _LAYER_SETTINGS
  )
  part = tf.Module()  # with the names under which a run's state holds them
  part.backbone = network.backbone
  if is_same:
    part.embedding = network.embedding
  restoring.restore(tf.train.Checkpoint(network=part), checkpoint, is_whole=False)
  taken = network.backbone.weights + (network.embedding.weights if is_same else [])
  weights.check_finite(taken, checkpoint.path)
  logging.info(
    "%s: backbone taken; embedding layer %s",
    checkpoint.path,
    "taken too" if is_same else "of other settings, so it starts at random",
  )
