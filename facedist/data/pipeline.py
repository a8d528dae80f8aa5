"""Batches for training and validation, as tf.data sets that never end.

A data set here is little more than a counter: element e names a step and a replica, and
one native call reads and decodes that replica's whole batch. So there is no state to
save, and what a step holds does not depend on the number of workers.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from facedist import errors
from facedist.data import augment
from facedist.data.order import Order
from facedist.data.reader import ShardReader, aligned_empty

_DATA_ERROR = re.compile(r"DataError: (.+)")


def training_dataset(
  reader: ShardReader,
  order: Order,
  *,
  seed: int,
  start_step: int = 0,
  worker: int = 0,
  num_workers: int = 1,
  local_replicas: int = 1,
  num_threads: int = 2,
) -> tf.data.Dataset:
  """Returns the endless set of one worker's replica batches.

  Element e is step start_step + e // local_replicas of the worker's replica
  e % local_replicas; the replicas of all workers share the global batch evenly, in
  contiguous slices. Use it with `strategy.distribute_datasets_from_function`.

  Args:
    reader: The shards of the split.
    order: Which records make up which step.
    seed: Of the augmentation's draws.
    start_step: First step, 0 or where a checkpoint left off.
    worker: This worker's number, from 0.
    num_workers: Workers of the cluster.
    local_replicas: Replicas of each worker.
    num_threads: Threads that read and decode.

  Returns:
    Dicts of image uint8[batch, size, size, 3] RGB, label int32[batch], record
    int64[batch] and draws float32[batch, augment.NUM_DRAWS], where batch is the
    replica's.

  Raises:
    errors.UsageError: The global batch does not divide over the replicas.
  """
  batch = replica_batch(
    order.global_batch, num_workers=num_workers, local_replicas=local_replicas
  )

  def load(element: np.ndarray) -> tuple[np.ndarray, ...]:
    step, replica = divmod(int(element), local_replicas)
    start = (worker * local_replicas + replica) * batch
    samples = order.slice_at(start_step + step, start, start + batch)
    images, labels = reader.read_batch(samples.records)
    draws = augment.draws(seed, samples.records, samples.epochs)
    return images, labels, samples.records, draws

  signature = {
    "image": _image_spec(reader, batch),
    "label": tf.TensorSpec([batch], tf.int32),
    "record": tf.TensorSpec([batch], tf.int64),
    "draws": tf.TensorSpec([batch, augment.NUM_DRAWS], tf.float32),
  }
  return _dataset(load, signature, ahead=local_replicas, num_threads=num_threads)


def evaluation_dataset(
  reader: ShardReader,
  *,
  global_batch: int,
  worker: int = 0,
  num_workers: int = 1,
  local_replicas: int = 1,
  num_threads: int = 2,
) -> tuple[tf.data.Dataset, int]:
  """Returns one worker's replica batches in record order, and the number of steps.

  Elements are placed as in `training_dataset`. After the last record come black images
  of weight 0, without end, so that all workers take the same number of steps.

  Returns:
    Dicts of image uint8[batch, size, size, 3] RGB, label int32[batch] and weight
    float32[batch], 1 for a record and 0 for padding; and the steps that hold every
    record once.

  Raises:
    errors.UsageError: The global batch does not divide over the replicas.
  """
  batch = replica_batch(
    global_batch, num_workers=num_workers, local_replicas=local_replicas
  )

  def load(element: np.ndarray) -> tuple[np.ndarray, ...]:
    step, replica = divmod(int(element), local_replicas)
    start = step * global_batch + (worker * local_replicas + replica) * batch
    ids = np.arange(start, min(start + batch, reader.num_records))
    images, labels = reader.read_batch(ids)
    padding = batch - len(ids)
    if padding:
      unpadded, images = images, aligned_empty((batch, *images.shape[1:]))
      images[: len(ids)], images[len(ids) :] = unpadded, 0
    weights = (np.arange(batch) < len(ids)).astype(np.float32)
    return images, np.pad(labels, (0, padding)), weights

  signature = {
    "image": _image_spec(reader, batch),
    "label": tf.TensorSpec([batch], tf.int32),
    "weight": tf.TensorSpec([batch], tf.float32),
  }
  num_steps = -(-reader.num_records // global_batch)
  return (
    _dataset(load, signature, ahead=local_replicas, num_threads=num_threads),
    num_steps,
  )


def replica_batch(global_batch: int, *, num_workers: int, local_replicas: int) -> int:
  """Returns the batch of one replica.

  Raises:
    errors.UsageError: The global batch does not divide over the replicas.
  """
  replicas = num_workers * local_replicas
  if global_batch % replicas:
    nearest = max(1, round(global_batch / replicas)) * replicas
    raise errors.UsageError(
      f"--global_batch={global_batch} does not divide over {replicas} replicas "
      f"({num_workers} workers x {local_replicas}); try --global_batch={nearest}."
    )
  return global_batch // replicas


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
  """Turns TensorFlow's error about bad input back into the DataError behind it.

  Python exceptions inside a data set reach its consumer as `tf.errors.UnknownError`
  with the text of the traceback. Any other error passes as it is.

  Raises:
    errors.DataError: The body failed because a data set of this module met one.
  """
  try:
    yield
  except tf.errors.OpError as error:
    if found := _DATA_ERROR.search(error.message or ""):
      raise errors.DataError(found[1]) from error
    raise


def _image_spec(reader: ShardReader, batch: int) -> tf.TensorSpec:
  """Returns the spec of a batch of the reader's images."""
  return tf.TensorSpec([batch, reader.image_size, reader.image_size, 3], tf.uint8)


def _dataset(
  load: Callable[[np.ndarray], tuple[np.ndarray, ...]],
  signature: dict[str, tf.TensorSpec],
  *,
  ahead: int,
  num_threads: int,
) -> tf.data.Dataset:
  """Maps the element numbers 0, 1, … through `load`, in threads but in order."""

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
