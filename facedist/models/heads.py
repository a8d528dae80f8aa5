"""Margin heads: from embeddings and class centres to losses, in float32 always.

What a head computes is in `margins` and `head_memory`, the table of all heads in
`margin_table`; here are the cosines before any margin, and the variables.
"""

import dataclasses

import tensorflow as tf

from facedist.config import lookup
from facedist.models import margins
from facedist.models.margin_table import MARGINS, Knobs, Seen
from facedist.models.row_table import CENTRES, initial_rows


def cosines(embeddings: tf.Tensor, centres: tf.Tensor) -> tf.Tensor:
  """Returns the cosine of every embedding with every identity's nearest centre.

  Args:
    embeddings: float[batch, embedding], of any length and dtype.
    centres: float32[identities, embedding], or with sub-centres
      float32[identities, K, embedding]; of any length.

  Returns:
    float32[batch, identities]; a zero vector has cosine 0 with everything, and no
    gradient, since it has no direction.
  """
  flat = tf.reshape(centres, [-1, centres.shape[-1]])
  products = tf.matmul(
    _unit(tf.cast(embeddings, centres.dtype)), _unit(flat), transpose_b=True
  )
  if centres.shape.rank == 2:
    return products
  identities, per_identity = centres.shape[:2]
  apart = tf.reshape(products, [-1, identities, per_identity])
  return margins.nearest_sub_centre(apart)


class MarginHead(tf.Module):
  """Holds the class centres and what a head remembers.

  The centres are float32[identities, embedding], or float32[identities, K, embedding]
  with K > 1 sub-centres. The memory is a float32[n] vector that is the same on every
  replica; heads that remember nothing have no such variable.
  """

  def __init__(
    self,
    *,
    num_identities: int,
    embedding_size: int,
    seed: int,
    kind: str = "softmax",
    knobs: Knobs | None = None,
    sub_centres: int = 1,
  ) -> None:
    super().__init__(name="head")
    self._margin = lookup(MARGINS, kind, "head")
    self.knobs = knobs or Knobs()
    each = (sub_centres,) if sub_centres > 1 else ()
    row_shape = (*each, embedding_size)
    initial = initial_rows(seed, 0, num_identities, row_shape=row_shape)
    self.centres = tf.Variable(initial, name=CENTRES)
    self.memory: tf.Variable | None = None
    if self._margin.memory is not None:
      self.memory = tf.Variable(
        self._margin.memory.first,
        name="memory",
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )

  @property
  def memory_size(self) -> int:
    """How many numbers the head remembers."""
    return 0 if self.memory is None else int(self.memory.shape[0])

  def see(self, embeddings: tf.Tensor, labels: tf.Tensor) -> Seen:
    """Compares float[batch, embedding] with all centres; labels are int32[batch]."""
    found = cosines(embeddings, self.centres)
    is_target = tf.one_hot(
      labels, self.centres.shape[0], on_value=True, off_value=False, dtype=tf.bool
    )
    return Seen(
      cosines=found,
      is_target=is_target,
      target=tf.reduce_sum(tf.where(is_target, found, 0), axis=-1),
      norms=_lengths(tf.cast(embeddings, found.dtype)),
      memory=tf.zeros([0]) if self.memory is None else self.memory.read_value(),
    )

  def sums(self, seen: Seen) -> tf.Tensor | None:
    """Returns one replica's part of what `next_memory` needs; none if nothing is."""
    return None if self._margin.memory is None else self._margin.memory.sums(seen)

  def next_memory(self, seen: Seen, sums: tf.Tensor) -> Seen:
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

  def logits(self, seen: Seen) -> tf.Tensor:
    """Returns float32[batch, identities], margined and scaled."""
    margined = self._margin.target(seen, self.knobs)
    others = self._margin.others(seen, margined)
    return self.knobs.scale * tf.where(seen.is_target, margined[:, None], others)

  def losses(self, seen: Seen, labels: tf.Tensor) -> tf.Tensor:
    """Returns float32[batch]: cross-entropies in nats, and the head's penalty."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.logits(seen))
    if self._margin.penalty is None:
      return losses
    return losses + self._margin.penalty(seen, self.knobs)


def _lengths(vectors: tf.Tensor) -> tf.Tensor:
  """Returns float[batch] norms; a zero vector's has a gradient of zero."""
  squares = tf.reduce_sum(vectors * vectors, axis=-1)
  return tf.sqrt(tf.maximum(squares, 1e-12))


def _unit(vectors: tf.Tensor) -> tf.Tensor:
  """Returns vectors of length 1; those shorter than 1e-6 become zero, without gradient.

  Their gradient would be a million times that of others, the largest of any batch.
  """
  is_vector = _lengths(vectors) > 1e-6
  return tf.where(is_vector[..., None], tf.math.l2_normalize(vectors, axis=-1), 0)
