"""Where a run's batches come from: shards, in the order of the steps, to replicas."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, strategies
from facedist.cluster import Cluster
from facedist.data import (
  indexes,
  manifest,
  naming,
  order,
  pipeline,
  reader,
  staging,
  stream_reader,
)
from facedist.data.record_reader import RecordReader
from facedist.training import phases, sampling
from facedist.training.config import TrainConfig
from facedist.training.damage_limit import DamageLimit
from facedist.training.head_settings import NO_HEAD
from facedist.training.metric_settings import NO_LOSS


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Where batches come from, already distributed over the strategy's replicas.

  Attributes:
    training: First batch -> iterator over the batches from that number on, endless.
    validation: -> iterator over a validation pass; none where there is no split.
    validation_batches: Batches of a validation pass.
    damage_limit: How many damaged records training may replace.
    name_records: (batch, replicas) -> the names of the records that they got of it.
  """

  training: Callable[[int], Iterator]
  validation: Callable[[], Iterator] | None
  validation_batches: int
  damage_limit: DamageLimit
  name_records: Callable[[int, tuple[int, ...]], str]


def build(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  crew: Cluster,
  data: staging.StagedSet | stream_reader.StreamedSet,
  train_reader: RecordReader,
) -> Inputs:
  """Connects the shards to the strategy's replicas."""
  share = {"worker": crew.index, "num_workers": crew.num_workers}
  split = share | _of_worker(settings, strategy)
  records = train_reader.num_records
  sample_order = sampling.make_order(settings, train_reader)
  distribute = functools.partial(_distribute, strategy)

  def training(first_step: int) -> Iterator:
    data.follow("train", sample_order, start_step=first_step, **share)
    return distribute(
      pipeline.training_dataset(
        train_reader,
        sample_order,
        seed=settings.seed,
        start_step=first_step,
        reached=data.reached,
        end_step=_last_batch(settings, records),
        **split,
      )
    )

  validation, num_batches = _validation(settings, data, train_reader, split)
  return Inputs(
    training=training,
    validation=None if validation is None else (lambda: distribute(validation)),
    validation_batches=num_batches,
    damage_limit=DamageLimit(settings.max_bad_records, records, settings.global_batch),
    name_records=functools.partial(
      _name_records,
      train_reader.manifest.split("train", train_reader.folder),
      sample_order,
      strategy.num_replicas_in_sync,
    ),
  )


def check_train_set(settings: TrainConfig, content: manifest.Manifest) -> list[str]:
  """Refuses a training set that teaches nothing.

  Returns:
    What is unusual about the set, a sentence each; for a warning.

  Raises:
    errors.DataError: It has fewer than two identities, or --metric_loss is to compare
      images of one identity and no identity has two.
  """
  folder = str(settings.data_dir)
  records = content.split("train", folder).records
  identities = content.num_identities
  if identities < 2:
    raise errors.DataError(
      f"--data_dir={folder} has {identities} identity, and a network learns to tell "
      "identities apart: its loss would be 0 from the start. Give data of two "
      "identities or more."
    )
  if settings.metric_loss != NO_LOSS and records <= identities:
    labels = indexes.labels(
      folder, content.split("train", folder).shards, num_identities=identities
    )
    if len(labels) == len(np.unique(labels)):
      raise errors.DataError(
        f"--metric_loss={settings.metric_loss} compares images of one identity, but "
        f"none of the {records:,} images in --data_dir={folder} shows the same "
        "identity as another; give data with two images or more an identity."
      )
  unusual = []
  if records < 2 * identities:
    unusual.append(
      f"the training split has {records:,} images of {identities:,} identities, fewer "
      "than two images an identity; margin heads learn little from that"
    )
  if records < settings.global_batch:
    unusual.append(
      f"--global_batch={settings.global_batch} is more than the {records:,} images of "
      "the training split, so a batch holds images twice"
    )
  return unusual


def _distribute(strategy: tf.distribute.Strategy, dataset: tf.data.Dataset) -> Iterator:
  """Returns an iterator over batches that lie on the strategy's replicas.

  TensorFlow's way to a device is an iterator of its own with an autotuning thread,
  which sleeps up to a minute before it lets go. A lone CPU replica has no need of it.
  """
  has_gpus = bool(tf.config.list_physical_devices("GPU"))
  if has_gpus or strategies.local_replicas(strategy) > 1:
    return iter(strategy.distribute_datasets_from_function(lambda _: dataset))
  with tf.device(strategy.extended.worker_devices[0]):
    return iter(dataset)


def _of_worker(
  settings: TrainConfig, strategy: tf.distribute.Strategy
) -> dict[str, Any]:
  """Returns how this worker reads, for training and validation alike."""
  return {
    "local_replicas": strategies.local_replicas(strategy),
    "num_threads": settings.input_threads or os.cpu_count() or 1,
    "on_bad_record": settings.on_bad_record,
  }


def open_set(settings: TrainConfig) -> staging.StagedSet | stream_reader.StreamedSet:
  """Opens the run's shards: to be brought here, or read where they are."""
  folder = str(settings.data_dir)
  if settings.read_mode == "stream":
    return stream_reader.StreamedSet(folder)
  return staging.open_set(
    folder,
    settings.cache_dir,
    cache_gb=settings.cache_gb,
    accept_damage=settings.on_bad_record == "skip" and settings.verify_crc,
  )


def open_split(
  settings: TrainConfig,
  data: staging.StagedSet | stream_reader.StreamedSet,
  split: str,
) -> RecordReader:
  """Opens a split for reading; its shards need not be there yet."""
  if isinstance(data, stream_reader.StreamedSet):
    return stream_reader.StreamReader(
      data.folder,
      split,
      verify_crc=settings.verify_crc,
      memory_mb=settings.stream_memory_mb,
      requests=settings.stream_requests,
    )
  return reader.ShardReader(
    data.folder, split, verify_crc=settings.verify_crc, files=data.files(split)
  )


def _last_batch(settings: TrainConfig, num_records: int) -> int | None:
  """Returns the batch before which training ends; none if it may pass over some."""
  if settings.on_nan == "rewind":
    return None
  end = phases.plan(settings, num_records)[-1].end_step
  return min(end, settings.stop_after_steps or end)


def _name_records(
  split: manifest.Split,
  sample_order: order.Order,
  num_replicas: int,
  batch: int,
  replicas: tuple[int, ...],
) -> str:
  """Names the records of a batch that some replicas got; none stands for all."""
  share = sample_order.global_batch // num_replicas
  ids = [
    sample_order.slice_at(batch, place * share, (place + 1) * share).records
    for place in replicas or range(num_replicas)
  ]
  return naming.name_records(split, np.concatenate(ids))


def _validation(
  settings: TrainConfig,
  data: staging.StagedSet | stream_reader.StreamedSet,
  train_reader: RecordReader,
  split: dict[str, Any],
) -> tuple[tf.data.Dataset | None, int]:
  """Opens the split val: its batches, and how many; none where there is no use of it.

  Args:
    settings: The run's.
    data: Its shards.
    train_reader: Of the split train.
    split: How `pipeline` divides the batches among workers.
  """
  if "val" not in train_reader.manifest.splits:
    return None, 0
  if settings.head == NO_HEAD:
    logging.info(
      "no validation: what it measures needs class centres, and --head=none has none"
    )
    return None, 0
  return pipeline.evaluation_dataset(
    open_split(settings, data, "val"), global_batch=settings.global_batch, **split
  )
