"""Exponential moving averages of a network's weights, kept beside them in training."""

from collections.abc import Sequence

import tensorflow as tf

from facedist.models.network import FaceNetwork


class ExponentialMovingAverage(tf.Module):
  """Holds an average for each weight of a network, batch norm's own averages too."""

  def __init__(self, averages: Sequence[tf.Variable]) -> None:
    super().__init__(name="weight_average")
    self.averages = list(averages)

  def follow(
    self,
    network: FaceNetwork,
    strategy: tf.distribute.Strategy,
    *,
    step: tf.Tensor,
    decay: float,
  ) -> None:
    """Moves the averages: a ← a - (1 - d) (a - w); called in cross-replica context.

    Each device updates its own from what it has, so nothing travels.

    Args:
      network: Whose weights they follow.
      strategy: Whose replicas hold both.
      step: int64[] steps before this one.
      decay: What `decay_at` makes d of.
    """

    def move(own: tf.Variable, weight: tf.Variable, share: tf.Tensor) -> None:
      own.assign_sub(share * (own - weight))

    share = 1.0 - decay_at(step, decay=decay)
    for own, weight in zip(self.averages, weights(network), strict=True):
      strategy.extended.update(own, move, args=(weight, share))

  @property
  def mirrored(self) -> list[tf.Variable]:
    """Those that are the same on all replicas."""
    one_each = tf.VariableSynchronization.ON_READ
    return [each for each in self.averages if each.synchronization != one_each]


def weights(network: FaceNetwork) -> list[tf.Variable]:
  """Returns the weights that are averaged, in the order of their averages."""
  return [*network.backbone.weights, *network.embedding.weights]


def start(network: FaceNetwork) -> ExponentialMovingAverage:
  """Makes averages that are the weights of now; call it in the strategy's scope.

  An average is held as its weight is: the same on all replicas, or one a replica whose
  mean is saved, as batch norm's. The mean of averages is the average of the means.
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

  So the random weights of the first steps are soon forgotten.

  Args:
    step: int64[] steps before this one.
    decay: Weight of what was against the new weights, in the long run.
  """
  done = tf.cast(step, tf.float32)
  return tf.minimum(decay, (1.0 + done) / (10.0 + done))


def in_place_of(network: FaceNetwork) -> ExponentialMovingAverage:
  """Returns what restores saved averages straight into the network's weights."""
  return ExponentialMovingAverage(weights(network))
