"""The inner loop: many training steps inside one graph.

The plain values a training step depends on.

A step's batch as the replicas get it: how long it was waited for.

The gradient of one replica's batch, at once or in micro-batches.

Where a sample's loss depends on nothing but the sample, the gradients of micro-batches
are added up. Where it depends on others of the batch (triplets, heads that remember),
all embeddings come first, without what their gradient would need; the loss of the whole
batch gives the gradient of each, and a second pass takes it back through the network
(gradient caching, arXiv:2101.06983, section 3.2). Either way the result is that of the
whole batch, to rounding; batch norm alone sees one micro-batch at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import tensorflow as tf

from facedist import config, errors
from facedist.data import augment
from facedist.distributed.collectives import Gradient, over_replicas
from facedist.models.heads.base import HeadOutput
from facedist.training import metric_losses, metrics, optimizers, schedules, step_health
from facedist.training.config import NO_LOSS, TrainConfig, resolve
from facedist.training.step_health import StepHealth
from facedist.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """Named as the flags they come from."""

  global_batch: int
  weight_decay: float
  clip_norm: float
  augment_flip: bool
  augment_crop: float
  augment_color: float
  deterministic: bool
  optimizer: str = "sgd"
  ema_decay: float = 0.0
  metric_loss: str = NO_LOSS
  metric_weight: float = 1.0
  metric_margin: float = 0.2
  accumulate_steps: int = 1


def settings_of(run: TrainConfig) -> StepSettings:
  """Takes what a step depends on from a run's configuration."""
  return config.subset(StepSettings, resolve(run))


class Batching(Protocol):
  """How many images a step takes, and in how many pieces; named as the flags."""

  @property
  def global_batch(self) -> int:
    """Images a step, over all replicas."""

  @property
  def accumulate_steps(self) -> int:
    """Micro-batches that a replica's part comes in."""


def micro_batch(settings: Batching, num_replicas: int) -> int:
  """Returns how many images a replica computes with at once.

  Raises:
    errors.UsageError: A replica's batch does not divide into micro-batches.
  """
  share, wanted = settings.global_batch // num_replicas, settings.accumulate_steps
  if share % wanted:
    fitting = max(count for count in range(1, wanted) if share % count == 0)
    raise errors.UsageError(
      f"--accumulate_steps={wanted} does not divide a replica's batch of {share} "
      f"(--global_batch={settings.global_batch} over {num_replicas} replicas); try "
      f"--accumulate_steps={fitting}."
    )
  return share // wanted


Batch: TypeAlias = Mapping[str, tf.Tensor]


def timed_next(
  iterator: Any, strategy: tf.distribute.Strategy, *, deterministic: bool
) -> tuple[Batch, tf.Tensor]:
  """Returns the next batch and float32[] seconds that the host waited for it.

  The time is not a number in deterministic runs, where TensorFlow refuses a clock.
  """
  if deterministic:
    return next(iterator), tf.constant(float("nan"))
  started = tf.timestamp()
  with tf.control_dependencies([started]):
    batch = next(iterator)
  arrived = strategy.experimental_local_results(batch["label"])
  with tf.control_dependencies(list(arrived)):
    ended = tf.timestamp()
  has_gpus = bool(tf.config.list_logical_devices("GPU"))
  if isinstance(batch["label"], tf.Tensor) and not has_gpus:
    # else a CPU's lone thread may look at the clock after the whole step
    with tf.control_dependencies([ended]):
      batch = {name: tf.identity(part) for name, part in batch.items()}
  return batch, tf.cast(ended - started, tf.float32)


@dataclasses.dataclass(frozen=True)
class MicroBatchResult:
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


def trained_variables(state: TrainState, phase: schedules.Phase) -> list[tf.Variable]:
  """Returns what the phase trains: the head group, then the backbone if it thaws."""
  if not phase.trains_backbone:
    return state.head_variables
  return [*state.head_variables, *state.backbone_variables]


def compute_gradients(
  state: TrainState, phase: schedules.Phase, settings: StepSettings, batch: Batch
) -> MicroBatchResult:
  """Computes a replica's part of a step; called in replica context."""
  if settings.accumulate_steps == 1:
    return _at_once(state, phase, settings, batch)
  if state.head.memory is not None or settings.metric_loss != NO_LOSS:
    return _in_two_passes(state, phase, settings, batch)
  return _added_up(state, phase, settings, batch)


def _at_once(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  batch: Batch,
  *,
  positives: tf.Tensor | None = None,
) -> MicroBatchResult:
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
  state: TrainState, phase: schedules.Phase, settings: StepSettings, batch: Batch
) -> MicroBatchResult:
  """Goes forward and back with one micro-batch after another."""
  total: list[Gradient] = []
  pieces = []
  for micro in _in_turn(batch, settings.accumulate_steps, after=total):
    part = _at_once(state, phase, settings, micro, positives=batch["label"])
    total[:] = _sum(total, part.gradients) if total else part.gradients
    pieces.append(part)
  return MicroBatchResult(
    gradients=total,
    losses=tf.concat([part.losses for part in pieces], axis=0),
    sums=tf.add_n([part.sums for part in pieces]),
    memory=pieces[-1].memory,
  )


def _in_two_passes(
  state: TrainState, phase: schedules.Phase, settings: StepSettings, batch: Batch
) -> MicroBatchResult:
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


def _variables(state: TrainState, phase: schedules.Phase) -> list[tf.Variable]:
  """Returns what a gradient is taken by."""
  return [*trained_variables(state, phase), *state.head.own_centres()]


def _embed(
  state: TrainState, phase: schedules.Phase, settings: StepSettings, batch: Batch
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
) -> tuple[tf.Tensor, HeadOutput, tf.Tensor | None]:
  """Returns float32[], the share of the mean loss, scaled; the verdict; metric loss."""
  verdict = state.head.judge(
    embeddings, labels, step=state.step.read_value(), positives=positives
  )
  verdict, metric_loss = metric_losses.add_metric_loss(
    verdict, embeddings, labels, settings=settings
  )
  loss = tf.reduce_sum(verdict.losses) / settings.global_batch
  return loss * state.loss_scale.scale, verdict, metric_loss


def _part(
  gradients: list[Gradient],
  verdict: HeadOutput,
  batch: Batch,
  metric_loss: tf.Tensor | None,
) -> MicroBatchResult:
  """Measures a batch."""
  sums = metrics.sums(
    verdict,
    weights=tf.ones_like(verdict.losses),
    damaged=batch["damaged"],
    metric_loss=metric_loss,
  )
  return MicroBatchResult(gradients, verdict.losses, sums, verdict.memory)


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


COLUMNS = (
  *metrics.SUMS,
  "gradient_norm",
  "rate",
  "loss_scale",
  "next_loss_scale",
  "input_wait",
)
"""What `train_loop` returns of each step: sums, then values; waiting in seconds."""


def train_loop(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  pulse: StepHealth,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles the loop of one phase.

  Returns:
    A function of (distributed iterator, int32[] steps) that runs that many steps, or
    fewer when a worker is asked to stop or something is not finite, and returns
    float32[steps, len(COLUMNS)] and the vitals, float32[steps, 1 + replicas], both
    summed over all replicas.
  """
  num_vitals = 1 + strategy.num_replicas_in_sync
  micro_batch(settings, strategy.num_replicas_in_sync)

  @tf.function
  def loop(iterator: Any, num_steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    rows = tf.TensorArray(tf.float32, size=num_steps, element_shape=(len(COLUMNS),))
    signs = tf.TensorArray(tf.float32, size=num_steps, element_shape=(num_vitals,))
    # A step behind: to heed the last one's signs, the host would wait for its end.
    done, before, last = tf.constant(0), tf.zeros(num_vitals), tf.zeros(num_vitals)
    while done < num_steps and step_health.continues(before):
      before = last
      row, last = _step(iterator, state, phase, settings, strategy, pulse)
      rows, signs = rows.write(done, row), signs.write(done, last)
      done += 1
    return rows.stack()[:done], signs.stack()[:done]

  return loop


# AutoGraph has the loop to convert; all below it would take longer than the tracing.
@tf.autograph.experimental.do_not_convert
def _step(
  iterator: Any,
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  pulse: StepHealth,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Takes one step; returns a row of `COLUMNS` and the vitals, see `train_loop`."""
  batch, wait = timed_next(iterator, strategy, deterministic=settings.deterministic)
  rate = _set_rates(state, phase)
  gradients, values = strategy.run(
    _replica_gradients, args=(state, phase, settings, batch, pulse)
  )
  local = strategy.experimental_local_results(values)
  num_vitals = 1 + strategy.num_replicas_in_sync
  sizes = [len(metrics.SUMS), num_vitals, 1, state.head.memory_size]
  sums, signs, norm, memory = tf.split(local[0], sizes)
  scales = _apply(state, phase, settings, strategy, gradients, gradient_norm=norm[0])
  state.head.remember(memory)
  _end_step(state, settings, strategy)
  return tf.concat([sums, norm, [rate, *scales, wait]], axis=0), signs


def _set_rates(state: TrainState, phase: schedules.Phase) -> tf.Tensor:
  """Gives both optimizers the rate of this step; returns the head's, float32[]."""
  factor = schedules.rate_factor(phase, state.step)
  optimizers.set_rate(state.backbone_optimizer, phase.backbone_rate * factor)
  optimizers.set_rate(state.head_optimizer, phase.rate * factor)
  return phase.rate * factor


def _end_step(
  state: TrainState, settings: StepSettings, strategy: tf.distribute.Strategy
) -> None:
  """Moves what follows from the new weights, and counts the step."""
  if state.average is not None:
    state.average.follow(
      state.network, strategy, step=state.step, decay=settings.ema_decay
    )
  state.step.assign_add(1)


def _replica_gradients(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  batch: Batch,
  pulse: StepHealth,
) -> tuple[list[Gradient], tf.Tensor]:
  """One replica's share of a step, summed over all replicas.

  Returns:
    The unscaled gradient of the global batch's mean loss by each trained variable, and
    by the class centres that this replica alone holds; and float32[n]: the metrics, the
    vitals, the gradient's global norm and what the head remembers.
  """
  part = compute_gradients(state, phase, settings, batch)
  gradients = [state.loss_scale.unscaled(gradient) for gradient in part.gradients]
  norm = tf.linalg.global_norm(gradients)
  signs = step_health.local_flags(
    pulse,
    gradient_norm=norm,
    losses=part.losses,
    may_overflow=state.loss_scale.mends_overflow(),
  )
  gradients, sums = over_replicas(
    gradients,
    tf.concat([part.sums, signs], axis=0),
    norm=norm,
    num_head=len(state.head_variables),
    num_own=len(state.head.own_centres()),
  )
  return gradients, tf.concat([sums, part.memory], axis=0)


def _apply(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  gradients: list[Any],
  *,
  gradient_norm: tf.Tensor,
) -> list[tf.Tensor]:
  """Updates the variables; with loss scaling, a step that overflowed is skipped.

  Returns:
    The loss scale of this step and that of the next.
  """

  def update() -> None:
    strategy.run(
      _replica_update, args=(state, phase, settings, gradients, gradient_norm)
    )

  scale = tf.identity(state.loss_scale.scale)
  if not state.loss_scale.is_dynamic:
    update()
    return [scale, scale]
  is_finite = tf.math.is_finite(gradient_norm)
  tf.cond(is_finite, update, lambda: None)
  state.loss_scale.update(is_finite)
  return [scale, state.loss_scale.scale.read_value()]


def _replica_update(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  gradients: list[Gradient],
  norm: tf.Tensor,
) -> None:
  """Clips, adds weight decay and updates; the same on every replica."""
  if settings.clip_norm:
    gradients, _ = tf.clip_by_global_norm(gradients, settings.clip_norm, use_norm=norm)
  variables = trained_variables(state, phase)
  shared, own = gradients[: len(variables)], gradients[len(variables) :]
  decayed = optimizers.with_l2(
    shared,
    variables,
    optimizer=settings.optimizer,
    weight_decay=settings.weight_decay,
  )
  if own:
    # before the optimizer counts this update
    state.update_own_rows(own[0])
  pairs = list(zip(decayed, variables, strict=True))
  split = len(state.head_variables)
  optimizers.apply(state.head_optimizer, pairs[:split])
  if phase.trains_backbone:
    optimizers.apply(state.backbone_optimizer, pairs[split:])
