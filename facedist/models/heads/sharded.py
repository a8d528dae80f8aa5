"""The sharded head: every replica holds its share of the class centres.

Each replica compares the embeddings of the global batch with its own identities, and
the softmax is put together from sums over replicas. TensorFlow's gradient of a sum over
replicas is a sum over replicas again, which is exact here: every replica takes the
losses of its own samples and no others, and their gradients add up.

Which identities a step compares with: Partial FC's sample (arXiv:2203.15565).
"""

import dataclasses
import math

import tensorflow as tf

from facedist.models import random
from facedist.models.heads import class_weights, replicated
from facedist.models.heads.base import Head, HeadOutput
from facedist.models.heads.class_weights import (
  CENTRES,
  RowRange,
  RowTable,
  this_replica,
)
from facedist.models.heads.margins import HeadInput, Knobs


def is_sampled(
  identities: tf.Tensor, *, seed: int, step: tf.Tensor, rate: float
) -> tf.Tensor:
  """Draws each identity with probability `rate`, by a hash of seed, step and identity.

  Whoever asks, about however many identities, hears the same.

  Args:
    identities: int64[n].
    seed: The run's.
    step: int64[], number of finished steps.
    rate: Share of identities, in [0, 1].

  Returns:
    bool[n].
  """
  return random.is_below(random.combine(seed, step, identities), rate)


_HALF_WORD = 1 << 16
_HIGHEST = 10.0  # no logit is further from 0 than this many times the scale
_SHARPNESS = 64.0  # times _HIGHEST, its exponential is still a float64


class ShardedHead(Head):
  """Compares the global batch with the replica's own identities, or a sample of them.

  With a sample (Partial FC, arXiv:2203.15565), a training step sees the identities of
  the global batch and a share of all others, another one in every step. Metrics of
  training are then about these alone; outside of training all identities count.
  """

  def __init__(
    self,
    table: RowTable,
    *,
    kind: str = "softmax",
    knobs: Knobs | None = None,
    seed: int = 0,
    sample_rate: float | None = None,
  ) -> None:
    """Makes a head over the centres of a table.

    Args:
      table: Holds the shards of this process's replicas.
      kind: A key of `MARGINS`.
      knobs: The head's numbers.
      seed: Of the sample.
      sample_rate: Share of the other identities, in (0, 1]; none for all of them.
    """
    super().__init__(kind=kind, knobs=knobs)
    self._table = table
    self._seed = seed
    self._sample_rate = sample_rate

  def own_centres(self) -> list[tf.Variable]:
    """The replica's block of class centres; called in replica context."""
    return [self._table.own_shard().variables[CENTRES]]

  def judge(
    self,
    embeddings: tf.Tensor,
    labels: tf.Tensor,
    *,
    step: tf.Tensor | None = None,
    positives: tf.Tensor | None = None,
  ) -> HeadOutput:
    """Says how good a replica's embeddings are; see `Head.judge`."""
    shard, scale = self._table.own_shard(), self.knobs.scale
    everyone, every_label = _gathered(tf.cast(embeddings, tf.float32), labels)
    rows_of_labels = tf.cast(every_label, tf.int64) - shard.first
    rows = self._rows(shard, rows_of_labels, step, positives)
    seen = self._see(shard, everyone, rows_of_labels, rows)
    sums = None if step is None else self.sums(seen)
    if sums is not None:  # they are of the global batch as they are
      seen = self.next_memory(seen, sums)
    logits, scaled = self.logits(seen), tf.stop_gradient(scale * seen.cosines)
    normalisers = _log_normalisers([logits, scaled], scale=scale)
    losses = normalisers[0] - self.target_logits(seen)
    half = normalisers[1] - math.log(2)
    largest_other = _largest_other(seen)
    has_rivals = [
      (largest_other > seen.target) | _is_tied(seen, rows_of_labels, rows),
      scale * largest_other > half,
    ]
    counts = _sum([tf.cast(has, tf.float32) for has in has_rivals])
    is_beaten, is_other = (count > 0 for count in counts)
    verdict = HeadOutput(
      losses=self.penalised(losses, seen),
      target=seen.target,
      is_correct=~is_beaten,
      is_true_positive=(scale * seen.target > half) & ~is_beaten,
      is_false_positive=is_other,
      memory=seen.memory,
    )
    return _own_part(verdict, tf.shape(labels)[0])

  def _rows(
    self,
    shard: RowRange,
    rows_of_labels: tf.Tensor,
    step: tf.Tensor | None,
    positives: tf.Tensor | None,
  ) -> tf.Tensor:
    """Returns int64[n], the rows of the shard that take part, in order."""
    rows = tf.range(shard.count, dtype=tf.int64)
    if self._sample_rate is None or step is None:
      return rows
    is_chosen = is_sampled(
      rows + shard.first, seed=self._seed, step=step, rate=self._sample_rate
    )
    if positives is not None:
      _, every_label = _gathered(tf.zeros([tf.shape(positives)[0], 0]), positives)
      rows_of_labels = tf.cast(every_label, tf.int64) - shard.first
    is_here = (rows_of_labels >= 0) & (rows_of_labels < shard.count)
    needed = tf.boolean_mask(rows_of_labels, is_here)[:, None]
    ones = tf.ones([tf.shape(needed)[0]], tf.int32)
    is_positive = tf.scatter_nd(needed, ones, tf.shape(rows, tf.int64)) > 0
    return tf.where(is_chosen | is_positive)[:, 0]

  def _see(
    self,
    shard: RowRange,
    everyone: tf.Tensor,
    rows_of_labels: tf.Tensor,
    rows: tf.Tensor,
  ) -> HeadInput:
    """Compares float32[global batch, embedding] with the centres of `rows`."""
    variable = shard.variables[CENTRES]
    is_whole = rows.shape[0] == variable.shape[0]  # then the gradient is dense
    if is_whole:
      class_weights.share_reads(variable)  # a sampled step before has used its rows
      centres = tf.convert_to_tensor(variable)
    else:
      centres = tf.gather(variable, rows)
    found = replicated.cosines(everyone, centres)
    is_target = rows_of_labels[:, None] == rows
    own = tf.reduce_sum(tf.where(is_target, found, 0), axis=-1)
    return HeadInput(
      cosines=found,
      is_target=is_target,
      target=_sum([own])[0],
      norms=replicated.lengths(everyone),
      memory=self.current_memory(),
    )


def _largest_other(seen: HeadInput) -> tf.Tensor:
  """Returns float32[batch]: the largest cosine with another identity; -inf if none."""
  others = tf.where(seen.is_target, -math.inf, seen.cosines)
  return tf.stop_gradient(tf.reduce_max(others, axis=-1))


def _is_tied(seen: HeadInput, rows_of_labels: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
  """Says of each sample whether an earlier identity has just the target's cosine."""
  is_equal = seen.cosines == seen.target[:, None]
  return tf.reduce_any(is_equal & (rows < rows_of_labels[:, None]), axis=-1)


def _log_normalisers(parts: list[tf.Tensor], *, scale: float) -> list[tf.Tensor]:
  """Returns the logarithms of the sums of exponentials over all identities.

  Args:
    parts: Logits with the replica's own identities, float32[batch, n] each.
    scale: What the logits are about as large as.

  Returns:
    float32[batch] for each.
  """
  shifts = _shared_maximum(
    [tf.reduce_max(part, axis=-1) for part in parts], scale=scale
  )
  shifted = zip(parts, shifts, strict=True)
  totals = _sum(
    [tf.reduce_sum(tf.exp(part - shift[:, None]), axis=-1) for part, shift in shifted]
  )
  return [
    shift + tf.math.log(total) for shift, total in zip(shifts, totals, strict=True)
  ]


def _shared_maximum(local: list[tf.Tensor], *, scale: float) -> list[tf.Tensor]:
  """Returns about the largest of each replica's values, on all of them the same.

  TensorFlow has no maximum over replicas, and gathering would cost the batch times the
  replicas. A softmax is right with any shift that keeps its exponentials in range; the
  logarithm of a sum of powers is within scale · log(replicas) / 128 of the largest.

  Args:
    local: Values, float32[batch] each.
    scale: What they are about as large as.

  Returns:
    float32[batch] for each, without gradient.
  """
  powers = [
    tf.exp(_SHARPNESS * tf.clip_by_value(units, -_HIGHEST, _HIGHEST))
    for units in (tf.cast(tf.stop_gradient(one), tf.float64) / scale for one in local)
  ]
  middle = math.sqrt(tf.distribute.get_replica_context().num_replicas_in_sync)
  return [
    tf.cast(scale / _SHARPNESS * tf.math.log(total / middle), tf.float32)
    for total in _sum(powers)
  ]


def _gathered(embeddings: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns all replicas' embeddings and labels, in the order of their replicas.

  One sum over replicas, of zeros but for the own part: TensorFlow's own gathering falls
  back from NCCL, asks for shapes first, and has this sum as its gradient anyway. Labels
  travel as floats of 16 bits each, which hold them exactly.
  """
  halves = tf.stack([labels // _HALF_WORD, labels % _HALF_WORD], axis=-1)
  packed = tf.concat([embeddings, tf.cast(halves, tf.float32)], axis=-1)
  batch, place = tf.shape(labels)[0], this_replica()
  replicas = tf.distribute.get_replica_context().num_replicas_in_sync
  room = [[place * batch, (replicas - 1 - place) * batch], [0, 0]]
  everyone = _sum([tf.pad(packed, room)])[0]
  high, low = tf.unstack(tf.cast(everyone[:, -2:], labels.dtype), num=2, axis=-1)
  return everyone[:, :-2], high * _HALF_WORD + low


def _own_part(verdict: HeadOutput, batch: tf.Tensor) -> HeadOutput:
  """Returns what a verdict on the global batch says of the replica's own samples."""
  start = this_replica() * batch
  parts = {
    field.name: getattr(verdict, field.name)[start : start + batch]
    for field in dataclasses.fields(verdict)
  }
  return HeadOutput(**parts | {"memory": verdict.memory})


def _sum(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
  """Adds up tensors of one shape over all replicas, in one collective."""
  context = tf.distribute.get_replica_context()
  return tf.unstack(
    context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(tensors)), num=len(tensors)
  )
