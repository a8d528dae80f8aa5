"""One training step, and the loop that runs many of them inside one graph.

Where a sample's loss depends on the sample alone, the gradients of micro-batches are
added up. Where it depends on other samples of the batch (triplet losses, heads with
running statistics), gradient caching is used (arXiv:2101.06983, section 3.2): a first
pass computes all embeddings and keeps nothing for their gradient, the loss of the whole
batch gives the gradient by each embedding, and a second pass takes it back through the
network. Either way the result is that of the whole batch, to rounding; only batch norm
sees one micro-batch at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import tensorflow as tf

from facedist import config, errors
from facedist.data import augment
from facedist.distributed.collectives import Gradient, Gradients, sum_gradients
from facedist.models import xla
from facedist.models.heads.base import HeadInput, HeadOutput
from facedist.training import metric_losses, metrics, optimizers, schedules, step_health
from facedist.training.config import NO_LOSS, TrainConfig
from facedist.training.step_health import StepHealth
from facedist.training.train_state import TrainState

Batch: TypeAlias = Mapping[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """The hyperparameters that a step depends on, named as their flags."""

  global_batch: int
  weight_decay: float
  clip_norm: float
  augment_flip: bool
  augment_crop: float
  augment_color: float
  deterministic: bool
  augment_cutout: float = 0.0
  optimizer: str = "sgd"
  ema_decay: float = 0.0
  metric_loss: str = NO_LOSS
  metric_weight: float = 1.0
  metric_margin: float = 0.2
  accumulate_steps: int = 1
  jit_compile: str = "off"


def settings_of(run: TrainConfig) -> StepSettings:
  """Returns the hyperparameters that a step depends on."""
  return config.subset(StepSettings, run)


class Batching(Protocol):
  """The size of a step's batch and its split, named as their flags."""

  @property
  def global_batch(self) -> int:
    """Images a step, over all replicas."""

  @property
  def accumulate_steps(self) -> int:
    """Micro-batches of a replica."""


def micro_batch(settings: Batching, num_replicas: int) -> int:
  """Returns how many images a replica computes with at once.

  Raises:
    errors.UsageError: A replica's batch does not divide into micro-batches.
  """
  replica_batch = settings.global_batch // num_replicas
  wanted = settings.accumulate_steps
  if replica_batch % wanted:
    fitting = max(count for count in range(1, wanted) if replica_batch % count == 0)
    raise errors.UsageError(
      f"--accumulate_steps={wanted} does not divide a replica's batch of "
      f"{replica_batch} (--global_batch={settings.global_batch} over {num_replicas} "
      f"replicas); try --accumulate_steps={fitting}."
    )
  return replica_batch // wanted


def train_loop(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  health: StepHealth,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles the loop of one phase.

  Returns:
    A function of (distributed iterator, int32[] steps) that runs that many steps, or
    fewer when a worker is asked to stop or something is not finite. It returns
    float32[steps, len(metrics.COLUMNS)], and the health flags of
    `step_health.local_flags`, float32[steps, 1 + replicas]; both are summed over all
    replicas.

  Raises:
    errors.UsageError: A replica's batch does not divide into micro-batches.
  """
  num_flags = 1 + strategy.num_replicas_in_sync
  micro_batch(settings, strategy.num_replicas_in_sync)

  @tf.function
  def loop(iterator: Any, num_steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    columns = (len(metrics.COLUMNS),)
    rows = tf.TensorArray(tf.float32, size=num_steps, element_shape=columns)
    flags = tf.TensorArray(tf.float32, size=num_steps, element_shape=(num_flags,))
    # The condition reads the flags of the step before the last one, because the host
    # would have to wait for the last step's end to read those.
    done, before, last = tf.constant(0), tf.zeros(num_flags), tf.zeros(num_flags)
    while done < num_steps and step_health.continues(before):
      before = last
      row, last = _step(iterator, state, phase, settings, strategy, health)
      rows, flags = rows.write(done, row), flags.write(done, last)
      done += 1
    return rows.stack()[:done], flags.stack()[:done]

  return loop


# AutoGraph converts the loop. Converting what is below it would take longer than
# tracing does.
@tf.autograph.experimental.do_not_convert
def _step(
  iterator: Any,
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  health: StepHealth,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Takes one step; returns a row of `metrics.COLUMNS` and the health flags."""
  batch, wait = timed_next(iterator, strategy, deterministic=settings.deterministic)
  learning_rate = _set_learning_rates(state, phase)
  outputs = strategy.run(
    _replica_gradients, args=(state, phase, settings, batch, health)
  )
  # All but the gradients are the same on every replica.
  first = tf.nest.map_structure(
    lambda value: strategy.experimental_local_results(value)[0],
    outputs._replace(gradients=None),
  )
  loss_scales = _apply(
    state,
    phase,
    settings,
    strategy,
    outputs.gradients,
    gradient_norm=first.gradient_norm,
  )
  state.head.assign_statistics(first.head_statistics)
  if state.average is not None:
    state.average.update(
      state.network, strategy, step=state.step, decay=settings.ema_decay
    )
  state.step.assign_add(1)
  values = [first.gradient_norm, learning_rate, *loss_scales, wait]
  return tf.concat([first.sums, tf.stack(values)], axis=0), first.health_flags


def timed_next(
  iterator: Any, strategy: tf.distribute.Strategy, *, deterministic: bool
) -> tuple[Batch, tf.Tensor]:
  """Returns the next batch and float32[] seconds that the host waited for it.

  The time is NaN in deterministic runs, where TensorFlow refuses to read a clock.
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
    # A CPU with one thread may otherwise read the clock after the whole step.
    with tf.control_dependencies([ended]):
      batch = {name: tf.identity(part) for name, part in batch.items()}
  return batch, tf.cast(ended - started, tf.float32)


def _set_learning_rates(state: TrainState, phase: schedules.Phase) -> tf.Tensor:
  """Sets both optimizers' learning rates; returns the head's, float32[]."""
  factor = schedules.learning_rate_factor(phase, state.step)
  optimizers.set_learning_rate(
    state.backbone_optimizer, phase.backbone_learning_rate * factor
  )
  optimizers.set_learning_rate(state.head_optimizer, phase.learning_rate * factor)
  return phase.learning_rate * factor


class ReplicaOutput(NamedTuple):
  """What a replica knows after the all-reduce of a step.

  Attributes:
    gradients: Unscaled, by the global batch's mean loss.
    gradient_norm: float32[], the global norm of all gradients.
    sums: float32[len(metrics.SUMS)], over the global batch.
    health_flags: float32[1 + replicas], see `step_health.local_flags`.
    head_statistics: float32[n], the head's running statistics after this step.
  """

  gradients: Gradients
  gradient_norm: tf.Tensor
  sums: tf.Tensor
  health_flags: tf.Tensor
  head_statistics: tf.Tensor


def _replica_gradients(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  batch: Batch,
  health: StepHealth,
) -> ReplicaOutput:
  """Computes one replica's gradients and sums them over all replicas."""
  local = compute_gradients(state, phase, settings, batch)
  unscaled = [state.loss_scale.unscaled(gradient) for gradient in local.gradients]
  norm = tf.linalg.global_norm(unscaled)
  flags = step_health.local_flags(
    health,
    gradient_norm=norm,
    losses=local.losses,
    may_overflow=state.loss_scale.skips_overflow(),
  )
  gradients, (sums, flags), norm = sum_gradients(
    _grouped(unscaled, state, phase), [local.sums, flags], norm=norm
  )
  return ReplicaOutput(gradients, norm, sums, flags, local.head_statistics)


def _grouped(
  gradients: Sequence[Gradient], state: TrainState, phase: schedules.Phase
) -> Gradients:
  """Groups gradients by the variables of `_variables`."""
  head, mirrored = len(state.head_variables), len(trained_variables(state, phase))
  return Gradients(
    head=list(gradients[:head]),
    backbone=list(gradients[head:mirrored]),
    own=list(gradients[mirrored:]),
  )


def _apply(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  gradients: Gradients,
  *,
  gradient_norm: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Updates the variables; with loss scaling, a step that overflowed is skipped.

  Returns:
    The loss scale of this step and that of the next, float32[] each.
  """

  def update() -> None:
    strategy.run(
      _replica_update, args=(state, phase, settings, gradients, gradient_norm)
    )

  scale = tf.identity(state.loss_scale.scale)
  if not state.loss_scale.is_dynamic:
    update()
    return scale, scale
  is_finite = tf.math.is_finite(gradient_norm)
  tf.cond(is_finite, update, lambda: None)
  state.loss_scale.update(is_finite)
  return scale, state.loss_scale.scale.read_value()


def _replica_update(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  gradients: Gradients,
  norm: tf.Tensor,
) -> None:
  """Clips, adds weight decay and updates; the same on every replica."""
  if settings.clip_norm:
    clipped, _ = tf.clip_by_global_norm(
      gradients.flat(), settings.clip_norm, use_norm=norm
    )
    gradients = _grouped(clipped, state, phase)
  variables = trained_variables(state, phase)
  decayed = optimizers.with_l2(
    gradients.mirrored,
    variables,
    optimizer=settings.optimizer,
    weight_decay=settings.weight_decay,
  )
  for gradient in gradients.own:
    # before the optimizer counts this update
    state.update_own_rows(gradient)
  pairs = list(zip(decayed, variables, strict=True))
  split = len(state.head_variables)
  optimizers.apply(state.head_optimizer, pairs[:split])
  if phase.trains_backbone:
    optimizers.apply(state.backbone_optimizer, pairs[split:])


class LocalResult(NamedTuple):
  """What one replica computes from its batch, before the all-reduce.

  Attributes:
    gradients: Of the replica's part of the global batch's mean loss, times the loss
      scale, in the order of `_variables`.
    losses: float32[batch].
    sums: float32[len(metrics.SUMS)].
    head_statistics: float32[n], the head's running statistics after this batch.
  """

  gradients: list[Gradient]
  losses: tf.Tensor
  sums: tf.Tensor
  head_statistics: tf.Tensor


def trained_variables(state: TrainState, phase: schedules.Phase) -> list[tf.Variable]:
  """Returns the mirrored variables that the phase trains: head group, then backbone."""
  if not phase.trains_backbone:
    return state.head_variables
  return [*state.head_variables, *state.backbone_variables]


def _variables(state: TrainState, phase: schedules.Phase) -> list[tf.Variable]:
  """Returns every variable that a gradient is taken by."""
  return [*trained_variables(state, phase), *state.head.own_class_weights()]


class Passes(NamedTuple):
  """The computations of a replica that XLA may compile; made by `make_passes`.

  Attributes:
    embed: (images float32[n, S, S, 3], draws float32[n, NUM_DRAWS]) -> float32[n,
      embedding].
    gradients: (images, micro-batch, positives) -> LocalResult, one forward and one
      backward pass. `positives` are the labels of the replica's whole batch.
  """

  embed: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
  gradients: Callable[[tf.Tensor, Batch, tf.Tensor], LocalResult]


def make_passes(
  state: TrainState, phase: schedules.Phase, settings: StepSettings
) -> Passes:
  """Returns a replica's forward and backward pass, compiled with --jit_compile=on.

  XLA cannot compile a collective between replicas. So where the loss needs one (a
  sharded head, running statistics, a metric loss), only the network is compiled, else
  the head's loss too, in one piece with the network's forward and backward pass.
  Augmentation stays outside, since XLA has no kernel for its crop.
  """
  is_local = state.rows is None and not _depends_on_batch(state, settings)
  embed = functools.partial(_embed, state, phase)
  gradients = functools.partial(_gradients, state, phase, settings)
  if settings.jit_compile != "on":
    return Passes(embed, functools.partial(gradients, embed))
  compiled = xla.compiled(embed)
  if is_local:
    return Passes(compiled, xla.compiled(functools.partial(gradients, embed)))
  return Passes(compiled, functools.partial(gradients, compiled))


def compute_gradients(
  state: TrainState, phase: schedules.Phase, settings: StepSettings, batch: Batch
) -> LocalResult:
  """Computes a replica's part of a step; call in replica context."""
  passes = make_passes(state, phase, settings)
  if settings.accumulate_steps == 1:
    return passes.gradients(_augmented(settings, batch), batch, batch["label"])
  if _depends_on_batch(state, settings):
    return _cached_gradients(state, phase, settings, passes, batch)
  return _accumulated(settings, passes, batch)


def _depends_on_batch(state: TrainState, settings: StepSettings) -> bool:
  """Returns whether a sample's loss depends on other samples of the global batch."""
  return state.head.running_statistics is not None or settings.metric_loss != NO_LOSS


def _gradients(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  embed: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
  images: tf.Tensor,
  batch: Batch,
  positives: tf.Tensor,
) -> LocalResult:
  """One forward and one backward pass."""
  variables = _variables(state, phase)
  # Only trained variables are watched, so a frozen backbone keeps no activations.
  with tf.GradientTape(watch_accessed_variables=False) as tape:
    tape.watch(variables)
    embeddings = embed(images, batch["draws"])
    loss, output, metric_loss = _scaled_loss(
      state, settings, embeddings, batch["label"], positives=positives
    )
  return _local_result(tape.gradient(loss, variables), output, batch, metric_loss)


def _accumulated(settings: StepSettings, passes: Passes, batch: Batch) -> LocalResult:
  """One forward and one backward pass for each micro-batch, gradients added up."""
  results: list[LocalResult] = []
  total: list[Gradient] = []
  for micro in _micro_batches(batch, settings.accumulate_steps):
    micro = _computed_after(total, micro)
    result = passes.gradients(_augmented(settings, micro), micro, batch["label"])
    total = _add_gradients(total, result.gradients) if results else result.gradients
    results.append(result)
  return LocalResult(
    gradients=total,
    losses=tf.concat([result.losses for result in results], axis=0),
    sums=tf.add_n([result.sums for result in results]),
    head_statistics=results[-1].head_statistics,
  )


def _cached_gradients(
  state: TrainState,
  phase: schedules.Phase,
  settings: StepSettings,
  passes: Passes,
  batch: Batch,
) -> LocalResult:
  """Gradient caching: embed all micro-batches, take the loss, go back through each."""
  variables = _variables(state, phase)
  micro_batches = _micro_batches(batch, settings.accumulate_steps)
  # The first pass must not update the averages of batch norm; the second one does.
  averages = state.network.non_trainable_variables
  before = [tf.identity(average) for average in averages]
  pieces: list[tf.Tensor] = []
  for micro in micro_batches:
    micro = _computed_after(pieces, micro)
    pieces.append(passes.embed(_augmented(settings, micro), micro["draws"]))
  for average, value in zip(averages, before, strict=True):
    average.assign(value)

  embeddings = tf.concat(pieces, axis=0)
  with tf.GradientTape(watch_accessed_variables=False) as tape:
    tape.watch([embeddings, *variables])
    loss, output, metric_loss = _scaled_loss(
      state, settings, embeddings, batch["label"]
    )
  upstream, *total = tape.gradient(loss, [embeddings, *variables])

  upstreams = tf.split(upstream, settings.accumulate_steps)
  for micro, upstream in zip(micro_batches, upstreams, strict=True):
    micro = _computed_after(total, micro)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(variables)
      embedded = passes.embed(_augmented(settings, micro), micro["draws"])
    total = _add_gradients(total, tape.gradient(embedded, variables, upstream))
  return _local_result(total, output, batch, metric_loss)


def _micro_batches(batch: Batch, count: int) -> list[Batch]:
  """Splits a replica's batch into `count` micro-batches of one size."""
  pieces = {name: tf.split(value, count) for name, value in batch.items()}
  return [
    {name: values[place] for name, values in pieces.items()} for place in range(count)
  ]


def _computed_after(results: Sequence[Gradient | None], batch: Batch) -> Batch:
  """Returns the batch, with nothing computed from it before `results` are there.

  Without this, TensorFlow may compute all micro-batches at once, in the memory of all.
  """
  before = tf.nest.flatten(list(results), expand_composites=True)
  with tf.control_dependencies([tensor for tensor in before if tensor is not None]):
    return {name: tf.identity(value) for name, value in batch.items()}


def _add_gradients(
  left: Sequence[Gradient | None], right: Sequence[Gradient | None]
) -> list[Gradient]:
  """Adds gradients by the same variables; None stands for zero."""
  return [_add(*pair) for pair in zip(left, right, strict=True)]


def _add(left: Gradient | None, right: Gradient | None) -> Gradient:
  if left is None or right is None:
    return right if left is None else left
  if not isinstance(left, tf.IndexedSlices):
    return left + right
  # A sampled head samples its rows once a step, so the indices are the same.
  values = left.values + right.values
  return tf.IndexedSlices(values, left.indices, left.dense_shape)


def _augmented(settings: StepSettings, batch: Batch) -> tf.Tensor:
  """Returns the augmented images of a batch, float32[batch, S, S, 3]."""
  return augment.augment(
    batch["image"],
    batch["draws"],
    flip=settings.augment_flip,
    crop=settings.augment_crop,
    color=settings.augment_color,
    cutout=settings.augment_cutout,
  )


def _embed(
  state: TrainState, phase: schedules.Phase, images: tf.Tensor, draws: tf.Tensor
) -> tf.Tensor:
  """Returns embeddings of augmented images, float32[batch, embedding]."""
  return state.network.embed(
    # A compiled function would also return the gradient by its input.
    tf.stop_gradient(images),
    training=True,
    training_backbone=phase.trains_backbone,
    draws=draws[:, augment.DROPOUT],
  )


def _scaled_loss(
  state: TrainState,
  settings: StepSettings,
  embeddings: tf.Tensor,
  labels: tf.Tensor,
  *,
  positives: tf.Tensor | None = None,
) -> tuple[tf.Tensor, HeadOutput, tf.Tensor | None]:
  """Returns the loss to differentiate, the head's output and the metric loss.

  The loss is float32[], this replica's part of the global batch's mean loss, times the
  loss scale.
  """
  step = state.step.read_value()
  output = state.head.forward(HeadInput(embeddings, labels, step, positives))
  output, metric_loss = metric_losses.add_metric_loss(
    output, embeddings, labels, settings=settings
  )
  loss = tf.reduce_sum(output.losses) / settings.global_batch
  return loss * state.loss_scale.scale, output, metric_loss


def _local_result(
  gradients: list[Gradient],
  output: HeadOutput,
  batch: Batch,
  metric_loss: tf.Tensor | None,
) -> LocalResult:
  """Adds a batch's metrics to its gradients."""
  sums = metrics.sums(
    output,
    weights=tf.ones_like(output.losses),
    damaged=batch["damaged"],
    metric_loss=metric_loss,
  )
  return LocalResult(gradients, output.losses, sums, output.running_statistics)
