"""Where a run's batches come from: shards, in the order of the steps, to replicas.

How many damaged records a run may replace: a count that all workers share.

Which records make up which batch: the order that a run's flags ask for.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
from facedist.training import schedules, train_step
from facedist.training.config import NO_HEAD, NO_LOSS, TrainConfig

_DAMAGED = train_step.COLUMNS.index("damaged")


@dataclasses.dataclass
class DamageLimit:
  """Counts the damaged records of an epoch and ends the run past a limit.

  The counts come out of the all-reduce that sums the metrics, so all workers see the
  same ones and end at the same step. Each checkpoint's marker holds the count, so that
  a run that is resumed, or goes back, counts on as if nothing had been.

  Attributes:
    most: Damaged records that an epoch may have; --max_bad_records.
    records_an_epoch: Records of the training split.
    global_batch: Samples of a step.
  """

  most: int
  records_an_epoch: int
  global_batch: int
  _epoch: int = dataclasses.field(default=0, init=False)
  _count: int = dataclasses.field(default=0, init=False)

  def marks(self) -> dict[str, int]:
    """Returns what a marker holds: an epoch, and its damaged records so far."""
    return {"epoch": self._epoch, "records": self._count}

  def go_on(self, marks: Mapping[str, int]) -> None:
    """Counts on from what a marker holds; from none where it holds nothing."""
    self._epoch, self._count = marks.get("epoch", 0), marks.get("records", 0)

  def add(self, rows: np.ndarray, *, first_step: int) -> None:
    """Counts the damaged records of some steps.

    A step that holds the end of an epoch counts to the epoch that it begins in.

    Args:
      rows: float32[steps, len(steps.COLUMNS)].
      first_step: Number of the first of these steps.

    Raises:
      errors.DataError: An epoch has more damaged records than it may have.
    """
    for place in np.flatnonzero(rows[:, _DAMAGED]):
      step = first_step + int(place)
      epoch = step * self.global_batch // self.records_an_epoch
      if epoch != self._epoch:
        self._epoch, self._count = epoch, 0
      self._count += round(float(rows[place, _DAMAGED]))
      if self._count > self.most:
        raise errors.DataError(
          f"{self._count} damaged records by step {step} of epoch {epoch} are more "
          f"than --max_bad_records={self.most}; the log of each worker names those it "
          "read. Rebuild their shards, or raise the limit."
        )


_IMAGES_OF_EACH = 4  # as in the batches of arXiv:1703.07737


def check_sampling(settings: TrainConfig) -> None:
  """Raises UsageError for flags that do not go with --sampler, or its numbers."""
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
  """Returns the order of a run over the records of its reader.

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


def _identities(settings: TrainConfig) -> int:
  """Returns how many identities a batch has."""
  if settings.identities_per_batch is None:
    return max(2, settings.global_batch // _IMAGES_OF_EACH)
  return settings.identities_per_batch


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


def build_inputs(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  cluster: Cluster,
  data: StagedSet,
  train_reader: RecordReader,
  load_errors: pipeline.LoadErrors,
) -> Inputs:
  """Connects the shards to the strategy's replicas."""
  share = {"worker": cluster.index, "num_workers": cluster.num_workers}
  split = share | _of_worker(settings, strategy) | {"load_errors": load_errors}
  records = train_reader.num_records
  sample_order = make_sampler(settings, train_reader)
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


def open_dataset(
  settings: TrainConfig,
) -> StagedSet:
  """Opens the run's shards: to be brought here, or read where they are."""
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
  """Opens a split for reading; its shards need not be there yet."""
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


def _last_batch(settings: TrainConfig, num_records: int) -> int | None:
  """Returns the batch before which training ends; none if it may pass over some."""
  if settings.on_nan == "rewind":
    return None
  end = schedules.plan_phases(settings, num_records)[-1].end_step
  return min(end, settings.stop_after_steps or end)


def _name_records(
  split: manifest.Split,
  sample_order: epoch_sampler.EpochSampler,
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
  return manifest.name_records(split, np.concatenate(ids))


def _validation(
  settings: TrainConfig,
  data: StagedSet,
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
      "no validation: what it measures needs class weights, and --head=none has none"
    )
    return None, 0
  return pipeline.evaluation_dataset(
    open_split(settings, data, "val"), global_batch=settings.global_batch, **split
  )
