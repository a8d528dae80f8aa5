"""The replicated head, of which every replica holds all class weights.

It computes in float32 whatever the precision of the embeddings.
"""

from collections.abc import Callable

import tensorflow as tf

from facedist.models import xla
from facedist.models.heads import class_weights, margins
from facedist.models.heads.base import Head, HeadInput, HeadOutput
from facedist.models.heads.margins import Margin, MarginInput


def cosines(embeddings: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
  """Returns the cosine of every embedding with every identity's class weight.

  Args:
    embeddings: float[batch, embedding], of any norm and dtype.
    weights: float32[identities, embedding], or with K sub-centres
      float32[identities, K, embedding]; of any norm.

  Returns:
    float32[batch, identities], with the nearest sub-centre of each identity; a zero
    vector has cosine 0 with everything, and no gradient, since it has no direction.
  """
  rows = tf.reshape(weights, [-1, weights.shape[-1]])
  units = unit(tf.cast(embeddings, weights.dtype))
  # Normalising the products instead of the class weights saves a copy of the latter.
  products = _products(units, rows) * _inverse_norms(rows)
  if weights.shape.rank == 2:
    return products
  by_sub_centre = tf.reshape(products, [tf.shape(products)[0], -1, weights.shape[1]])
  return margins.nearest_sub_centre(by_sub_centre)


class MarginHead(Head):
  """A margin head of which every replica holds all class weights.

  They are float32[identities, embedding], or float32[identities, K, embedding] with
  K > 1 sub-centres.
  """

  def __init__(
    self,
    *,
    num_identities: int,
    embedding_size: int,
    seed: int,
    margin: Margin | None = None,
    scale: float = 64.0,
    sub_centres: int = 1,
  ) -> None:
    super().__init__(margin=margin, scale=scale)
    row_shape = class_weights.row_shape(embedding_size, sub_centres)
    initial = class_weights.initial_rows(seed, 0, num_identities, row_shape=row_shape)
    # Checkpoints hold the variable under this attribute's name, so it keeps the name.
    self.centres = tf.Variable(initial, name=class_weights.CLASS_WEIGHTS)

  @property
  def class_weights(self) -> tf.Variable:
    """The class weights of all identities."""
    return self.centres

  @property
  def mirrored_class_weights(self) -> list[tf.Variable]:
    """The class weights, which all replicas update alike."""
    return [self.class_weights]

  def forward(self, inputs: HeadInput) -> HeadOutput:
    """Computes losses and metrics of a replica's batch; call in replica context."""
    found = self.margin_input(inputs.embeddings, inputs.labels)
    if inputs.step is not None and self.running_statistics is not None:
      context = tf.distribute.get_replica_context()
      sums = context.all_reduce("SUM", self.margin.batch_sums(found))
      found = self.with_next_statistics(found, sums)
    losses = self.losses(found, inputs.labels)
    return head_output(found, inputs.labels, losses=losses, scale=self.scale)

  def margin_input(self, embeddings: tf.Tensor, labels: tf.Tensor) -> MarginInput:
    """Compares float[batch, embedding] with all class weights; int32[batch] labels."""
    found = cosines(embeddings, self.class_weights)
    is_target = tf.one_hot(
      labels, self.class_weights.shape[0], on_value=True, off_value=False, dtype=tf.bool
    )
    return MarginInput(
      cosines=found,
      is_target=is_target,
      target=tf.reduce_sum(tf.where(is_target, found, 0), axis=-1),
      norms=norms(tf.cast(embeddings, found.dtype)),
      running_statistics=self.read_statistics(),
    )

  def losses(self, inputs: MarginInput, labels: tf.Tensor) -> tf.Tensor:
    """Returns float32[batch]: cross-entropies in nats plus the head's penalty."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.logits(inputs))
    return self.add_penalty(losses, inputs)


def head_output(
  inputs: MarginInput, labels: tf.Tensor, *, losses: tf.Tensor, scale: float
) -> HeadOutput:
  """Adds the metrics to the losses, from the cosines with all identities."""
  largest = tf.reduce_max(inputs.cosines, axis=-1)
  found = tf.argmax(inputs.cosines, axis=-1, output_type=labels.dtype)
  log_normaliser = tf.reduce_logsumexp(scale * inputs.cosines, axis=-1)
  is_positive = tf.exp(scale * largest - log_normaliser) > 0.5
  is_correct = tf.equal(found, labels)
  return HeadOutput(
    losses=losses,
    target=inputs.target,
    is_correct=is_correct,
    is_true_positive=is_positive & is_correct,
    is_false_positive=is_positive & ~is_correct,
    running_statistics=inputs.running_statistics,
  )


def norms(vectors: tf.Tensor) -> tf.Tensor:
  """Returns float[batch] L2 norms; a zero vector's norm has a gradient of zero."""
  squares = tf.reduce_sum(vectors * vectors, axis=-1)
  return tf.sqrt(tf.maximum(squares, 1e-12))


def _products(units: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
  """Multiplies float[batch, size] and float[n, size] to float[batch, n].

  A CPU first rearranges the right factor, which for few embeddings takes longer than
  the product, so the many rows are the left factor. A GPU's library reads both factors
  in place, where transposing the product would be one more pass over it, and one back.
  """
  if tf.config.list_logical_devices("GPU"):
    return tf.matmul(units, rows, transpose_b=True)
  return tf.transpose(tf.matmul(rows, units, transpose_b=True))


@tf.custom_gradient
def _inverse_norms(vectors: tf.Tensor) -> tuple[tf.Tensor, Callable]:
  """Returns float[n], 1 / norm of float[n, size] vectors; 0 for norms below 1e-6."""
  # A sum of squares would first make all squares, a tensor as large as the vectors.
  # XLA makes no such tensor, and has no kernel for the Euclidean norm.
  if xla.is_tracing():
    sizes = tf.sqrt(tf.reduce_sum(tf.square(vectors), axis=-1))
  else:
    sizes = tf.math.reduce_euclidean_norm(vectors, axis=-1)
  inverses = tf.where(sizes > 1e-6, 1 / sizes, 0)

  def gradient(upstream: tf.Tensor) -> tf.Tensor:
    return (-upstream * inverses**3)[:, None] * vectors

  return inverses, gradient


def unit(vectors: tf.Tensor) -> tf.Tensor:
  """Returns vectors of norm 1; those of a norm below 1e-6 become 0, without gradient.

  Their gradient would be a million times that of others, the largest of any batch.
  """
  is_vector = norms(vectors) > 1e-6
  return tf.where(is_vector[..., None], tf.math.l2_normalize(vectors, axis=-1), 0)
