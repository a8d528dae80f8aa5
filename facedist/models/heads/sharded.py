"""The sharded head, of which every replica holds the class weights of a block.

Each replica compares the embeddings of the global batch with its own identities, and
the softmax is computed from sums over replicas. TensorFlow's gradient of a sum over
replicas is a sum over replicas again. That is exact here, because every replica returns
the losses of its own samples alone, and their gradients add up.

With a sample (Partial FC, arXiv:2203.15565), a training step compares with a part of
the identities only.
"""

import dataclasses
import math

import tensorflow as tf

from facedist.models import random
from facedist.models.gather import gather_batch, this_replica
from facedist.models.heads import class_weights, replicated
from facedist.models.heads.base import Head, HeadInput, HeadOutput
from facedist.models.heads.class_weights import (
  CLASS_WEIGHTS,
  RowRange,
  RowTable,
)
from facedist.models.heads.margins import Margin, MarginInput

_MAX_UNITS = 10.0  # no logit is further from 0 than this many times the scale
_SHARPNESS = 64.0  # times _MAX_UNITS, its exponential is still a finite float64


class ShardedHead(Head):
  """Compares the global batch with the replica's own identities, or a sample of them.

  With a sample, a training step compares with the identities of the global batch and a
  fraction of all others, which every step draws anew. Metrics of training are then
  about these identities alone. Outside of training all identities are compared.
  """

  def __init__(
    self,
    table: RowTable,
    *,
    margin: Margin | None = None,
    scale: float = 64.0,
    seed: int = 0,
    sample_rate: float | None = None,
  ) -> None:
    """Makes a head over the class weights of a table.

    Args:
      table: Holds the shards of this process's replicas.
      margin: None for plain softmax.
      scale: Inverse softmax temperature.
      seed: Of the sample.
      sample_rate: Fraction of the other identities, in (0, 1]; none for all of them.
    """
    super().__init__(margin=margin, scale=scale)
    self._table = table
    self._seed = seed
    self._sample_rate = sample_rate

  def own_class_weights(self) -> list[tf.Variable]:
    """Returns the replica's block of class weights; call in replica context."""
    return [self._table.own_shard().variables[CLASS_WEIGHTS]]

  def forward(self, inputs: HeadInput) -> HeadOutput:
    """Computes losses and metrics of a replica's batch; call in replica context."""
    shard, scale = self._table.own_shard(), self.scale
    embeddings, labels = gather_batch(
      tf.cast(inputs.embeddings, tf.float32), inputs.labels
    )
    label_rows = tf.cast(labels, tf.int64) - shard.first
    rows = self._compared_rows(shard, label_rows, inputs)
    found = self._margin_input(shard, embeddings, label_rows, rows)
    if inputs.step is not None and self.running_statistics is not None:
      # `found` is of the global batch, so its sums need no all-reduce
      found = self.with_next_statistics(found, self.margin.batch_sums(found))
    logits, plain_logits = self.logits(found), tf.stop_gradient(scale * found.cosines)
    log_normaliser, plain_log_normaliser = _log_normalisers(
      [logits, plain_logits], scale=scale
    )
    losses = log_normaliser - self.target_logits(found)
    half = plain_log_normaliser - math.log(2)  # the logit whose probability is 0.5
    largest_other = _largest_other(found)
    here = [
      (largest_other > found.target) | _is_tied(found, label_rows, rows),
      scale * largest_other > half,
    ]
    counts = _sum([tf.cast(flag, tf.float32) for flag in here])
    is_wrong, is_false_positive = (count > 0 for count in counts)
    output = HeadOutput(
      losses=self.add_penalty(losses, found),
      target=found.target,
      is_correct=~is_wrong,
      is_true_positive=(scale * found.target > half) & ~is_wrong,
      is_false_positive=is_false_positive,
      running_statistics=found.running_statistics,
    )
    return _own_samples(output, tf.shape(inputs.labels)[0])

  def _compared_rows(
    self, shard: RowRange, label_rows: tf.Tensor, inputs: HeadInput
  ) -> tf.Tensor:
    """Returns int64[n], the rows of the shard to compare with, in order."""
    rows = tf.range(shard.count, dtype=tf.int64)
    if self._sample_rate is None or inputs.step is None:
      return rows
    is_chosen = is_sampled(
      rows + shard.first, seed=self._seed, step=inputs.step, rate=self._sample_rate
    )
    if inputs.positives is not None:
      count = tf.shape(inputs.positives)[0]
      _, labels = gather_batch(tf.zeros([count, 0]), inputs.positives)
      label_rows = tf.cast(labels, tf.int64) - shard.first
    is_here = (label_rows >= 0) & (label_rows < shard.count)
    needed = tf.boolean_mask(label_rows, is_here)[:, None]
    ones = tf.ones([tf.shape(needed)[0]], tf.int32)
    is_positive = tf.scatter_nd(needed, ones, tf.shape(rows, tf.int64)) > 0
    return tf.where(is_chosen | is_positive)[:, 0]

  def _margin_input(
    self,
    shard: RowRange,
    embeddings: tf.Tensor,
    label_rows: tf.Tensor,
    rows: tf.Tensor,
  ) -> MarginInput:
    """Compares float32[global batch, embedding] with the class weights of `rows`."""
    variable = shard.variables[CLASS_WEIGHTS]
    is_whole = rows.shape[0] == variable.shape[0]  # then the gradient is dense
    if is_whole:
      # An earlier sampled step read single rows, which makes whole reads copy.
      class_weights.share_reads(variable)
      weights = tf.convert_to_tensor(variable)
    else:
      weights = tf.gather(variable, rows)
    found = replicated.cosines(embeddings, weights)
    is_target = label_rows[:, None] == rows
    own = tf.reduce_sum(tf.where(is_target, found, 0), axis=-1)
    return MarginInput(
      cosines=found,
      is_target=is_target,
      target=_sum([own])[0],
      norms=replicated.norms(embeddings),
      running_statistics=self.read_statistics(),
    )


def is_sampled(
  identities: tf.Tensor, *, seed: int, step: tf.Tensor, rate: float
) -> tf.Tensor:
  """Draws each identity with probability `rate`, by a hash of seed, step and identity.

  So the result for an identity does not depend on the other identities or the replica.

  Args:
    identities: int64[n].
    seed: The run's.
    step: int64[], number of finished steps.
    rate: Fraction of identities, in [0, 1].

  Returns:
    bool[n].
  """
  return random.is_below(random.combine(seed, step, identities), rate)


def _largest_other(inputs: MarginInput) -> tf.Tensor:
  """Returns float32[batch]: the largest cosine with another identity; -inf if none."""
  others = tf.where(inputs.is_target, -math.inf, inputs.cosines)
  return tf.stop_gradient(tf.reduce_max(others, axis=-1))


def _is_tied(inputs: MarginInput, label_rows: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
  """Returns bool[batch]: whether an earlier identity has the target's cosine too."""
  is_equal = inputs.cosines == inputs.target[:, None]
  return tf.reduce_any(is_equal & (rows < label_rows[:, None]), axis=-1)


def _log_normalisers(logits: list[tf.Tensor], *, scale: float) -> list[tf.Tensor]:
  """Returns the logarithms of the sums of exponentials over all identities.

  Args:
    logits: With the replica's own identities, float32[batch, n] each.
    scale: The order of magnitude of the logits.

  Returns:
    float32[batch] for each.
  """
  shifts = _global_maximum([tf.reduce_max(one, axis=-1) for one in logits], scale=scale)
  shifted = zip(logits, shifts, strict=True)
  totals = _sum(
    [tf.reduce_sum(tf.exp(one - shift[:, None]), axis=-1) for one, shift in shifted]
  )
  return [
    shift + tf.math.log(total) for shift, total in zip(shifts, totals, strict=True)
  ]


def _global_maximum(local: list[tf.Tensor], *, scale: float) -> list[tf.Tensor]:
  """Returns approximately the largest of all replicas' values, the same on each.

  TensorFlow has no maximum over replicas, and gathering would cost the batch times the
  replicas. A softmax is right with any shift that keeps its exponentials in range; the
  logarithm of a sum of powers is within scale · log(replicas) / 128 of the largest.

  Args:
    local: Values, float32[batch] each.
    scale: Their order of magnitude.

  Returns:
    float32[batch] for each, without gradient.
  """
  powers = [
    tf.exp(_SHARPNESS * tf.clip_by_value(units, -_MAX_UNITS, _MAX_UNITS))
    for units in (tf.cast(tf.stop_gradient(one), tf.float64) / scale for one in local)
  ]
  middle = math.sqrt(tf.distribute.get_replica_context().num_replicas_in_sync)
  return [
    tf.cast(scale / _SHARPNESS * tf.math.log(total / middle), tf.float32)
    for total in _sum(powers)
  ]


def _own_samples(output: HeadOutput, batch: tf.Tensor) -> HeadOutput:
  """Returns the replica's own samples of an output of the global batch."""
  start = this_replica() * batch
  own = {
    field.name: getattr(output, field.name)[start : start + batch]
    for field in dataclasses.fields(output)
  }
  return HeadOutput(**own | {"running_statistics": output.running_statistics})


def _sum(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
  """Sums tensors of one shape over all replicas, in one collective."""
  context = tf.distribute.get_replica_context()
  return tf.unstack(
    context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(tensors)), num=len(tensors)
  )
