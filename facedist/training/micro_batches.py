"""The gradient of one replica's batch, at once or in micro-batches.

Where a sample's loss depends on nothing but the sample, the gradients of micro-batches
are added up. Where it depends on others of the batch (triplets, heads that remember),
all embeddings come first, without what their gradient would need; the loss of the whole
batch gives the gradient of each, and a second pass takes it back through the network
(gradient caching, arXiv:2101.06983, section 3.2). Either way the result is that of the
whole batch, to rounding; batch norm alone sees one micro-batch at a time.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import tensorflow as tf

from facedist.data import augment
from facedist.models.head import Verdict
from facedist.training import metric_learning, metrics, phases
from facedist.training.batches import Batch
from facedist.training.gradients import Gradient
from facedist.training.metric_settings import NO_LOSS
from facedist.training.state import TrainState
from facedist.training.step_settings import StepSettings


@dataclasses.dataclass(frozen=True)
class Part:
  """What a replica's batch comes to.

  Attributes:
    gradients: Of the replica's share of the global batch's mean loss, times the loss
      scale: by each trained variable, then by the class centres that it alone holds.
    losses: float32[batch].
    sums: float32[len(metrics.SUMS)].
    memory: float32[n], what the head is to remember.
  """

  gradients: list[Gradient]
  losses: tf.Tensor
  sums: tf.Tensor
  memory: tf.Tensor


def trained_variables(state: TrainState, phase: phases.Phase) -> list[tf.Variable]:
  """Returns what the phase trains: the head group, then the backbone if it thaws."""
  if not phase.trains_backbone:
    return state.head_variables
  return [*state.head_variables, *state.backbone_variables]


def compute(
  state: TrainState, phase: phases.Phase, settings: StepSettings, batch: Batch
) -> Part:
  """Computes a replica's part of a step; called in replica context."""
  if settings.accumulate_steps == 1:
    return _at_once(state, phase, settings, batch)
  if state.head.memory is not None or settings.metric_loss != NO_LOSS:
    return _in_two_passes(state, phase, settings, batch)
  return _added_up(state, phase, settings, batch)


def _at_once(
  state: TrainState,
  phase: phases.Phase,
  settings: StepSettings,
  batch: Batch,
  *,
  positives: tf.Tensor | None = None,
) -> Part:
  """Goes forward and back; `positives` are the labels of all of the step's samples."""
  variables = _variables(state, phase)
  # only trained variables are watched: a frozen backbone records nothing to go back
  with tf.GradientTape(watch_accessed_variables=False) as tape:
    tape.watch(variables)
    embeddings = _embed(state, phase, settings, batch)
    scaled_loss, verdict, metric_loss = _judge(
      state, settings, embeddings, batch["label"], positives=positives
    )
  gradients = tape.gradient(scaled_loss, variables)
  return _part(gradients, verdict, batch, metric_loss)


def _added_up(
  state: TrainState, phase: phases.Phase, settings: StepSettings, batch: Batch
) -> Part:
  """Goes forward and back with one micro-batch after another."""
  total: list[Gradient] = []
  pieces = []
  for micro in _in_turn(batch, settings.accumulate_steps, after=total):
    part = _at_once(state, phase, settings, micro, positives=batch["label"])
    total[:] = _sum(total, part.gradients) if total else part.gradients
    pieces.append(part)
  return Part(
    gradients=total,
    losses=tf.concat([part.losses for part in pieces], axis=0),
    sums=tf.add_n([part.sums for part in pieces]),
    memory=pieces[-1].memory,
  )


def _in_two_passes(
  state: TrainState, phase: phases.Phase, settings: StepSettings, batch: Batch
) -> Part:
  """Embeds all micro-batches, judges them together, then goes back through each."""
  variables, count = _variables(state, phase), settings.accumulate_steps
  # the first pass must not move batch norm's averages: the second one will
  averages = state.network.non_trainable_variables
  before = [tf.identity(average) for average in averages]
  parts: list[tf.Tensor] = []
  for micro in _in_turn(batch, count, after=parts):
    parts.append(_embed(state, phase, settings, micro))
  for average, value in zip(averages, before, strict=True):
    average.assign(value)
  embeddings = tf.concat(parts, axis=0)
  with tf.GradientTape(watch_accessed_variables=False) as tape:
    tape.watch([embeddings, *variables])
    scaled_loss, verdict, metric_loss = _judge(
      state, settings, embeddings, batch["label"]
    )
  upstream, *total = tape.gradient(scaled_loss, [embeddings, *variables])
  back = {**batch, "upstream": upstream}
  for micro in _in_turn(back, count, after=total):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(variables)
      embedded = _embed(state, phase, settings, micro)
    total[:] = _sum(total, tape.gradient(embedded, variables, micro["upstream"]))
  return _part(total, verdict, batch, metric_loss)


def _variables(state: TrainState, phase: phases.Phase) -> list[tf.Variable]:
  """Returns what a gradient is taken by."""
  return [*trained_variables(state, phase), *state.head.own_centres()]


def _embed(
  state: TrainState, phase: phases.Phase, settings: StepSettings, batch: Batch
) -> tf.Tensor:
  """Returns embeddings of the augmented images, float32[batch, embedding]."""
  images = augment.augment(
    batch["image"],
    batch["draws"],
    flip=settings.augment_flip,
    crop=settings.augment_crop,
    color=settings.augment_color,
  )
  return state.network.embed(
    images,
    training=True,
    training_backbone=phase.trains_backbone,
    draws=batch["draws"][:, augment.DROPOUT],
  )


def _judge(
  state: TrainState,
  settings: StepSettings,
  embeddings: tf.Tensor,
  labels: tf.Tensor,
  *,
  positives: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Verdict, tf.Tensor | None]:
  """Returns float32[], the share of the mean loss, scaled; the verdict; metric loss."""
  verdict = state.head.judge(
    embeddings, labels, step=state.step.read_value(), positives=positives
  )
  verdict, metric_loss = metric_learning.added(
    verdict, embeddings, labels, settings=settings
  )
  loss = tf.reduce_sum(verdict.losses) / settings.global_batch
  return loss * state.loss_scale.scale, verdict, metric_loss


def _part(
  gradients: list[Gradient],
  verdict: Verdict,
  batch: Batch,
  metric_loss: tf.Tensor | None,
) -> Part:
  """Measures a batch."""
  sums = metrics.sums(
    verdict,
    weights=tf.ones_like(verdict.losses),
    damaged=batch["damaged"],
    metric_loss=metric_loss,
  )
  return Part(gradients, verdict.losses, sums, verdict.memory)


def _in_turn(batch: Batch, count: int, *, after: list) -> Iterator[Batch]:
  """Yields the batch in `count` pieces of one size, to be computed one by one.

  Args:
    batch: A replica's.
    count: How many pieces.
    after: What a piece must not begin before; its caller fills it from piece to piece.
      Without that, TensorFlow would compute all pieces at once, in the memory of all.
  """
  pieces = {name: tf.split(value, count) for name, value in batch.items()}
  for place in range(count):
    before = tf.nest.flatten(after, expand_composites=True)
    with tf.control_dependencies([tensor for tensor in before if tensor is not None]):
      micro = {name: tf.identity(values[place]) for name, values in pieces.items()}
    yield micro


def _sum(
  left: Sequence[Gradient | None], right: Sequence[Gradient | None]
) -> list[Gradient]:
  """Adds up gradients by the same variables; none stands for zero.

  Sampled rows are those of the step, so they are the same in each micro-batch.
  """
  return [_added(*pair) for pair in zip(left, right, strict=True)]


def _added(left: Gradient | None, right: Gradient | None) -> Gradient:
  if left is None or right is None:
    return right if left is None else left
  if not isinstance(left, tf.IndexedSlices):
    return left + right
  values = left.values + right.values
  return tf.IndexedSlices(values, left.indices, left.dense_shape)
