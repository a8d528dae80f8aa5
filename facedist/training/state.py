"""Everything that a training step changes, and how it is built from a config."""

import dataclasses
from collections.abc import Mapping

import tensorflow as tf

from facedist import strategies
from facedist.models import heads, network
from facedist.models.head import Head
from facedist.models.no_head import NoHead
from facedist.models.row_table import RowTable, row_shape
from facedist.models.sharded_head import ShardedHead
from facedist.training import (
  head_settings,
  metric_learning,
  optimizer_settings,
  optimizers,
  row_optimizers,
  starting_weights,
  weight_average,
)
from facedist.training.config import TrainConfig, with_usual_values
from facedist.training.gradients import Gradient
from facedist.training.loss_scale import LossScale
from facedist.training.row_optimizers import RowOptimizer
from facedist.training.weight_average import WeightAverage


@dataclasses.dataclass(frozen=True)
class TrainState:
  """The variables of a run; all of them are in its checkpoints.

  The head group (embedding layer and class centres) and the backbone have an
  optimizer each, so that each has its own rate and a frozen backbone costs nothing.

  Attributes:
    rows: The class centres of a sharded head and their slots, which no strategy
      mirrors; none where every replica holds all centres.
    row_optimizer: What updates them.
    average: Of the network's weights; none without --ema_decay.
  """

  network: network.FaceNetwork
  head: Head
  head_optimizer: optimizers.Optimizer
  backbone_optimizer: optimizers.Optimizer
  loss_scale: LossScale
  step: tf.Variable
  rows: RowTable | None = None
  row_optimizer: RowOptimizer | None = None
  average: WeightAverage | None = None

  @property
  def head_variables(self) -> list[tf.Variable]:
    """Mirrored variables of the embedding layer, then the class centres if they are."""
    return [*self.network.embedding.trainable_variables, *self.head.mirrored_centres]

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables of the backbone."""
    return list(self.network.backbone.trainable_variables)

  @property
  def mirrored_variables(self) -> list[tf.Variable]:
    """What must be the same on all replicas, and is compared."""
    mirrored = [*self.head_variables, *self.backbone_variables]
    if self.head.memory is not None:
      mirrored.append(self.head.memory)
    if self.average is not None:
      mirrored += self.average.mirrored
    return mirrored

  def update_own_rows(self, gradient: Gradient) -> None:
    """Updates the class centres that the replica that calls it holds alone.

    It does so by the head optimizer's rate, as that optimizer's next update.
    """
    if self.rows is None or self.row_optimizer is None:
      return
    row_optimizers.update(
      self.rows.own_shard(),
      self.row_optimizer,
      gradient,
      rate=tf.convert_to_tensor(self.head_optimizer.learning_rate),
      updates=tf.convert_to_tensor(self.head_optimizer.iterations) + 1,
    )

  def checkpoint(self) -> tf.train.Checkpoint:
    """Returns the object that saves and restores all of it but the rows."""
    apart = ("rows", "row_optimizer")
    parts = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in apart
    }
    kept = {name: part for name, part in parts.items() if part is not None}
    return tf.train.Checkpoint(**kept)


def build_network(config: TrainConfig, image_size: int) -> network.FaceNetwork:
  """Builds the network that a config describes, with random weights."""
  return network.build_network(
    backbone=config.backbone,
    image_size=image_size,
    embedding_size=config.embedding_size,
    pooling=config.pooling,
    embedding_batch_norm=config.embedding_batch_norm,
    dropout=config.dropout,
    batch_norm_momentum=config.batch_norm_momentum,
    policy=config.policy,
    sync_batch_norm=config.sync_batch_norm,
    freeze_until=config.freeze_until,
  )


def build_in(
  strategy: tf.distribute.Strategy,
  config: TrainConfig,
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
    config,
    strategies.places(strategy),
    num_replicas=strategy.num_replicas_in_sync,
    num_identities=num_identities,
  )
  with strategy.scope():
    return build(
      config, image_size=image_size, num_identities=num_identities, rows=rows
    )


def build_rows(
  config: TrainConfig,
  places: Mapping[int, str],
  *,
  num_replicas: int,
  num_identities: int,
) -> RowTable | None:
  """Draws this process's share of the class centres, where the head is sharded.

  Call it outside the strategy's scope, which would mirror them.

  Args:
    config: Says whether the head is sharded.
    places: The replicas of this process and their devices.
    num_replicas: Of all processes.
    num_identities: Of the data.

  Raises:
    errors.UsageError: The optimizer cannot update rows.
  """
  if config.head_sharding == "replicated":
    return None
  filled = head_settings.with_usual_margins(config)
  rows = RowTable(
    num_rows=num_identities,
    row_shape=row_shape(config.embedding_size, filled.sub_centres or 1),
    slots=_row_optimizer(config).slots,
    num_replicas=num_replicas,
    places=places,
  )
  rows.draw_centres(config.seed, piece_rows=config.head_shard_rows)
  return rows


def build(
  config: TrainConfig,
  *,
  image_size: int,
  num_identities: int,
  rows: RowTable | None = None,
) -> TrainState:
  """Builds the state at step 0; call it in the strategy's scope.

  Args:
    config: Of the run.
    image_size: Height and width in pixels.
    num_identities: Of the data.
    rows: Of `build_rows`.

  Raises:
    errors.UsageError: The config names a backbone, head, optimizer or weights that do
      not exist, or a loss that needs what is not installed.
  """
  filled = with_usual_values(config)
  metric_learning.check(filled)
  tf.keras.utils.set_random_seed(config.seed)
  face_network = build_network(config, image_size)
  starting_weights.load(face_network, config)
  head = _head(filled, num_identities, rows)
  head_group = [*face_network.embedding.trainable_variables, *head.mirrored_centres]
  return TrainState(
    network=face_network,
    head=head,
    head_optimizer=optimizers.build(filled, head_group),
    backbone_optimizer=optimizers.build(
      filled, face_network.backbone.trainable_variables
    ),
    loss_scale=LossScale(is_dynamic=config.policy == "mixed_float16"),
    step=tf.Variable(
      0,
      name="step",
      dtype=tf.int64,
      trainable=False,
      aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    ),
    rows=rows,
    row_optimizer=None if rows is None else _row_optimizer(filled),
    average=weight_average.start(face_network) if config.ema_decay else None,
  )


def _row_optimizer(config: TrainConfig) -> RowOptimizer:
  """The same optimizer, for rows that one replica alone holds."""
  numbers = optimizer_settings.numbers(config)
  return row_optimizers.build(config.optimizer, numbers, nesterov=config.nesterov)


def _head(filled: TrainConfig, num_identities: int, rows: RowTable | None) -> Head:
  """Builds the head over these rows; over centres of its own if there are none."""
  if filled.head == head_settings.NO_HEAD:
    return NoHead()
  knobs = head_settings.knobs(filled)
  if rows is None:
    return heads.MarginHead(
      num_identities=num_identities,
      embedding_size=filled.embedding_size,
      seed=filled.seed,
      kind=filled.head,
      knobs=knobs,
      sub_centres=filled.sub_centres or 1,
    )
  return ShardedHead(
    rows,
    kind=filled.head,
    knobs=knobs,
    seed=filled.seed,
    sample_rate=filled.head_sample_rate,
  )
