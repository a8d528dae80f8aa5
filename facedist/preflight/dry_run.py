"""A dry run: a config on random images, two steps with a restart between them."""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator

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


@contextlib.contextmanager
def dry_run_phases(
  settings: TrainConfig, num_replicas: int
) -> Iterator[tuple[TrainConfig, ...]]:
  """Makes random shards and yields the configs to train one after the other.

  The first stops after a step of each phase and saves; the second restores and goes
  one step further. Batches and phases are cut down to that, and the rates with the
  batch; all else is the config's, but for ImageNet's weights, which are not downloaded.

  Raises:
    errors.UsageError: Several workers, whose temporary folders would differ; or the
      config's own batch does not divide over these replicas.
  """
  if settings.strategy == "multiworker":
    raise errors.UsageError(
      "--dry_run needs --strategy=one or mirrored; a cluster is tried with two workers "
      "of launch/local.py and --stop_after_steps=2."
    )
  share = BatchShard(settings.global_batch, 0, 1, num_replicas).batch
  train_step.micro_batch(settings, num_replicas)
  with tempfile.TemporaryDirectory(prefix="facedist-dry-run-") as scratch:
    act = _cut_down(settings, num_replicas, scratch)
    noise.write_noise_shards(
      str(act.data_dir),
      num_identities=IDENTITIES,
      images_per_identity=act.global_batch,
      val_images_per_identity=1,
      image_size=IMAGE_SIZE,
      num_shards=1,
      seed=settings.seed,
    )
    images = act.global_batch // num_replicas
    logging.info("dry run: %d images a replica stand for %d", images, share)
    first = dataclasses.replace(act, stop_after_steps=1)
    yield first, dataclasses.replace(act, stop_after_steps=2)


def _cut_down(settings: TrainConfig, num_replicas: int, scratch: str) -> TrainConfig:
  """Returns the config with the smallest batches and phases that have all of its parts.

  Args:
    settings: As they were given.
    num_replicas: That the batch is for.
    scratch: Folder for shards and workdir.
  """
  compares = settings.sampler == "identities"  # which takes two images of each
  batch = IMAGES_PER_REPLICA * num_replicas * (IDENTITIES if compares else 1)
  weights = settings.backbone_weights
  return dataclasses.replace(
    settings,
    data_dir=storage.join(scratch, "shards"),
    workdir=storage.join(scratch, "run"),
    backbone_weights="none" if weights == "imagenet" else weights,
    global_batch=batch,
    rate_batch=settings.rate_batch or settings.global_batch,  # for which they are set
    accumulate_steps=min(settings.accumulate_steps, IMAGES_PER_REPLICA),
    streams=math.gcd(settings.streams, batch),
    identities_per_batch=IDENTITIES if compares else None,
    head_epochs=min(settings.head_epochs, 0.5),
    head_warmup_epochs=0.0,
    full_epochs=1.0,
    full_warmup_epochs=0.0,
    checkpoint_every_steps=1,
    log_every_steps=1,
  )


def score_dry_run(workdir: str) -> None:
  """Scores the run's last checkpoint on a random verification set, as a log line."""
  newest = checkpoints.list_checkpoints(workdir)[-1]
  network = inference.load_network(workdir, newest)
  with tempfile.TemporaryDirectory(prefix="facedist-dry-run-") as scratch:
    noise.write_noise_verification_set(
      scratch, num_pairs=8, folds=2, image_size=IMAGE_SIZE, seed=0
    )
    pairs = verification_set.load_verification_set(scratch)
    images, _ = pairs.reader.read_batch(np.arange(pairs.reader.num_records))
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
