"""A step's batch as the replicas get it: how long it was waited for."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import tensorflow as tf

Batch: TypeAlias = Mapping[str, tf.Tensor]


def timed_next(
  iterator: Any, strategy: tf.distribute.Strategy, *, deterministic: bool
) -> tuple[Batch, tf.Tensor]:
  """Returns the next batch and float32[] seconds that the host waited for it.

  The time is not a number in deterministic runs, where TensorFlow refuses a clock.
  """
  if deterministic:
    return next(iterator), tf.constant(float("nan"))
  started = tf.timestamp()
  with tf.control_dependencies([started]):
    batch = next(iterator)
  arrived = strategy.experimental_local_results(batch["label"])
  with tf.control_dependencies(list(arrived)):
    ended = tf.timestamp()
  has_gpus = bool(tf.config.list_logical_devices("GPU"))
  if isinstance(batch["label"], tf.Tensor) and not has_gpus:
    # else a CPU's lone thread may look at the clock after the whole step
    with tf.control_dependencies([ended]):
      batch = {name: tf.identity(part) for name, part in batch.items()}
  return batch, tf.cast(ended - started, tf.float32)
