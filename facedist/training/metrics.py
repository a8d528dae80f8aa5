"""Training metrics as sums, which add up over replicas and steps."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from facedist.models.heads.base import HeadOutput

SUMS = (
  "loss",
  "weight",
  "correct",
  "true_positive",
  "false_positive",
  "target_cosine",
  "metric_loss",
  "damaged",
)

COLUMNS = (
  *SUMS,
  "gradient_norm",
  "learning_rate",
  "loss_scale",
  "next_loss_scale",
  "input_wait",
)
"""The values that a training step reports: sums, then values; waiting in seconds."""


def sums(
  output: HeadOutput,
  *,
  weights: tf.Tensor,
  damaged: tf.Tensor,
  metric_loss: tf.Tensor | None = None,
) -> tf.Tensor:
  """Adds up a batch's metrics; see `Summary` for what they mean.

  Args:
    output: The head's, of the batch.
    weights: float32[batch], 0 where the row is padding.
    damaged: float32[batch], 1 where a bad record was replaced or skipped.
    metric_loss: float32[], of the global batch; None without a metric loss.

  Returns:
    float32[len(SUMS)], in the order of `SUMS`.
  """
  rows = (
    output.losses,
    tf.ones_like(output.losses),
    tf.cast(output.is_correct, tf.float32),
    tf.cast(output.is_true_positive, tf.float32),
    tf.cast(output.is_false_positive, tf.float32),
    output.target,
    tf.fill(tf.shape(weights), float("nan") if metric_loss is None else metric_loss),
  )
  # A padded row may hold NaN, so it is masked, not multiplied by zero.
  kept = tf.where(weights > 0, tf.stack(rows), 0.0)
  measured = tf.reduce_sum(kept * weights, axis=-1)
  return tf.concat([measured, [tf.reduce_sum(damaged)]], axis=0)


@dataclasses.dataclass(frozen=True)
class Summary:
  """Means over some samples; NaN where a metric was not measured.

  Attributes:
    loss: What is minimised: the head's cross-entropy in nats and its penalty, and in
      training the metric loss times its weight.
    accuracy: Fraction of samples whose own class weight is the nearest.
    precision: TP / (TP + FP), as `tf.keras.metrics.Precision` counts them on one-hot
      labels: a class is predicted where its un-margined probability exceeds 0.5.
      0 where nothing is predicted.
    recall: TP / samples, as `tf.keras.metrics.Recall`.
    target_cosine: Mean cosine of an embedding with its own class weight.
    metric_loss: Mean over steps of the metric loss, without its weight.
    samples: How many samples.
    damaged: How many bad records were replaced or skipped.
  """

  loss: float
  accuracy: float
  precision: float
  recall: float
  target_cosine: float
  metric_loss: float
  samples: int
  damaged: int

  def scalars(self) -> Mapping[str, float]:
    """Returns the measured means by name, without the counts."""
    values = dataclasses.asdict(self)
    del values["samples"], values["damaged"]
    return {name: value for name, value in values.items() if not math.isnan(value)}


def summarise(totals: np.ndarray) -> Summary:
  """Turns float[len(SUMS)] sums, in the order of `SUMS`, into means."""
  total = dict(zip(SUMS, (float(value) for value in totals), strict=True))
  samples = max(total["weight"], 1.0)
  predicted = total["true_positive"] + total["false_positive"]
  return Summary(
    loss=total["loss"] / samples,
    accuracy=total["correct"] / samples,
    precision=total["true_positive"] / predicted if predicted else 0.0,
    recall=total["true_positive"] / samples,
    target_cosine=total["target_cosine"] / samples,
    metric_loss=total["metric_loss"] / samples,
    samples=round(total["weight"]),
    damaged=round(total["damaged"]),
  )
