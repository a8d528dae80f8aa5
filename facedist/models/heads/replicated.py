"""Margin heads: from embeddings and class centres to losses, in float32 always.

What a head computes is in `margins` and `head_memory`, the table of all heads in
`margin_table`; here are the cosines before any margin, and the head of which every
replica holds all class centres. `sharded_head` has the other one.
"""

from collections.abc import Callable

import tensorflow as tf

from facedist.models.heads import class_weights, margins
from facedist.models.heads.base import Head, HeadOutput
from facedist.models.heads.margins import HeadInput, Knobs


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
  units = unit(tf.cast(embeddings, centres.dtype))
  # centres of length 1 would be a copy of all of them
  products = _products(units, flat) * _inverse_lengths(flat)
  if centres.shape.rank == 2:
    return products
  apart = tf.reshape(products, [tf.shape(products)[0], -1, centres.shape[1]])
  return margins.nearest_sub_centre(apart)


class MarginHead(Head):
  """The replicated head: every replica holds all class centres.

  They are float32[identities, embedding], or float32[identities, K, embedding] with
  K > 1 sub-centres.
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
    super().__init__(kind=kind, knobs=knobs)
    row_shape = class_weights.row_shape(embedding_size, sub_centres)
    initial = class_weights.initial_rows(seed, 0, num_identities, row_shape=row_shape)
    self.centres = tf.Variable(initial, name=class_weights.CENTRES)

  @property
  def mirrored_centres(self) -> list[tf.Variable]:
    """The class centres, which all replicas update alike."""
    return [self.centres]

  def judge(
    self,
    embeddings: tf.Tensor,
    labels: tf.Tensor,
    *,
    step: tf.Tensor | None = None,
    positives: tf.Tensor | None = None,
  ) -> HeadOutput:
    """Says how good a replica's embeddings are; see `Head.judge`."""
    seen = self.see(embeddings, labels)
    sums = None if step is None else self.sums(seen)
    if sums is not None:
      context = tf.distribute.get_replica_context()
      seen = self.next_memory(seen, context.all_reduce("SUM", sums))
    return head_output(
      seen, labels, losses=self.losses(seen, labels), scale=self.knobs.scale
    )

  def see(self, embeddings: tf.Tensor, labels: tf.Tensor) -> HeadInput:
    """Compares float[batch, embedding] with all centres; labels are int32[batch]."""
    found = cosines(embeddings, self.centres)
    is_target = tf.one_hot(
      labels, self.centres.shape[0], on_value=True, off_value=False, dtype=tf.bool
    )
    return HeadInput(
      cosines=found,
      is_target=is_target,
      target=tf.reduce_sum(tf.where(is_target, found, 0), axis=-1),
      norms=lengths(tf.cast(embeddings, found.dtype)),
      memory=self.current_memory(),
    )

  def losses(self, seen: HeadInput, labels: tf.Tensor) -> tf.Tensor:
    """Returns float32[batch]: cross-entropies in nats, and the head's penalty."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.logits(seen))
    return self.penalised(losses, seen)


def head_output(
  seen: HeadInput, labels: tf.Tensor, *, losses: tf.Tensor, scale: float
) -> HeadOutput:
  """Judges cosines with all identities, float32[batch, identities]."""
  largest = tf.reduce_max(seen.cosines, axis=-1)
  found = tf.argmax(seen.cosines, axis=-1, output_type=labels.dtype)
  log_normaliser = tf.reduce_logsumexp(scale * seen.cosines, axis=-1)
  is_positive = tf.exp(scale * largest - log_normaliser) > 0.5
  is_correct = tf.equal(found, labels)
  return HeadOutput(
    losses=losses,
    target=seen.target,
    is_correct=is_correct,
    is_true_positive=is_positive & is_correct,
    is_false_positive=is_positive & ~is_correct,
    memory=seen.memory,
  )


def lengths(vectors: tf.Tensor) -> tf.Tensor:
  """Returns float[batch] norms; a zero vector's has a gradient of zero."""
  squares = tf.reduce_sum(vectors * vectors, axis=-1)
  return tf.sqrt(tf.maximum(squares, 1e-12))


def _products(units: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
  """Multiplies float[batch, size] and float[n, size] to float[batch, n].

  A CPU first rearranges the right factor, which for few embeddings takes longer than
  the product, so the many rows stand on the left. A GPU's library reads either factor
  as it lies; turning the product would be one more pass over it, and one back.
  """
  if tf.config.list_logical_devices("GPU"):
    return tf.matmul(units, rows, transpose_b=True)
  return tf.transpose(tf.matmul(rows, units, transpose_b=True))


@tf.custom_gradient
def _inverse_lengths(vectors: tf.Tensor) -> tuple[tf.Tensor, Callable]:
  """Returns float[n], 1 over the lengths of float[n, size]; 0 where below 1e-6."""
  # a sum of squares would first be all squares, as large as the vectors
  norms = tf.math.reduce_euclidean_norm(vectors, axis=-1)
  inverses = tf.where(norms > 1e-6, 1 / norms, 0)

  def gradient(upstream: tf.Tensor) -> tf.Tensor:
    return (-upstream * inverses**3)[:, None] * vectors

  return inverses, gradient


def unit(vectors: tf.Tensor) -> tf.Tensor:
  """Returns vectors of length 1; those shorter than 1e-6 become zero, without gradient.

  Their gradient would be a million times that of others, the largest of any batch.
  """
  is_vector = lengths(vectors) > 1e-6
  return tf.where(is_vector[..., None], tf.math.l2_normalize(vectors, axis=-1), 0)
