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


def load(network: FaceNetwork, config: TrainConfig) -> None:
  """Sets a network's weights to those that --backbone_weights names.

  Call it in the strategy's scope, on every worker.

  Raises:
    errors.UsageError: They do not exist or are of another backbone.
    errors.DataError: The checkpoint is damaged.
  """
  source = config.backbone_weights.rstrip("/")
  if storage.exists(storage.join(source, "config.json")):
    found = checkpoints.list_checkpoints(source)
    if not found:
      raise errors.UsageError(
        f"--backbone_weights={source} is a run without a checkpoint; wait for its "
        "first or name another."
      )
    _from_checkpoint(network, config, source, found[-1])
    return
  # step-00000100, or any of its files
  stem = os.path.splitext(source)[0]
  folder, name = os.path.split(stem)
  step = checkpoints.step_of(name)
  is_in_run = os.path.basename(folder) == "checkpoints"
  if step is not None and is_in_run and storage.exists(stem + ".json"):
    workdir = os.path.dirname(folder)
    _from_checkpoint(network, config, workdir, checkpoints.at(workdir, step))
    return
  weights.load(network, config.backbone_weights)


def _from_checkpoint(
  network: FaceNetwork,
  config: TrainConfig,
  workdir: str,
  checkpoint: checkpoints.Checkpoint,
) -> None:
  """Restores the backbone, and the embedding layer if that run's was the same."""
  theirs = checkpoints.load_config(workdir)
  if theirs.backbone != config.backbone:
    raise errors.UsageError(
      f"--backbone_weights={config.backbone_weights} is of "
      f"--backbone={theirs.backbone}, not {config.backbone}; give its "
      "backbone or other weights."
    )
  is_same = checkpoint.marker()["image_size"] == network.image_size and all(
    getattr(theirs, name) == getattr(config, name) for name in _LAYER_SETTINGS
  )
  part = tf.Module()  # with the names under which a run's state holds them
  part.backbone = network.backbone
  if is_same:
    part.embedding = network.embedding
  restoring.restore(tf.train.Checkpoint(network=part), checkpoint, is_whole=False)
  logging.info(
    "%s: backbone taken; embedding layer %s",
    checkpoint.path,
    "taken too" if is_same else "of other settings, so it starts at random",
  )
