"""The first lines of a log: what this run is."""

import dataclasses
import platform
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import __version__
from facedist.training import optimizer_settings, phases, step_settings
from facedist.training.config import TrainConfig


def introduce(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  facts: dict[str, Any],
  plan: tuple[phases.Phase, ...],
  *,
  num_records: int,
) -> None:
  """Logs what this run is: versions, config, batch split, data and phases.

  Raises:
    errors.UsageError: A replica's batch does not divide into micro-batches.
  """
  replicas = strategy.num_replicas_in_sync
  logging.info(
    "facedist %s, TensorFlow %s, Python %s",
    __version__,
    tf.__version__,
    platform.python_version(),
  )
  fields = dataclasses.asdict(settings).items()
  logging.info("config: %s", " ".join(f"{name}={value}" for name, value in fields))
  at_once = step_settings.micro_batch(settings, replicas)
  micros = settings.accumulate_steps
  logging.info(
    "batch: %d = %d replicas x %s%d; seed %d",
    settings.global_batch,
    replicas,
    f"{micros} micro-batches x " if micros > 1 else "",
    at_once,
    settings.seed,
  )
  logging.info(
    "data: %d images of %d identities, %d px, fingerprint %s",
    num_records,
    facts["num_identities"],
    facts["image_size"],
    facts["data_fingerprint"],
  )
  _introduce_updates(settings, plan)


def _introduce_updates(settings: TrainConfig, plan: tuple[phases.Phase, ...]) -> None:
  """Logs the optimizer, and the steps and rates of each phase."""
  logging.info("optimizer: %s", _optimizer(settings))
  for phase in plan:
    logging.info(
      "phase %s: steps %d to %d, peak rate %.4g, the backbone's %.4g",
      phase.name,
      phase.first_step,
      phase.end_step,
      phase.rate,
      phase.backbone_rate,
    )


def _optimizer(settings: TrainConfig) -> str:
  """Returns its name and numbers, and what the rates are multiplied with."""
  found = optimizer_settings.numbers(settings)
  text = " ".join(f"{name}={value:g}" for name, value in found.items())
  scaled = ""
  if settings.rate_batch:
    factor = settings.global_batch / settings.rate_batch
    scaled = f"; both rates times {factor:g} for --rate_batch={settings.rate_batch}"
  return f"{settings.optimizer} {text}{scaled}"
