"""The interface of all heads: from a replica's embeddings to losses and metrics.

`replicated.MarginHead` and `sharded.ShardedHead` differ in which replica holds which
class weights. `NoHead` has none, for training with a metric loss alone.
"""

import dataclasses

import tensorflow as tf

from facedist.models.heads.margins import Margin, MarginInput, Softmax


@dataclasses.dataclass(frozen=True)
class HeadInput:
  """A replica's batch, from which a head computes losses and metrics.

  Attributes:
    embeddings: float[batch, embedding]; all replicas have the same batch size.
    labels: int32[batch].
    step: int64[], number of finished training steps; none outside of training, where
      the running statistics do not change.
    positives: int32[n], labels that a sample of identities has to contain, where this
      batch is part of a larger one; `labels` if none.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  step: tf.Tensor | None = None
  positives: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class HeadOutput:
  """A head's losses and metrics of one replica's batch.

  Probabilities are softmax(scale · cosines), without margin. At most one identity has a
  probability above 0.5, so precision and recall need no one-hot vectors.

  Attributes:
    losses: float32[batch], cross-entropies in nats plus the head's penalty.
    target: float32[batch], cosines with the own identity.
    is_correct: bool[batch], whether no cosine is above that with the own identity, nor
      equal to it for an earlier one.
    is_true_positive: bool[batch], whether the own identity's probability is above 0.5.
    is_false_positive: bool[batch], whether that of another identity is.
    running_statistics: float32[n], the head's running statistics after this batch.
  """

  losses: tf.Tensor
  target: tf.Tensor
  is_correct: tf.Tensor
  is_true_positive: tf.Tensor
  is_false_positive: tf.Tensor
  running_statistics: tf.Tensor


class Head(tf.Module):
  """A margin, the scale of the logits, and the margin's running statistics.

  Running statistics are a float32[n] vector that is the same on every replica. A head
  without them has no variable for them.
  """

  def __init__(self, *, margin: Margin | None = None, scale: float = 64.0) -> None:
    """Makes the running statistics.

    Args:
      margin: None for plain softmax.
      scale: Inverse softmax temperature.
    """
    super().__init__(name="head")
    self.margin = margin or Softmax()
    self.scale = scale
    # Checkpoints hold the variable under this attribute's name, so it keeps the name.
    self.memory: tf.Variable | None = None
    if self.margin.initial_statistics:
      self.memory = tf.Variable(
        self.margin.initial_statistics,
        name="memory",
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )

  def forward(self, inputs: HeadInput) -> HeadOutput:
    """Computes losses and metrics of a replica's batch; call in replica context."""
    raise NotImplementedError

  @property
  def running_statistics(self) -> tf.Variable | None:
    """The variable of the running statistics; none for a head without them."""
    return self.memory

  @property
  def mirrored_class_weights(self) -> list[tf.Variable]:
    """The class weights, where every replica holds all of them."""
    return []

  def own_class_weights(self) -> list[tf.Variable]:
    """Returns the class weights that only this replica holds; in replica context."""
    return []

  def read_statistics(self) -> tf.Tensor:
    """Returns the running statistics, float32[n]."""
    statistics = self.running_statistics
    return tf.zeros([0]) if statistics is None else statistics.read_value()

  def assign_statistics(self, statistics: tf.Tensor) -> None:
    """Sets the running statistics; call in cross-replica context after each step."""
    if self.running_statistics is not None:
      self.running_statistics.assign(statistics)

  def with_next_statistics(self, inputs: MarginInput, sums: tf.Tensor) -> MarginInput:
    """Returns `inputs` with the running statistics after a global batch.

    They stay as they are if they would not be finite.

    Args:
      inputs: With the running statistics before the batch.
      sums: Those of `Margin.batch_sums`, over the global batch.
    """
    before = inputs.running_statistics
    after = self.margin.next_statistics(before, sums)
    is_finite = tf.reduce_all(tf.math.is_finite(after))
    return dataclasses.replace(
      inputs, running_statistics=tf.where(is_finite, after, before)
    )

  def target_logits(self, inputs: MarginInput) -> tf.Tensor:
    """Returns float32[batch], with margin and scale."""
    return self.scale * self.margin.target_cosines(inputs)

  def logits(self, inputs: MarginInput) -> tf.Tensor:
    """Returns float32[batch, identities], with margin and scale."""
    margined = self.margin.target_cosines(inputs)
    others = self.margin.other_cosines(inputs, margined)
    return self.scale * tf.where(inputs.is_target, margined[:, None], others)

  def add_penalty(self, losses: tf.Tensor, inputs: MarginInput) -> tf.Tensor:
    """Adds the margin's penalty, if it has one, to float32[batch] losses."""
    penalty = self.margin.penalty(inputs)
    return losses if penalty is None else losses + penalty


class NoHead(Head):
  """A head without class weights: its losses are 0 and its metrics NaN."""

  def forward(self, inputs: HeadInput) -> HeadOutput:
    """Returns losses of 0; every metric needs class weights, so it is NaN."""
    unknown = tf.fill(tf.shape(inputs.labels), float("nan"))
    return HeadOutput(
      losses=tf.zeros_like(unknown),
      target=unknown,
      is_correct=unknown,
      is_true_positive=unknown,
      is_false_positive=unknown,
      running_statistics=self.read_statistics(),
    )
