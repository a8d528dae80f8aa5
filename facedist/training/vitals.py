"""What travels beside the metrics in every step: who wants to stop, who went wrong.

A step's all-reduce carries, behind the metrics' sums, how many replicas were asked to
stop and, for each replica, whether its part was not finite. Every worker so reads the
same numbers of the same step, and all leave the loop together without another word.
"""

import dataclasses

import numpy as np
import tensorflow as tf


class Vitals:
  """This worker's two plain variables, the one link between its host and its graph.

  They are made outside the strategy's scope, so each worker has its own: `stop` is
  set by the host and read in every step, `arrivals` counts the gradients that this
  worker's replicas have computed and is read by the host while the graph runs.
  """

  def __init__(self) -> None:
    with tf.device("CPU:0"):
      self.stop = tf.Variable(0.0, trainable=False, name="stop")
      self.arrivals = tf.Variable(0, trainable=False, dtype=tf.int64, name="arrivals")

  def request_stop(self) -> None:
    """Makes all workers leave the loop after the step they are in or the next."""
    self.stop.assign(1.0)

  def count_arrivals(self) -> int:
    """Returns the number of gradients that this worker's replicas have computed."""
    return int(self.arrivals.numpy())


@dataclasses.dataclass(frozen=True)
class Finding:
  """What the vitals of some steps say.

  Attributes:
    stop: Whether a worker was asked to stop.
    bad_step: First step, counted from that of the first row, with a loss or gradient
      that is not finite; none if all are.
    bad_replicas: The replicas that it came from; empty where none was bad by itself
      and the sum overflowed.
  """

  stop: bool
  bad_step: int | None
  bad_replicas: tuple[int, ...]


def local(
  vitals: Vitals,
  *,
  gradient_norm: tf.Tensor,
  losses: tf.Tensor,
  may_overflow: tf.Tensor,
) -> tf.Tensor:
  """Returns one replica's float32[1 + num_replicas], to be summed over all.

  Args:
    vitals: The worker's.
    gradient_norm: float32[], of this replica's gradients alone, before they are summed.
    losses: float32[batch] of this replica.
    may_overflow: bool[], whether loss scaling mends a gradient that is not finite.
  """
  context = tf.distribute.get_replica_context()
  is_finite = tf.math.is_finite(gradient_norm) | may_overflow
  is_finite &= tf.reduce_all(tf.math.is_finite(losses))
  place = tf.cast(context.replica_id_in_sync_group, tf.int32)
  bad = tf.one_hot(place, context.num_replicas_in_sync) * tf.cast(
    ~is_finite, tf.float32
  )
  with tf.control_dependencies([is_finite]):
    vitals.arrivals.assign_add(1)
  return tf.concat([[vitals.stop.read_value()], bad], axis=0)


def goes_on(row: tf.Tensor) -> tf.Tensor:
  """Says of summed vitals, float32[1 + num_replicas], whether training goes on."""
  return tf.reduce_all(row == 0.0)


def find(rows: np.ndarray, is_finite: np.ndarray) -> Finding:
  """Reads the vitals of some steps.

  Args:
    rows: float32[steps, 1 + num_replicas], summed over replicas.
    is_finite: bool[steps], whether the step's sums are as they should be.
  """
  bad = np.flatnonzero(rows[:, 1:].any(axis=1) | ~is_finite)
  if not len(bad):
    return Finding(bool(rows[:, 0].any()), None, ())
  replicas = np.flatnonzero(rows[bad[0], 1:])
  return Finding(False, int(bad[0]), tuple(replicas.tolist()))
