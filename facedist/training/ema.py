"""Exponential moving averages of a network's weights, kept beside them in training."""

from collections.abc import Sequence

import tensorflow as tf

from facedist.models.network import FaceNetwork


class ExponentialMovingAverage(tf.Module):
  """Holds an average for each weight of a network, batch norm's own averages too."""

  def __init__(self, averages: Sequence[tf.Variable]) -> None:
    super().__init__(name="weight_average")
    self.averages = list(averages)

  def update(
    self,
    network: FaceNetwork,
    strategy: tf.distribute.Strategy,
    *,
    step: tf.Tensor,
    decay: float,
  ) -> None:
    """Moves the averages: a ← a - (1 - d) (a - w); called in cross-replica context.

    Each device updates its own copy, so no communication is needed.

    Args:
      network: The network whose weights are averaged.
      strategy: The strategy whose replicas hold the weights and the averages.
      step: int64[] steps before this one.
      decay: The decay after many steps; see `decay_at`.
    """

    def move(own: tf.Variable, weight: tf.Variable, rate: tf.Tensor) -> None:
      own.assign_sub(rate * (own - weight))

    rate = 1.0 - decay_at(step, decay=decay)
    for own, weight in zip(self.averages, weights(network), strict=True):
      strategy.extended.update(own, move, args=(weight, rate))

  @property
  def mirrored(self) -> list[tf.Variable]:
    """The averages that are the same on all replicas."""
    one_each = tf.VariableSynchronization.ON_READ
    return [each for each in self.averages if each.synchronization != one_each]


def weights(network: FaceNetwork) -> list[tf.Variable]:
  """Returns the weights that are averaged, in the order of their averages."""
  return [*network.backbone.weights, *network.embedding.weights]


def start(network: FaceNetwork) -> ExponentialMovingAverage:
  """Makes averages equal to the current weights; call it in the strategy's scope.

  An average is mirrored if its weight is. Batch norm's weights have one value a replica
  and their mean is saved; so have their averages, since the mean of the averages is the
  average of the means.
  """
  local = tf.distribute.get_strategy().experimental_local_results
  return ExponentialMovingAverage(
    [
      tf.Variable(
        local(weight)[0].read_value(),  # reading the mean would be a collective each
        name="average",
        trainable=False,
        synchronization=weight.synchronization,
        aggregation=weight.aggregation,
      )
      for weight in weights(network)
    ]
  )


def decay_at(step: tf.Tensor, *, decay: float) -> tf.Tensor:
  """Returns min(decay, (1 + step) / (10 + step)), as tf.train's moving average has it.

  So the average soon forgets the random weights of the first steps.

  Args:
    step: int64[] steps before this one.
    decay: The decay after many steps.
  """
  done = tf.cast(step, tf.float32)
  return tf.minimum(decay, (1.0 + done) / (10.0 + done))


def in_place_of(network: FaceNetwork) -> ExponentialMovingAverage:
  """Returns what restores saved averages straight into the network's weights."""
  return ExponentialMovingAverage(weights(network))
