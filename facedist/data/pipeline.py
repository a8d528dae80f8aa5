"""Batches for training and validation, as infinite tf.data sets.

A data set is a counter that is mapped to batches: element e is the batch of one replica
in one step, of replica e % local_replicas of this worker in step start_step + e //
local_replicas. One Python call reads and decodes all of it, so there is no state to
save. The global batch is divided into equal contiguous slices over the replicas of all
workers, so the samples of a step do not depend on the number of workers. Use the sets
with `strategy.distribute_datasets_from_function`. Because they are infinite, a
distributed iterator need not ask after every step whether all workers have data.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from facedist import errors
from facedist.data import augment
from facedist.data.readers.bad_records import BadRecordReplacer
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler

_PLANNED_SAMPLES = 2048

Load = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""Reads and decodes the batch of an element."""


class LoadErrors:
  """Keeps the exceptions of the threads that load batches, to raise them again.

  TensorFlow turns a Python exception inside a data set into a
  `tf.errors.UnknownError`, which loses its class and so its exit code.
  """

  def __init__(self) -> None:
    self._data_sets: list[dict[int, Exception]] = []  # by element

  def keep(self, load: Load) -> Load:
    """Wraps the `load` of one data set so that its exceptions are kept."""
    raised: dict[int, Exception] = {}
    self._data_sets.append(raised)

    def keeping(element: np.ndarray) -> tuple[np.ndarray, ...]:
      try:
        return load(element)
      except Exception as error:
        raised[int(element)] = error
        raise

    return keeping

  @contextlib.contextmanager
  def reraised(self) -> Iterator[None]:
    """Replaces an `UnknownError` of the body by the exception that a load raised.

    Any other error is unchanged.

    Raises:
      errors.FacedistError: A load raised it.
    """
    try:
      yield
    except tf.errors.UnknownError as error:
      # Elements are consumed in order, so the first failed element raised this error.
      first = (failed[min(failed)] for failed in reversed(self._data_sets) if failed)
      raised = next(first, None)
      if not isinstance(raised, errors.FacedistError):
        raise
      raise raised from error


def training_dataset(
  reader: RecordReader,
  sampler: EpochSampler,
  *,
  seed: int,
  start_step: int = 0,
  worker: int = 0,
  num_workers: int = 1,
  local_replicas: int = 1,
  num_threads: int = 2,
  on_bad_record: str = "fail",
  reached: Callable[[int], None] | None = None,
  end_step: int | None = None,
  load_errors: LoadErrors | None = None,
) -> tf.data.Dataset:
  """Returns one worker's replica batches of training, from `start_step` on.

  Args:
    reader, sampler: The shards, and which records make up which step.
    seed: Of the augmentation's draws and of replacements for corrupt records.
    start_step: First step: 0, or that of a checkpoint.
    worker: This worker's number, from 0; each has `local_replicas`.
    num_threads: Threads that read and decode.
    on_bad_record: 'fail', or 'skip' to replace a corrupt record by another.
    reached: Called with each step before its records are read.
    end_step: Where training ends; nothing past it is prefetched.
    load_errors: Keeps the exceptions of the loading threads.

  Returns:
    Dicts of image uint8[batch, size, size, 3] RGB, label int32[batch], damaged
    float32[batch], 1 where the record replaces a corrupt one, and draws
    float32[batch, augment.NUM_DRAWS].

  Raises:
    errors.UsageError: The global batch does not divide over the replicas, or the reader
      cannot prefetch in this sampler's order.
  """
  batch_shard = BatchShard(sampler.global_batch, worker, num_workers, local_replicas)
  first_element = start_step * local_replicas
  plan = functools.lru_cache(maxsize=4)(
    functools.partial(_plan, sampler, batch_shard, seed)
  )
  planned = -(-_PLANNED_SAMPLES // batch_shard.batch)
  prefetcher = reader.shards.prefetcher(
    sampler, batch_shard, first_step=start_step, end_step=end_step
  )
  replacer = BadRecordReplacer(
    reader, seed=seed, on_bad_record=on_bad_record, siblings=sampler.siblings
  )

  def load(element: np.ndarray) -> tuple[np.ndarray, ...]:
    number = first_element + int(element)
    if reached is not None:
      reached(number // local_replicas)
    block, place = divmod(number, planned)
    # Copies, because TensorFlow may write into its inputs, and the plan is cached.
    wanted, epochs, draws = (part[place].copy() for part in plan(block, planned))
    positions = batch_shard.positions(np.array([number]))[0]
    with prefetcher.batch(positions, wanted) as records:
      images, labels, _, damaged = replacer.read_batch(wanted, epochs, records)
    return images, labels, damaged, draws

  signature = _signature(reader, batch_shard.batch)
  signature["damaged"] = tf.TensorSpec([batch_shard.batch], tf.float32)
  signature["draws"] = tf.TensorSpec([batch_shard.batch, augment.NUM_DRAWS], tf.float32)
  return _dataset(
    load,
    signature,
    load_errors=load_errors,
    ahead=local_replicas,
    num_threads=num_threads,
  )


def evaluation_dataset(
  reader: RecordReader,
  *,
  global_batch: int,
  worker: int = 0,
  num_workers: int = 1,
  local_replicas: int = 1,
  num_threads: int = 2,
  on_bad_record: str = "fail",
  load_errors: LoadErrors | None = None,
) -> tuple[tf.data.Dataset, int]:
  """Returns one worker's replica batches in record order, and the number of steps.

  The last record is followed by black images of weight 0, without end, so that all
  workers can take the same number of steps. A skipped corrupt record has weight 0 too.

  Returns:
    Dicts of image uint8[batch, size, size, 3] RGB, label int32[batch], damaged
    float32[batch], 1 for a record that was skipped, and weight float32[batch], 1 for a
    record that counts, else 0; and the number of steps that hold every record once.

  Raises:
    errors.UsageError: The global batch does not divide over the replicas.
  """
  batch_shard = BatchShard(global_batch, worker, num_workers, local_replicas)
  replacer = BadRecordReplacer(reader, seed=0, on_bad_record=on_bad_record)

  def load(element: np.ndarray) -> tuple[np.ndarray, ...]:
    start = int(batch_shard.starts(element))
    ids = np.arange(start, min(start + batch_shard.batch, reader.num_records))
    images, labels, _, damaged = replacer.read_batch(ids, np.zeros_like(ids))
    padding = batch_shard.batch - len(ids)
    if padding:
      unpadded = images
      images = reader.memory.empty((batch_shard.batch, *unpadded.shape[1:]))
      images[: len(ids)], images[len(ids) :] = unpadded, 0
    labels, damaged, weights = (
      np.pad(part, (0, padding)) for part in (labels, damaged, 1 - damaged)
    )
    return images, labels, damaged, weights

  signature = _signature(reader, batch_shard.batch)
  signature["damaged"] = tf.TensorSpec([batch_shard.batch], tf.float32)
  signature["weight"] = tf.TensorSpec([batch_shard.batch], tf.float32)
  dataset = _dataset(
    load,
    signature,
    load_errors=load_errors,
    ahead=local_replicas,
    num_threads=num_threads,
  )
  return dataset, -(-reader.num_records // global_batch)


def _plan(
  sampler: EpochSampler, batch_shard: BatchShard, seed: int, block: int, ahead: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the samples and the draws of elements [block·ahead, (block + 1)·ahead).

  Many at once, because a call on short arrays takes as long as one on long arrays.

  Returns:
    int64[ahead, batch] records, int64[ahead, batch] epochs and float32[ahead, batch,
    augment.NUM_DRAWS].
  """
  positions = batch_shard.positions(np.arange(block * ahead, (block + 1) * ahead))
  samples = sampler.samples_at(positions.ravel())
  draws = augment.draws(seed, samples.records, samples.epochs)
  return (
    samples.records.reshape(positions.shape),
    samples.epochs.reshape(positions.shape),
    draws.reshape(*positions.shape, augment.NUM_DRAWS),
  )


def _signature(reader: RecordReader, batch: int) -> dict[str, tf.TensorSpec]:
  """Returns the specs of the features that all data sets have."""
  size = reader.image_size
  return {
    "image": tf.TensorSpec([batch, size, size, 3], tf.uint8),
    "label": tf.TensorSpec([batch], tf.int32),
  }


def _dataset(
  load: Load,
  signature: dict[str, tf.TensorSpec],
  *,
  load_errors: LoadErrors | None,
  ahead: int,
  num_threads: int,
) -> tf.data.Dataset:
  """Maps the element numbers 0, 1, … through `load`, in threads but in order."""
  if load_errors is not None:
    load = load_errors.keep(load)

  @tf.autograph.experimental.do_not_convert
  def load_element(element: tf.Tensor) -> dict[str, tf.Tensor]:
    types = [spec.dtype for spec in signature.values()]
    tensors = tf.numpy_function(load, [element], types, stateful=False)
    for tensor, spec in zip(tensors, signature.values(), strict=True):
      tensor.set_shape(spec.shape)
    return dict(zip(signature, tensors, strict=True))

  options = tf.data.Options()
  options.autotune.enabled = False
  options.deterministic = True
  options.experimental_distribute.auto_shard_policy = (
    tf.data.experimental.AutoShardPolicy.OFF
  )
  options.threading.private_threadpool_size = num_threads
  return (
    tf.data.Dataset.counter()
    .map(load_element, num_parallel_calls=num_threads, deterministic=True)
    .prefetch(2 * ahead)
    .with_options(options)
  )
