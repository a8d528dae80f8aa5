"""The variables of a run, and how they are built from its config.

The weights of a new run may come from a Keras file, from an arcface_torch network, or
from a checkpoint of another run (`--backbone_weights`).
"""

import dataclasses
import os
from collections.abc import Mapping

import tensorflow as tf
from absl import logging

from facedist import errors, storage
from facedist.distributed import strategies
from facedist.distributed.collectives import Gradient
from facedist.models import network, pretrained
from facedist.models.heads import replicated
from facedist.models.heads.base import Head, NoHead
from facedist.models.heads.class_weights import RowTable, row_shape
from facedist.models.heads.sharded import ShardedHead
from facedist.models.network import FaceNetwork
from facedist.training import config as train_config
from facedist.training import ema, metric_losses, optimizers, sharded_optimizers
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig
from facedist.training.ema import ExponentialMovingAverage
from facedist.training.loss_scale import LossScale
from facedist.training.sharded_optimizers import RowOptimizer

_LAYER_SETTINGS = ("embedding_size", "pooling", "embedding_batch_norm")


@dataclasses.dataclass(frozen=True)
class TrainState:
  """The variables of a run; all of them are in its checkpoints.

  The head group (embedding layer and class weights) and the backbone have an
  optimizer each, so that each has its own learning rate and a frozen backbone costs no
  update.

  Attributes:
    rows: The class weights of a sharded head and their slots, which are not mirrored;
      None where every replica holds all class weights.
    row_optimizer: Updates `rows`.
    average: The average of the network's weights; None without --ema_decay.
  """

  network: network.FaceNetwork
  head: Head
  head_optimizer: optimizers.Optimizer
  backbone_optimizer: optimizers.Optimizer
  loss_scale: LossScale
  step: tf.Variable
  rows: RowTable | None = None
  row_optimizer: RowOptimizer | None = None
  average: ExponentialMovingAverage | None = None

  @property
  def head_variables(self) -> list[tf.Variable]:
    """Variables of the embedding layer, then the class weights if they are mirrored."""
    return [
      *self.network.embedding.trainable_variables,
      *self.head.mirrored_class_weights,
    ]

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables of the backbone."""
    return list(self.network.backbone.trainable_variables)

  @property
  def mirrored_variables(self) -> list[tf.Variable]:
    """Variables that must be the same on all replicas."""
    mirrored = [*self.head_variables, *self.backbone_variables]
    if self.head.running_statistics is not None:
      mirrored.append(self.head.running_statistics)
    if self.average is not None:
      mirrored += self.average.mirrored
    return mirrored

  def update_own_rows(self, gradient: Gradient) -> None:
    """Updates the class weights that only the calling replica holds.

    It uses the learning rate of the head optimizer and the number of its next update.
    """
    if self.rows is None or self.row_optimizer is None:
      return
    sharded_optimizers.update(
      self.rows.own_shard(),
      self.row_optimizer,
      gradient,
      learning_rate=tf.convert_to_tensor(self.head_optimizer.learning_rate),
      updates=tf.convert_to_tensor(self.head_optimizer.iterations) + 1,
    )

  def checkpoint(self) -> tf.train.Checkpoint:
    """Returns the object that saves and restores everything except the rows."""
    excluded = ("rows", "row_optimizer")
    parts = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in excluded
    }
    kept = {name: part for name, part in parts.items() if part is not None}
    return tf.train.Checkpoint(**kept)


def network_from_config(settings: TrainConfig, image_size: int) -> network.FaceNetwork:
  """Builds the network that a config describes, with random weights."""
  return network.build_network(
    backbone=settings.backbone,
    image_size=image_size,
    embedding_size=settings.embedding_size,
    pooling=settings.pooling,
    embedding_batch_norm=settings.embedding_batch_norm,
    dropout=settings.dropout,
    batch_norm_momentum=settings.batch_norm_momentum,
    policy=settings.policy,
    sync_batch_norm=settings.sync_batch_norm,
    freeze_until=settings.freeze_until,
  )


def build_train_state(
  strategy: tf.distribute.Strategy,
  settings: TrainConfig,
  *,
  image_size: int,
  num_identities: int,
) -> TrainState:
  """Builds the state at step 0 for a strategy; call it outside the strategy's scope.

  Raises:
    errors.UsageError: The config names a backbone, head or weights that do not exist,
      or an optimizer that cannot update the rows of a sharded head.
  """
  rows = build_rows(
    settings,
    strategies.places(strategy),
    num_replicas=strategy.num_replicas_in_sync,
    num_identities=num_identities,
  )
  with strategy.scope():
    return build(
      settings, image_size=image_size, num_identities=num_identities, rows=rows
    )


def build_rows(
  settings: TrainConfig,
  places: Mapping[int, str],
  *,
  num_replicas: int,
  num_identities: int,
) -> RowTable | None:
  """Draws this process's part of the class weights; None if the head is replicated.

  Call it outside the strategy's scope, which would mirror them.

  Args:
    settings: Says whether the head is sharded.
    places: The replicas of this process and their devices.
    num_replicas: Of all processes.
    num_identities: Of the data.

  Raises:
    errors.UsageError: The optimizer cannot update rows.
  """
  if settings.head_sharding == "replicated":
    return None
  rows = RowTable(
    num_rows=num_identities,
    row_shape=row_shape(settings.embedding_size, settings.sub_centres or 1),
    slots=_row_optimizer(settings).slots,
    num_replicas=num_replicas,
    places=places,
  )
  rows.draw_class_weights(settings.seed, piece_rows=settings.head_shard_rows)
  return rows


def build(
  settings: TrainConfig,
  *,
  image_size: int,
  num_identities: int,
  rows: RowTable | None = None,
) -> TrainState:
  """Builds the state at step 0; call it in the strategy's scope.

  Args:
    settings: Of the run, as `resolve` returns it.
    image_size: Height and width in pixels.
    num_identities: Of the data.
    rows: Of `build_rows`.

  Raises:
    errors.UsageError: The config names a backbone, head, optimizer or weights that do
      not exist, or a loss that needs what is not installed.
  """
  metric_losses.check_metric_loss(settings)
  tf.keras.utils.set_random_seed(settings.seed)
  face_network = network_from_config(settings, image_size)
  load_starting_weights(face_network, settings)
  head = _head(settings, num_identities, rows)
  head_group = [
    *face_network.embedding.trainable_variables,
    *head.mirrored_class_weights,
  ]
  return TrainState(
    network=face_network,
    head=head,
    head_optimizer=optimizers.build(settings, head_group),
    backbone_optimizer=optimizers.build(
      settings, face_network.backbone.trainable_variables
    ),
    loss_scale=LossScale(is_dynamic=settings.policy == "mixed_float16"),
    step=tf.Variable(
      0,
      name="step",
      dtype=tf.int64,
      trainable=False,
      aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    ),
    rows=rows,
    row_optimizer=None if rows is None else _row_optimizer(settings),
    average=ema.start(face_network) if settings.ema_decay else None,
  )


def _row_optimizer(settings: TrainConfig) -> RowOptimizer:
  """Builds the same optimizer for rows that only one replica holds."""
  hyperparameters = train_config.hyperparameters(settings)
  return sharded_optimizers.make_row_optimizer(
    settings.optimizer, hyperparameters, nesterov=settings.nesterov
  )


def _head(settings: TrainConfig, num_identities: int, rows: RowTable | None) -> Head:
  """Builds the head over `rows`; without rows, with class weights of its own."""
  if settings.head == train_config.NO_HEAD:
    return NoHead()
  margin = train_config.margin_of(settings)
  if rows is None:
    return replicated.MarginHead(
      num_identities=num_identities,
      embedding_size=settings.embedding_size,
      seed=settings.seed,
      margin=margin,
      scale=settings.scale,
      sub_centres=settings.sub_centres or 1,
    )
  return ShardedHead(
    rows,
    margin=margin,
    scale=settings.scale,
    seed=settings.seed,
    sample_rate=settings.head_sample_rate,
  )


def check_starting_weights(config: TrainConfig) -> None:
  """Checks --backbone_weights as far as that is possible without a network.

  Raises:
    errors.UsageError: The weights do not exist or are of another backbone.
  """
  found = _checkpoint_of(config.backbone_weights)
  if found is None:
    pretrained.check_weights_file(config.backbone, config.backbone_weights)
  else:
    _run_of(config, found[0])


def load_starting_weights(network: FaceNetwork, config: TrainConfig) -> None:
  """Sets a network's weights to those that --backbone_weights names.

  Call it in the strategy's scope, on every worker.

  Raises:
    errors.UsageError: They do not exist, are of another backbone or not finite.
    errors.DataError: The checkpoint is corrupt.
  """
  found = _checkpoint_of(config.backbone_weights)
  if found is None:
    pretrained.load_weights_file(network, config.backbone_weights)
  else:
    _from_checkpoint(network, config, *found)


def _checkpoint_of(source: str) -> tuple[str, checkpoints.Checkpoint] | None:
  """Returns the workdir and checkpoint that a source names; None if it is no run.

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
  """Returns the config of the run that the weights come from.

  Raises:
    errors.UsageError: That run has another backbone.
  """
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
  """Restores the backbone, and the embedding layer if it has the same settings."""
  theirs = _run_of(config, workdir)
  is_same = checkpoint.marker()["image_size"] == network.image_size and all(
    getattr(theirs, name) == getattr(config, name) for name in _LAYER_SETTINGS
  )
  part = tf.Module()  # its attributes are named as those of a TrainState
  part.backbone = network.backbone
  if is_same:
    part.embedding = network.embedding
  checkpoints.restore(tf.train.Checkpoint(network=part), checkpoint, is_whole=False)
  taken = network.backbone.weights + (network.embedding.weights if is_same else [])
  pretrained.check_finite(taken, checkpoint.path)
  logging.info(
    "%s: restored the backbone; embedding layer %s",
    checkpoint.path,
    "restored too" if is_same else "has other settings and starts at random",
  )
