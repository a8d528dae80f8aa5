"""Everything that a training step changes, and how it is built from a config."""

import dataclasses

import tensorflow as tf

from facedist.models import heads, network
from facedist.training import head_settings, optimizers, starting_weights
from facedist.training.config import TrainConfig, with_usual_values
from facedist.training.loss_scale import LossScale


@dataclasses.dataclass(frozen=True)
class TrainState:
  """The variables of a run; all of them are in its checkpoints.

  The head group (embedding layer and class centres) and the backbone have an
  optimizer each, so that each has its own rate and a frozen backbone costs nothing.
  """

  network: network.FaceNetwork
  head: heads.MarginHead
  head_optimizer: optimizers.Optimizer
  backbone_optimizer: optimizers.Optimizer
  loss_scale: LossScale
  step: tf.Variable

  @property
  def head_variables(self) -> list[tf.Variable]:
    """Trainable variables of the embedding layer, then the class centres."""
    return [*self.network.embedding.trainable_variables, self.head.centres]

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables of the backbone."""
    return list(self.network.backbone.trainable_variables)

  def checkpoint(self) -> tf.train.Checkpoint:
    """Returns the object that saves and restores all of it."""
    parts = {field.name: getattr(self, field.name) for field in _fields()}
    return tf.train.Checkpoint(**parts)


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


def build(config: TrainConfig, *, image_size: int, num_identities: int) -> TrainState:
  """Builds the state at step 0; call it in the strategy's scope.

  Raises:
    errors.UsageError: The config names a backbone, head, optimizer or weights that do
      not exist.
  """
  filled = with_usual_values(config)
  tf.keras.utils.set_random_seed(config.seed)
  face_network = build_network(config, image_size)
  starting_weights.load(face_network, config)
  head = heads.MarginHead(
    num_identities=num_identities,
    embedding_size=config.embedding_size,
    seed=config.seed,
    kind=config.head,
    knobs=head_settings.knobs(filled),
    sub_centres=filled.sub_centres or 1,
  )
  head_group = [*face_network.embedding.trainable_variables, head.centres]
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
  )


def _fields() -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(TrainState)
