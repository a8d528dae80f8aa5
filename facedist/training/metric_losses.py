"""The metric loss: triplets of a batch, instead of a head's loss or added to it."""

import dataclasses
from typing import Protocol

import tensorflow as tf

from facedist import errors
from facedist.models import triplet_loss
from facedist.models.gather import gather_batch
from facedist.models.heads.base import HeadOutput
from facedist.training.config import NO_HEAD, NO_LOSS, TrainConfig


class MetricLoss(Protocol):
  """The settings that the loss depends on, named as their flags."""

  @property
  def metric_loss(self) -> str:
    """A key of `TRIPLET_LOSSES`, or none."""

  @property
  def metric_weight(self) -> float:
    """The factor of the loss."""

  @property
  def metric_margin(self) -> float:
    """The margin of its triplets."""


def check_metric_loss(settings: TrainConfig) -> None:
  """Checks that the flags of head and metric loss fit together.

  Raises:
    errors.UsageError: No loss is left, or a margin is larger than any distance.
  """
  if settings.head == NO_HEAD and settings.head_sharding != "replicated":
    raise errors.UsageError(
      f"--head_sharding={settings.head_sharding} is about class weights, and "
      "--head=none has none; leave it out."
    )
  if settings.metric_loss != NO_LOSS:
    _check_weight_and_margin(settings)
  elif settings.head == NO_HEAD:
    raise errors.UsageError(
      f"--head=none --metric_loss={NO_LOSS} leaves no loss to train with; give "
      f"--metric_loss={' or '.join(triplet_loss.TRIPLET_LOSSES)}, or a head."
    )


def _check_weight_and_margin(settings: TrainConfig) -> None:
  """Raises UsageError for a weight of 0 without a head, or too large a margin."""
  if settings.head == NO_HEAD and settings.metric_weight == 0:
    raise errors.UsageError(
      "--head=none --metric_weight=0 leaves no loss to train with; give a weight above "
      "0, or a head."
    )
  maximum = triplet_loss.MAX_DISTANCES[
    triplet_loss.TRIPLET_LOSSES[settings.metric_loss]
  ]
  if settings.metric_margin > maximum:
    raise errors.UsageError(
      f"--metric_margin={settings.metric_margin} is more than {maximum:g}, the "
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
  """Adds the metric loss to the losses of a replica's batch; call in replica context.

  Each sample gets the loss of the global batch, whose mean over samples is itself. So
  the samples of a replica contribute that replica's part of the mean.

  Args:
    output: The head's, of the replica's batch.
    embeddings: float[batch, embedding].
    labels: int32[batch].
    settings: Which loss, its weight and its margin.

  Returns:
    The head's output, and float32[], the metric loss of the global batch without its
    weight; none where there is no such loss.
  """
  if settings.metric_loss == NO_LOSS:
    return output, None
  all_embeddings, all_labels = gather_batch(tf.cast(embeddings, tf.float32), labels)
  found = triplet_loss.triplet_loss(
    all_embeddings, all_labels, kind=settings.metric_loss, margin=settings.metric_margin
  )
  losses = output.losses + settings.metric_weight * found
  return dataclasses.replace(output, losses=losses), found
