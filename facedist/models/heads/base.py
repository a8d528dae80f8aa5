"""No head: no class centres, for embeddings that a metric loss alone trains.

What all heads share, wherever their class centres are.
"""

import dataclasses

import tensorflow as tf

from facedist.config import lookup
from facedist.models.heads.margins import MARGINS, HeadInput, Knobs


@dataclasses.dataclass(frozen=True)
class HeadOutput:
  """What a head says of one replica's batch.

  Probabilities are those of softmax(scale · cosines), without margin. At most one
  identity has more than half, so nobody needs a one-hot of identities.

  Attributes:
    losses: float32[batch], cross-entropies in nats and the head's penalty.
    target: float32[batch], cosines with the own identity.
    is_correct: bool[batch], whether no cosine is above that with the own identity, nor
      equal to it for an earlier one.
    is_true_positive: bool[batch], whether the own identity has more than half.
    is_false_positive: bool[batch], whether another one has.
    memory: float32[n], what the head is to remember.
  """

  losses: tf.Tensor
  target: tf.Tensor
  is_correct: tf.Tensor
  is_true_positive: tf.Tensor
  is_false_positive: tf.Tensor
  memory: tf.Tensor


class Head(tf.Module):
  """A head's equations, its numbers and what it remembers.

  The memory is a float32[n] vector that is the same on every replica; heads that
  remember nothing have no such variable.
  """

  def __init__(self, *, kind: str = "softmax", knobs: Knobs | None = None) -> None:
    super().__init__(name="head")
    self._margin = lookup(MARGINS, kind, "head")
    self.knobs = knobs or Knobs()
    self.memory: tf.Variable | None = None
    if self._margin.memory is not None:
      self.memory = tf.Variable(
        self._margin.memory.first,
        name="memory",
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )

  def judge(
    self,
    embeddings: tf.Tensor,
    labels: tf.Tensor,
    *,
    step: tf.Tensor | None = None,
    positives: tf.Tensor | None = None,
  ) -> HeadOutput:
    """Says how good a replica's embeddings are; called in replica context.

    Args:
      embeddings: float[batch, embedding]; all replicas' batches are of one size.
      labels: int32[batch].
      step: int64[], number of finished training steps; none outside of training, where
        the memory stays as it is.
      positives: int32[n], labels that a sample of identities has to hold, where these
        are part of a larger batch; `labels` if none.
    """
    raise NotImplementedError

  @property
  def mirrored_centres(self) -> list[tf.Variable]:
    """The class centres, where every replica holds them all."""
    return []

  def own_centres(self) -> list[tf.Variable]:
    """The class centres that only this replica holds; called in replica context."""
    return []

  @property
  def memory_size(self) -> int:
    """How many numbers the head remembers."""
    return 0 if self.memory is None else int(self.memory.shape[0])

  def current_memory(self) -> tf.Tensor:
    """Returns float32[memory_size]."""
    return tf.zeros([0]) if self.memory is None else self.memory.read_value()

  def sums(self, seen: HeadInput) -> tf.Tensor | None:
    """Returns a batch's part of what `next_memory` needs; none if nothing is."""
    return None if self._margin.memory is None else self._margin.memory.sums(seen)

  def next_memory(self, seen: HeadInput, sums: tf.Tensor) -> HeadInput:
    """Returns `seen` with the memory after a global batch; not finite, it stays."""
    if self._margin.memory is None:
      return seen
    after = self._margin.memory.following(
      seen.memory, sums, momentum=self.knobs.momentum
    )
    is_finite = tf.reduce_all(tf.math.is_finite(after))
    return dataclasses.replace(seen, memory=tf.where(is_finite, after, seen.memory))

  def remember(self, memory: tf.Tensor) -> None:
    """Keeps float32[memory_size]; called in cross-replica context after each step."""
    if self.memory is not None:
      self.memory.assign(memory)

  def target_logits(self, seen: HeadInput) -> tf.Tensor:
    """Returns float32[batch], of the own identities, margined and scaled."""
    return self.knobs.scale * self._margin.target(seen, self.knobs)

  def logits(self, seen: HeadInput) -> tf.Tensor:
    """Returns float32[batch, identities], margined and scaled."""
    margined = self._margin.target(seen, self.knobs)
    others = self._margin.others(seen, margined)
    return self.knobs.scale * tf.where(seen.is_target, margined[:, None], others)

  def penalised(self, losses: tf.Tensor, seen: HeadInput) -> tf.Tensor:
    """Adds the head's penalty, if it has one, to float32[batch] losses."""
    if self._margin.penalty is None:
      return losses
    return losses + self._margin.penalty(seen, self.knobs)


class NoHead(Head):
  """Has no loss of its own and measures nothing."""

  def judge(
    self,
    embeddings: tf.Tensor,
    labels: tf.Tensor,
    *,
    step: tf.Tensor | None = None,
    positives: tf.Tensor | None = None,
  ) -> HeadOutput:
    """Returns losses of 0; what only class centres can tell is not a number."""
    unknown = tf.fill(tf.shape(labels), float("nan"))
    return HeadOutput(
      losses=tf.zeros_like(unknown),
      target=unknown,
      is_correct=unknown,
      is_true_positive=unknown,
      is_false_positive=unknown,
      memory=self.current_memory(),
    )
