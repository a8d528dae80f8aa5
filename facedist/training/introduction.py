"""The first lines of a log: what this run is."""

import dataclasses
import platform
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import __version__
from facedist.training import phases
from facedist.training.config import TrainConfig


def introduce(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  facts: dict[str, Any],
  plan: tuple[phases.Phase, ...],
  *,
  num_records: int,
) -> None:
  """Logs what this run is: versions, config, batch split, data and phases."""
  replicas = strategy.num_replicas_in_sync
  logging.info(
    "facedist %s, TensorFlow %s, Python %s",
    __version__,
    tf.__version__,
    platform.python_version(),
  )
  fields = dataclasses.asdict(settings).items()
  logging.info("config: %s", " ".join(f"{name}={value}" for name, value in fields))
  logging.info(
    "batch: %d = %d replicas x %d; seed %d",
    settings.global_batch,
    replicas,
    settings.global_batch // replicas,
    settings.seed,
  )
  logging.info(
    "data: %d images of %d identities, %d px, fingerprint %s",
    num_records,
    facts["num_identities"],
    facts["image_size"],
    facts["data_fingerprint"],
  )
  for phase in plan:
    logging.info(
      "phase %s: steps %d to %d", phase.name, phase.first_step, phase.end_step
    )
