"""The inner loop: many training steps inside one graph."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from facedist.training import (
  batches,
  metrics,
  micro_batches,
  optimizers,
  phases,
  step_settings,
  vitals,
)
from facedist.training.batches import Batch
from facedist.training.gradients import Gradient, over_replicas
from facedist.training.state import TrainState
from facedist.training.step_settings import StepSettings
from facedist.training.vitals import Vitals

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
  phase: phases.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  pulse: Vitals,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles the loop of one phase.

  Returns:
    A function of (distributed iterator, int32[] steps) that runs that many steps, or
    fewer when a worker is asked to stop or something is not finite, and returns
    float32[steps, len(COLUMNS)] and the vitals, float32[steps, 1 + replicas], both
    summed over all replicas.
  """
  num_vitals = 1 + strategy.num_replicas_in_sync
  step_settings.micro_batch(settings, strategy.num_replicas_in_sync)

  @tf.function
  def loop(iterator: Any, num_steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    rows = tf.TensorArray(tf.float32, size=num_steps, element_shape=(len(COLUMNS),))
    signs = tf.TensorArray(tf.float32, size=num_steps, element_shape=(num_vitals,))
    # A step behind: to heed the last one's signs, the host would wait for its end.
    done, before, last = tf.constant(0), tf.zeros(num_vitals), tf.zeros(num_vitals)
    while done < num_steps and vitals.goes_on(before):
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
  phase: phases.Phase,
  settings: StepSettings,
  strategy: tf.distribute.Strategy,
  pulse: Vitals,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Takes one step; returns a row of `COLUMNS` and the vitals, see `train_loop`."""
  batch, wait = batches.timed_next(
    iterator, strategy, deterministic=settings.deterministic
  )
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


def _set_rates(state: TrainState, phase: phases.Phase) -> tf.Tensor:
  """Gives both optimizers the rate of this step; returns the head's, float32[]."""
  factor = phases.rate_factor(phase, state.step)
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
  phase: phases.Phase,
  settings: StepSettings,
  batch: Batch,
  pulse: Vitals,
) -> tuple[list[Gradient], tf.Tensor]:
  """One replica's share of a step, summed over all replicas.

  Returns:
    The unscaled gradient of the global batch's mean loss by each trained variable, and
    by the class centres that this replica alone holds; and float32[n]: the metrics, the
    vitals, the gradient's global norm and what the head remembers.
  """
  part = micro_batches.compute(state, phase, settings, batch)
  gradients = [state.loss_scale.unscaled(gradient) for gradient in part.gradients]
  norm = tf.linalg.global_norm(gradients)
  signs = vitals.local(
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
  phase: phases.Phase,
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
  phase: phases.Phase,
  settings: StepSettings,
  gradients: list[Gradient],
  norm: tf.Tensor,
) -> None:
  """Clips, adds weight decay and updates; the same on every replica."""
  if settings.clip_norm:
    gradients, _ = tf.clip_by_global_norm(gradients, settings.clip_norm, use_norm=norm)
  variables = micro_batches.trained_variables(state, phase)
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
