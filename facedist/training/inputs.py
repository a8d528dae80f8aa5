"""Builds a run's input: opens its shards, orders the records, distributes the batches.

`build_inputs` connects the shards to the replicas of the strategy, `make_sampler`
chooses the records of each batch, and `BadRecordLimit` ends a run that had to replace
too many bad records.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors
from facedist.data import pipeline
from facedist.data.cache import staged_dataset
from facedist.data.cache.staged_dataset import StagedSet
from facedist.data.readers import local_reader, streaming_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers import block_sampler, epoch_sampler, identity_sampler
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.shards import manifest, shard_index
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.training import metrics, schedules
from facedist.training.config import NO_HEAD, NO_LOSS, TrainConfig

_DAMAGED = metrics.COLUMNS.index("damaged")


@dataclasses.dataclass
class BadRecordLimit:
  """Counts the bad records of an epoch and ends the run past a limit.

  The counts come out of the all-reduce that sums the metrics, so all workers see the
  same ones and end at the same step. Each checkpoint's marker holds the count, so that
  a run that is resumed or rewound continues it.

  Attributes:
    max_bad_records: Bad records that an epoch may have.
    records_per_epoch: Records of the training split.
    global_batch: Samples of a step.
  """

  max_bad_records: int
  records_per_epoch: int
  global_batch: int
  _epoch: int = dataclasses.field(default=0, init=False)
  _count: int = dataclasses.field(default=0, init=False)

  def state(self) -> dict[str, int]:
    """Returns what a marker holds: an epoch, and its bad records so far."""
    return {"epoch": self._epoch, "records": self._count}

  def restore(self, state: Mapping[str, int]) -> None:
    """Continues a marker's count; starts at 0 if the marker holds none."""
    self._epoch, self._count = state.get("epoch", 0), state.get("records", 0)

  def add(self, rows: np.ndarray, *, first_step: int) -> None:
    """Counts the bad records of some steps.

    A step that holds the end of an epoch counts to the epoch that it begins in.

    Args:
      rows: float32[steps, len(metrics.COLUMNS)].
      first_step: Number of the first of these steps.

    Raises:
      errors.DataError: An epoch has more bad records than it may have.
    """
    for place in np.flatnonzero(rows[:, _DAMAGED]):
      step = first_step + int(place)
      epoch = step * self.global_batch // self.records_per_epoch
      if epoch != self._epoch:
        self._epoch, self._count = epoch, 0
      self._count += round(float(rows[place, _DAMAGED]))
      if self._count > self.max_bad_records:
        raise errors.DataError(
          f"{self._count} damaged records by step {step} of epoch {epoch} are more "
          f"than --max_bad_records={self.max_bad_records}; the log of each worker "
          "names those it read. Rebuild their shards, or raise the limit."
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Where batches come from, already distributed over the strategy's replicas.

  Attributes:
    training: First batch -> iterator over the batches from that number on, endless.
    validation: -> iterator over a validation pass; None if there is no split val.
    validation_batches: Batches of a validation pass.
    bad_records: Counts the bad records that training replaces.
    name_records: (batch, replicas) -> the names of the records that they got of it.
  """

  training: Callable[[int], Iterator]
  validation: Callable[[], Iterator] | None
  validation_batches: int
  bad_records: BadRecordLimit
  name_records: Callable[[int, tuple[int, ...]], str]


def build_inputs(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  cluster: Cluster,
  data: StagedSet,
  train_reader: RecordReader,
  load_errors: pipeline.LoadErrors,
) -> Inputs:
  """Connects the shards to the strategy's replicas."""
  worker = {"worker": cluster.index, "num_workers": cluster.num_workers}
  split = worker | _reading(settings, strategy) | {"load_errors": load_errors}
  records = train_reader.num_records
  sampler = make_sampler(settings, train_reader)
  distribute = functools.partial(_distribute, strategy)

  def training(first_step: int) -> Iterator:
    data.follow("train", sampler, start_step=first_step, **worker)
    return distribute(
      pipeline.training_dataset(
        train_reader,
        sampler,
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
    bad_records=BadRecordLimit(
      settings.max_bad_records, records, settings.global_batch
    ),
    name_records=functools.partial(
      _name_records,
      train_reader.manifest.split("train", train_reader.folder),
      sampler,
      strategy.num_replicas_in_sync,
    ),
  )


def _validation(
  settings: TrainConfig,
  data: StagedSet,
  train_reader: RecordReader,
  split: dict[str, Any],
) -> tuple[tf.data.Dataset | None, int]:
  """Opens the split val: its batches, and how many; None where validation is off.

  Args:
    settings: The run's.
    data: Its shards.
    train_reader: Of the split train.
    split: The arguments of `pipeline` that divide the batches among workers.
  """
  if "val" not in train_reader.manifest.splits:
    return None, 0
  if settings.head == NO_HEAD:
    logging.info(
      "no validation: what it measures needs class weights, and --head=none has none"
    )
    return None, 0
  return pipeline.evaluation_dataset(
    open_split(settings, data, "val"), global_batch=settings.global_batch, **split
  )


def _reading(settings: TrainConfig, strategy: tf.distribute.Strategy) -> dict[str, Any]:
  """Returns how this worker reads, for training and validation alike."""
  return {
    "local_replicas": strategies.local_replicas(strategy),
    "num_threads": settings.input_threads or os.cpu_count() or 1,
    "on_bad_record": settings.on_bad_record,
  }


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


def _last_batch(settings: TrainConfig, num_records: int) -> int | None:
  """Returns the batch before which training ends; None if a rewind may skip some."""
  if settings.on_nan == "rewind":
    return None
  end = schedules.plan_phases(settings, num_records)[-1].end_step
  return min(end, settings.stop_after_steps or end)


def _name_records(
  split: manifest.Split,
  sampler: epoch_sampler.EpochSampler,
  num_replicas: int,
  batch: int,
  replicas: tuple[int, ...],
) -> str:
  """Names the records of a batch that some replicas got; of all if none is given."""
  size = sampler.global_batch // num_replicas
  ids = [
    sampler.slice_at(batch, place * size, (place + 1) * size).records
    for place in replicas or range(num_replicas)
  ]
  return manifest.name_records(split, np.concatenate(ids))


def open_dataset(
  settings: TrainConfig,
) -> StagedSet:
  """Opens the run's shards, to be staged on a local disk or streamed."""
  folder = str(settings.data_dir)
  if settings.read_mode == "stream":
    return StagedSet(folder, cache=None)
  return staged_dataset.open_set(
    folder,
    settings.cache_dir,
    cache_gb=settings.cache_gb,
    accept_corrupt=settings.on_bad_record == "skip" and settings.verify_crc,
  )


def open_split(
  settings: TrainConfig,
  data: StagedSet,
  split: str,
) -> RecordReader:
  """Opens a split for reading; its shards need not be staged yet."""
  if settings.read_mode == "stream":
    return streaming_reader.open_reader(
      data.folder,
      split,
      verify_crc=settings.verify_crc,
      memory_mb=settings.stream_memory_mb,
      requests=settings.stream_requests,
    )
  return local_reader.open_reader(
    data.folder, split, verify_crc=settings.verify_crc, files=data.files(split)
  )


def _identities(settings: TrainConfig) -> int:
  """Returns --identities_per_batch, which `resolve` has set."""
  return cast(int, settings.identities_per_batch)


def check_sampling(settings: TrainConfig) -> None:
  """Raises UsageError for flags that do not fit --sampler or each other."""
  if settings.sampler != "identities":
    if settings.identities_per_batch is not None:
      raise errors.UsageError(
        f"--identities_per_batch={settings.identities_per_batch} is for "
        "--sampler=identities alone; give both or none."
      )
    if settings.shuffle_block > 1:
      block_sampler.check_streams(settings.global_batch, settings.streams)
    return
  identity_sampler.count_images(settings.global_batch, _identities(settings))
  if settings.read_mode == "stream" or settings.shuffle_block > 1:
    raise errors.UsageError(
      f"--read_mode={settings.read_mode} --shuffle_block={settings.shuffle_block} read "
      "neighbouring records together, and --sampler=identities picks single ones from "
      "everywhere; take --read_mode=stage --shuffle_block=1."
    )


def make_sampler(settings: TrainConfig, train_reader: RecordReader) -> EpochSampler:
  """Returns the sampler that the flags ask for, over the records of a reader.

  Raises:
    errors.UsageError: The flags contradict each other or the data.
    errors.DataError: The labels cannot be read.
  """
  check_sampling(settings)
  if settings.sampler != "identities":
    return block_sampler.make_block_sampler(
      train_reader.num_records,
      settings.global_batch,
      settings.seed,
      shuffle_block=settings.shuffle_block,
      streams=settings.streams,
      window_blocks=settings.shuffle_window,
    )
  identities = identity_sampler.IdentitySampler(
    train_reader.num_records,
    settings.global_batch,
    settings.seed,
    _identities(settings),
    identity_sampler.group(train_reader.labels()),
  )
  logging.info(
    "sampler: %d identities x %d images a batch; each of %d identities comes once in "
    "%d steps",
    identities.identities_per_batch,
    identities.images_of_each,
    identities.groups.num_identities,
    identities.steps_a_round,
  )
  return identities


def check_train_set(settings: TrainConfig, content: manifest.Manifest) -> list[str]:
  """Refuses a training set without anything to learn from.

  Returns:
    What is unusual about the set, a sentence each; for a warning.

  Raises:
    errors.DataError: It has fewer than two identities, or --metric_loss is to compare
      images of one identity and no identity has two.
  """
  folder = str(settings.data_dir)
  train = content.split("train", folder)
  records, identities = train.records, content.num_identities
  if identities < 2:
    raise errors.DataError(
      f"--data_dir={folder} has {identities} identity, and a network learns to tell "
      "identities apart: its loss would be 0 from the start. Give data of two "
      "identities or more."
    )
  # With more images than identities, some identity has two; no label need be read.
  if settings.metric_loss != NO_LOSS and records <= identities:
    labels = shard_index.labels(folder, train.shards, num_identities=identities)
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
