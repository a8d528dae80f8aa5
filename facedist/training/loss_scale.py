"""Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2).

Keras' LossScaleOptimizer wraps one optimizer. Here two optimizers share one scale, and
clipping and metrics need the unscaled gradient.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from facedist.distributed.collectives import Gradient

INITIAL = 2.0**15
GROW_EVERY = 2000


def next_scale(
  scale: tf.Tensor, good_steps: tf.Tensor, is_finite: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Halves the scale on overflow, doubles it after GROW_EVERY good steps in a row.

  Args:
    scale: float32[] that the last loss was multiplied with.
    good_steps: int64[] steps since the scale changed or overflowed.
    is_finite: bool[], whether the last gradient was finite.

  Returns:
    The next (scale, good_steps); the scale never falls below 1.
  """
  grows = good_steps + 1 >= GROW_EVERY
  grown = tf.where(grows, scale * 2, scale)
  counted = tf.where(grows, tf.zeros_like(good_steps), good_steps + 1)
  return (
    tf.where(is_finite, grown, tf.maximum(scale / 2, 1.0)),
    tf.where(is_finite, counted, tf.zeros_like(good_steps)),
  )


@dataclasses.dataclass(frozen=True)
class Change:
  """A new loss scale.

  Attributes:
    step: Number of finished steps, including the one that changed the scale.
    before: The scale of that step.
    after: The scale from the next step on.
  """

  step: int
  before: float
  after: float

  def __str__(self) -> str:
    reason = f"{GROW_EVERY} steps in a row were finite"
    if self.after < self.before:
      reason = "the gradient overflowed, and the step was skipped"
    return f"step {self.step}: loss scale {self.before:g} -> {self.after:g}: {reason}"


def changes(before: np.ndarray, after: np.ndarray, *, first_step: int) -> list[Change]:
  """Returns where the scale changed.

  Each step has both, so no change is missed where a run is resumed.

  Args:
    before: float32[steps], the scale of each step.
    after: float32[steps], the scale after each step.
    first_step: Number of the first of these steps, from 0.
  """
  return [
    Change(first_step + int(place) + 1, float(before[place]), float(after[place]))
    for place in np.flatnonzero(before != after)
  ]


class LossScale(tf.Module):
  """Holds the scale between steps; it is fixed at 1 if the policy needs none."""

  def __init__(self, *, is_dynamic: bool) -> None:
    super().__init__(name="loss_scale")
    self.is_dynamic = is_dynamic
    first = INITIAL if is_dynamic else 1.0
    self.scale = _variable(first, "scale", tf.float32)
    self.good_steps = _variable(0, "good_steps", tf.int64)
    self.skipped = _variable(0, "skipped", tf.int64)

  def skips_overflow(self) -> tf.Tensor:
    """Returns bool[]: is a step whose gradient overflows skipped."""
    if not self.is_dynamic:
      return tf.constant(False)
    return self.scale.read_value() > 1.0

  def unscaled(self, gradient: Gradient) -> Gradient:
    """Divides a gradient by the scale; a fixed one is 1 and costs nothing."""
    if not self.is_dynamic:
      return gradient
    if not isinstance(gradient, tf.IndexedSlices):
      return gradient / self.scale
    values = gradient.values / self.scale
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)

  def update(self, is_finite: tf.Tensor) -> None:
    """Moves to the next scale; called in cross-replica context after each step."""
    scale, good_steps = next_scale(self.scale, self.good_steps, is_finite)
    self.scale.assign(scale)
    self.good_steps.assign(good_steps)
    self.skipped.assign_add(tf.cast(~is_finite, tf.int64))


def _variable(value: float, name: str, dtype: tf.DType) -> tf.Variable:
  """Makes a variable that is the same on every replica and is not trained."""
  return tf.Variable(
    value,
    name=name,
    dtype=dtype,
    trainable=False,
    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
  )
