"""The plain values a training step depends on."""

import dataclasses
from typing import Protocol

from facedist import config, errors
from facedist.training.config import TrainConfig, with_usual_values
from facedist.training.metric_settings import NO_LOSS


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
  return config.subset(StepSettings, with_usual_values(run))


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
