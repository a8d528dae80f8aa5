"""The loss that compares the images of a batch, in place of a head's or added to it."""

import dataclasses
from typing import Protocol

import tensorflow as tf

from facedist import addons, errors
from facedist.models import triplet_loss
from facedist.models.heads.base import HeadOutput
from facedist.training.config import NO_HEAD, NO_LOSS, TrainConfig


class MetricLoss(Protocol):
  """What of a run's settings the loss depends on; named as the flags."""

  @property
  def metric_loss(self) -> str:
    """A key of `TRIPLET_LOSSES`, or none."""

  @property
  def metric_weight(self) -> float:
    """What the loss is multiplied with."""

  @property
  def metric_margin(self) -> float:
    """The margin of its triplets."""


def check_metric_loss(settings: TrainConfig) -> None:
  """Finds flags that do not go together.

  Raises:
    errors.UsageError: No loss is left, a margin is larger than any distance, or
      tensorflow-addons is not installed.
  """
  if settings.head == NO_HEAD and settings.head_sharding != "replicated":
    raise errors.UsageError(
      f"--head_sharding={settings.head_sharding} is about class weights, and "
      "--head=none has none; leave it out."
    )
  if settings.metric_loss != NO_LOSS:
    _check_numbers(settings)
    addons.get(settings.metric_loss)
  elif settings.head == NO_HEAD:
    raise errors.UsageError(
      f"--head=none --metric_loss={NO_LOSS} leaves no loss to train with; give "
      f"--metric_loss={' or '.join(triplet_loss.TRIPLET_LOSSES)}, or a head."
    )


def _check_numbers(settings: TrainConfig) -> None:
  """Raises UsageError for a weight or a margin that makes no sense."""
  if settings.head == NO_HEAD and settings.metric_weight == 0:
    raise errors.UsageError(
      "--head=none --metric_weight=0 leaves no loss to train with; give a weight above "
      "0, or a head."
    )
  farthest = triplet_loss.FARTHEST[triplet_loss.TRIPLET_LOSSES[settings.metric_loss]]
  if settings.metric_margin > farthest:
    raise errors.UsageError(
      f"--metric_margin={settings.metric_margin} is more than {farthest:g}, the "
      f"largest distance of --metric_loss={settings.metric_loss}, so no triplet could "
      "meet it; give less, such as 0.2."
    )


def add_metric_loss(
  output: HeadOutput,
  embeddings: tf.Tensor,
  labels: tf.Tensor,
  *,
  settings: MetricLoss,
) -> tuple[HeadOutput, tf.Tensor | None]:
  """Adds the metric loss to those of a replica's batch; called in replica context.

  Each sample gets the loss of the global batch, whose mean over samples is itself. So a
  replica that takes the losses of its own samples takes its share of it.

  Args:
    output: The head's, of the replica's batch.
    embeddings: float[batch, embedding].
    labels: int32[batch].
    settings: Which loss, and its numbers.

  Returns:
    The head's output, and float32[], the metric loss of the global batch without its
    weight; none where there is no such loss.
  """
  if settings.metric_loss == NO_LOSS:
    return output, None
  everyone, every_label = triplet_loss.gather(tf.cast(embeddings, tf.float32), labels)
  found = triplet_loss.triplet_loss(
    everyone, every_label, kind=settings.metric_loss, margin=settings.metric_margin
  )
  losses = output.losses + settings.metric_weight * found
  return dataclasses.replace(output, losses=losses), found
