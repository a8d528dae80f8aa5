"""Phases and learning rates: both functions of the step alone."""

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from facedist import errors
from facedist.training import config as train_config
from facedist.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Phase:
  """One stretch of training steps with its own schedule.

  Attributes:
    name: 'head' (backbone frozen) or 'full'.
    first_step: Number of the phase's first step.
    end_step: Number of the step after its last.
    warmup_steps: Steps over which the learning rate rises linearly to its peak.
    learning_rate: Peak learning rate of the head group.
    backbone_learning_rate: Peak learning rate of the backbone; 0 while it is frozen.
    decay: float32 progress in [0, 1] after the warm-up -> factor of the peak.
  """

  name: str
  first_step: int
  end_step: int
  warmup_steps: int
  learning_rate: float
  backbone_learning_rate: float
  decay: Callable[[tf.Tensor], tf.Tensor]

  @property
  def trains_backbone(self) -> bool:
    """Whether gradients flow into the backbone."""
    return self.backbone_learning_rate > 0


def plan_phases(settings: TrainConfig, num_records: int) -> tuple[Phase, ...]:
  """Divides the steps of a run into its phases.

  Args:
    settings: The run's configuration.
    num_records: Records of an epoch.

  Raises:
    errors.UsageError: No phase has a step, a warm-up is longer than its phase, or the
      optimizer is not known.
  """

  def steps(epochs: float) -> int:
    return math.ceil(epochs * num_records / settings.global_batch)

  head_rate, full_rate = train_config.peak_rates(
    settings, global_batch=settings.global_batch
  )
  head_end = steps(settings.head_epochs)
  head = Phase(
    name="head",
    first_step=0,
    end_step=head_end,
    warmup_steps=steps(settings.head_warmup_epochs),
    learning_rate=head_rate,
    backbone_learning_rate=0.0,
    decay=_decay(settings, settings.head_schedule),
  )
  full = Phase(
    name="full",
    first_step=head_end,
    end_step=head_end + steps(settings.full_epochs),
    warmup_steps=steps(settings.full_warmup_epochs),
    learning_rate=full_rate,
    backbone_learning_rate=full_rate * settings.backbone_rate_factor,
    decay=_decay(settings, settings.full_schedule),
  )
  phases = tuple(phase for phase in (head, full) if phase.end_step > phase.first_step)
  if not phases:
    raise errors.UsageError("--head_epochs and --full_epochs are both 0; train one.")
  for phase in phases:
    length = phase.end_step - phase.first_step
    if phase.warmup_steps > length:
      raise errors.UsageError(
        f"--{phase.name}_warmup_epochs is {phase.warmup_steps} steps, more than the "
        f"phase's {length}; shorten it or raise --{phase.name}_epochs."
      )
  return phases


def boundaries(settings: TrainConfig) -> tuple[float, ...]:
  """Parses --step_boundaries.

  Raises:
    errors.UsageError: They are not rising fractions between 0 and 1.
  """
  try:
    values = tuple(float(text) for text in settings.step_boundaries.split(","))
  except ValueError:
    values = (1.0,)
  if any(not 0 < value < 1 for value in values) or list(values) != sorted(set(values)):
    raise errors.UsageError(
      f"--step_boundaries={settings.step_boundaries} must be rising fractions of a "
      "phase between 0 and 1, such as 0.5,0.75,0.9."
    )
  return values


def learning_rate_factor(phase: Phase, step: tf.Tensor) -> tf.Tensor:
  """Returns the learning rate at `step` over the phase's peak.

  It rises linearly over the warm-up, reaching the peak at its last step, then
  follows the phase's decay, whose progress is 0 at the first step after the warm-up
  and would be 1 at `end_step`.

  Args:
    phase: The phase that `step` lies in.
    step: int64[] number of the step, from 0.

  Returns:
    float32[] in [0, 1].
  """
  position = tf.cast(step - phase.first_step, tf.float32)
  warmup = float(phase.warmup_steps)
  length = max(phase.end_step - phase.first_step - phase.warmup_steps, 1)
  progress = tf.clip_by_value((position - warmup) / length, 0.0, 1.0)
  rising = (position + 1.0) / max(warmup, 1.0)
  return tf.where(position < warmup, rising, phase.decay(progress))


def cosine_decay(progress: tf.Tensor, *, final: float) -> tf.Tensor:
  """Falls from 1 to `final` along half a cosine (arXiv:1608.03983, eq. 5)."""
  return final + (1 - final) * 0.5 * (1 + tf.cos(math.pi * progress))


def step_decay(
  progress: tf.Tensor, *, boundaries: tuple[float, ...], factor: float
) -> tf.Tensor:
  """Multiplies by `factor` at each boundary, a fraction of the phase."""
  passed = tf.reduce_sum(tf.cast(progress >= tf.constant(boundaries), tf.float32))
  return tf.pow(factor, passed)


def polynomial_decay(progress: tf.Tensor, *, power: float, final: float) -> tf.Tensor:
  """Falls from 1 to `final` as (1 - progress)^power."""
  return final + (1 - final) * tf.pow(1 - progress, power)


def _decay(settings: TrainConfig, schedule: str) -> Callable[[tf.Tensor], tf.Tensor]:
  """Returns the decay function that the settings name."""
  final = settings.final_rate_fraction
  cuts = boundaries(settings)
  table: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "cosine": lambda progress: cosine_decay(progress, final=final),
    "step": lambda progress: step_decay(
      progress, boundaries=cuts, factor=settings.step_factor
    ),
    "polynomial": lambda progress: polynomial_decay(
      progress, power=settings.polynomial_power, final=final
    ),
  }
  return table[schedule]
