"""A dry run: trains a config for two steps on random images, with a restart between."""

import dataclasses
import math
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging

from facedist import errors, storage
from facedist.data import noise, verification_set
from facedist.data.samplers.epoch_sampler import BatchShard
from facedist.evaluation import embedder, verification
from facedist.training import inference, train_step
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig

IMAGE_SIZE = 64
IMAGES_PER_REPLICA = 2
IDENTITIES = 2


def dry_run(
  settings: TrainConfig, num_replicas: int, *, run: Callable[[TrainConfig], None]
) -> None:
  """Trains a config on random shards, restarts it, and scores what it has saved.

  The first run stops after one step of each phase and saves; the second restores and
  trains one more step. Batches and phases are shortened to that, and the learning rates
  scaled with the batch. Everything else is as in the config, except that ImageNet's
  weights are not downloaded.

  Args:
    settings: The config, as `resolve` returns it.
    num_replicas: Replicas of the strategy that `run` trains under.
    run: Trains a config to its end.

  Raises:
    errors.UsageError: Several workers, whose temporary folders would differ; or the
      config's own batch does not divide over these replicas.
  """
  if settings.strategy == "multiworker":
    raise errors.UsageError(
      "--dry_run needs --strategy=one or mirrored; to try a cluster, run two workers "
      "of launch/local.py with --stop_after_steps=2."
    )
  images = BatchShard(settings.global_batch, 0, 1, num_replicas).batch
  train_step.micro_batch(settings, num_replicas)
  with tempfile.TemporaryDirectory(prefix="facedist-dry-run-") as scratch:
    short = shortened(settings, num_replicas, scratch)
    noise.write_noise_shards(
      str(short.data_dir),
      num_identities=IDENTITIES,
      images_per_identity=short.global_batch,
      val_images_per_identity=1,
      image_size=IMAGE_SIZE,
      num_shards=1,
      seed=settings.seed,
    )
    logging.info(
      "dry run: %d images a replica instead of %d",
      short.global_batch // num_replicas,
      images,
    )
    for steps in (1, 2):
      run(dataclasses.replace(short, stop_after_steps=steps))
    _score(str(short.workdir))


def shortened(settings: TrainConfig, num_replicas: int, scratch: str) -> TrainConfig:
  """Returns the config with the smallest batches and phases that use all of its parts.

  Args:
    settings: The config, as `resolve` returns it.
    num_replicas: Replicas that divide the batch.
    scratch: Folder for shards and workdir.
  """
  is_by_identity = settings.sampler == "identities"  # needs two images of each
  batch = IMAGES_PER_REPLICA * num_replicas * (IDENTITIES if is_by_identity else 1)
  weights = settings.backbone_weights
  return dataclasses.replace(
    settings,
    data_dir=storage.join(scratch, "shards"),
    workdir=storage.join(scratch, "run"),
    backbone_weights="none" if weights == "imagenet" else weights,
    global_batch=batch,
    rate_batch=settings.rate_batch or settings.global_batch,  # the rates' batch
    accumulate_steps=min(settings.accumulate_steps, IMAGES_PER_REPLICA),
    streams=math.gcd(settings.streams, batch),
    identities_per_batch=IDENTITIES if is_by_identity else None,
    head_epochs=min(settings.head_epochs, 0.5),
    head_warmup_epochs=0.0,
    full_epochs=1.0,
    full_warmup_epochs=0.0,
    checkpoint_every_steps=1,
    log_every_steps=1,
  )


def _score(workdir: str) -> None:
  """Scores the run's last checkpoint on a random verification set, as a log line."""
  newest = checkpoints.list_checkpoints(workdir)[-1]
  network = inference.load_network(workdir, newest)
  with tempfile.TemporaryDirectory(prefix="facedist-dry-run-") as scratch:
    noise.write_noise_verification_set(
      scratch, num_pairs=8, folds=2, image_size=IMAGE_SIZE, seed=0
    )
    pairs = verification_set.load_verification_set(scratch)
    images = pairs.read(np.arange(pairs.num_images))
  embeddings = embedder.Embedder(
    network=network.embed, network_name=network.name, batch_size=len(images)
  ).embed(images, [f"image {number}" for number in range(len(images))])
  scores = verification.cosine_scores(embeddings, pairs.first, pairs.second)
  result = verification.verify(scores, pairs.same, pairs.folds)
  logging.info(
    "dry run: %s trained, saved, restored and scored %.3f on random images; the "
    "config works",
    network.name,
    result.accuracy_mean,
  )
