"""Sums gradients over replicas, and exchanges small values between workers."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from facedist.distributed import strategies

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


class Gradients(NamedTuple):
  """Gradients by the trained variables, grouped by how replicas hold the variables.

  Attributes:
    head: By the mirrored variables of the head group.
    backbone: By the mirrored variables of the backbone; empty while it is frozen.
    own: By the class weights that this replica alone holds. Their gradients already
      cover the global batch.
  """

  head: list[Gradient]
  backbone: list[Gradient]
  own: list[Gradient]

  @property
  def mirrored(self) -> list[Gradient]:
    """Those that are summed over replicas: the head's, then the backbone's."""
    return [*self.head, *self.backbone]

  def flat(self) -> list[Gradient]:
    """All of them, in the order of the fields."""
    return [*self.head, *self.backbone, *self.own]


def sum_gradients(
  gradients: Gradients, values: Sequence[tf.Tensor], *, norm: tf.Tensor
) -> tuple[Gradients, list[tf.Tensor], tf.Tensor]:
  """Sums one replica's gradients and values over replicas; call in replica context.

  Args:
    gradients: Of this replica's part of the loss.
    values: float32 vectors of static length. They are packed into one tensor of the
      same all-reduce, so they cost no collective of their own.
    norm: float32[], the global norm of this replica's gradients.

  Returns:
    The summed gradients, the summed values in the order given, and float32[], the
    global norm of the summed gradients, those of all replicas' own variables included.
  """
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync == 1:
    return gradients, list(values), norm
  own = gradients.own
  own_squares = tf.square(tf.linalg.global_norm(own)) if own else tf.zeros([])
  packed = tf.concat([*values, [own_squares]], axis=0)
  # The last layers' gradients are ready first, so they are sent first.
  packed, *reduced = context.all_reduce(
    tf.distribute.ReduceOp.SUM, [packed, *gradients.backbone, *gradients.head]
  )
  split = len(gradients.backbone)
  summed = Gradients(head=reduced[split:], backbone=reduced[:split], own=own)
  total = tf.linalg.global_norm(summed.mirrored)
  sizes = [value.shape[0] for value in values]
  *unpacked, own_squares = tf.split(packed, [*sizes, 1])
  if own:
    total = tf.sqrt(tf.square(total) + own_squares[0])
  return summed, unpacked, total


def barrier(strategy: tf.distribute.Strategy) -> None:
  """Waits until every worker has called this as often. A collective."""
  ones = strategy.experimental_distribute_values_from_function(lambda _: tf.ones([]))
  strategy.reduce("SUM", ones, axis=None).numpy()


def gather_from_workers(
  strategy: tf.distribute.Strategy, values: Sequence[int]
) -> np.ndarray:
  """Returns the values of every worker, on every worker. A collective.

  Args:
    strategy: Of all workers.
    values: This worker's; as many as any other's.

  Returns:
    int64[workers, values].
  """
  each = strategies.local_replicas(strategy)
  num_workers = strategy.num_replicas_in_sync // each

  def contribution(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
    worker, local = divmod(context.replica_id_in_sync_group, each)
    rows = np.zeros((num_workers, len(values)), np.int64)
    if local == 0:
      rows[worker] = values
    return tf.constant(rows)

  shared = strategy.experimental_distribute_values_from_function(contribution)
  return np.asarray(strategy.reduce("SUM", shared, axis=None).numpy())


def broadcast_from_chief(
  strategy: tf.distribute.Strategy, values: Sequence[int], *, is_chief: bool
) -> list[int]:
  """Returns the chief's values, on every worker. A collective.

  Args:
    strategy: Of all workers.
    values: The chief's; the other workers' are ignored, but there must be as many.
    is_chief: Whether this worker is the chief.
  """
  sent = values if is_chief else [0] * len(values)
  return [int(value) for value in gather_from_workers(strategy, sent).sum(axis=0)]
