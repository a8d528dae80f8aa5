"""Puts the batches of all workers of a cluster together."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from facedist.data import pipeline
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.epoch_sampler import EpochSampler

Batch = dict[str, np.ndarray]


def global_batches(
  dataset_of: Callable[[int], tf.data.Dataset],
  count: int,
  *,
  num_workers: int,
  local_replicas: int,
) -> list[Batch]:
  """Returns the global batches of `count` steps from the data set of each worker."""
  parts = [
    list(dataset_of(worker).take(count * local_replicas).as_numpy_iterator())
    for worker in range(num_workers)
  ]
  return [
    joined(
      element
      for of_worker in parts
      for element in of_worker[step * local_replicas :][:local_replicas]
    )
    for step in range(count)
  ]


def training_steps(
  reader: RecordReader,
  sampler: EpochSampler,
  count: int,
  *,
  start_step: int = 0,
  num_workers: int = 1,
  local_replicas: int = 1,
  **options: int | str,
) -> list[Batch]:
  """Returns the global batches of `count` steps of training."""

  def dataset_of(worker: int) -> tf.data.Dataset:
    return pipeline.training_dataset(
      reader,
      sampler,
      seed=2,
      start_step=start_step,
      end_step=start_step + count,
      worker=worker,
      num_workers=num_workers,
      local_replicas=local_replicas,
      **options,
    )

  return global_batches(
    dataset_of, count, num_workers=num_workers, local_replicas=local_replicas
  )


def joined(parts: Iterable[Batch]) -> Batch:
  """Returns one batch of the samples of several."""
  parts = list(parts)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
  """Compares all features of all batches."""
  for ours, theirs in zip(first, second, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
