"""Health flags of each step: was a worker asked to stop, and is every replica finite.

A step's all-reduce carries, behind the sums of the metrics, the number of replicas that
were asked to stop and, for each replica, a flag that its own part was not finite. Every
worker reads the same flags of the same step, so all of them leave the loop together.
`HealthMonitor` passes the progress of a worker to the failure detector.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from facedist import errors
from facedist.distributed import collectives
from facedist.distributed.failure_detector import FailureDetector


class StepHealth:
  """Two variables through which this worker's host and its graph communicate.

  They are made outside the strategy's scope, so each worker has its own. The host sets
  `stop`, and every step reads it. `arrivals` counts the gradients that this worker's
  replicas have computed; the host reads it while the graph runs.
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
class HealthProblem:
  """What the health flags of some steps report.

  Attributes:
    stop: Whether a worker was asked to stop.
    bad_step: First step with a loss or gradient that is not finite, counted from that
      of the first row; None if all are finite.
    bad_replicas: The replicas that it came from; empty if only the sum over replicas
      was not finite.
  """

  stop: bool
  bad_step: int | None
  bad_replicas: tuple[int, ...]


def local_flags(
  health: StepHealth,
  *,
  gradient_norm: tf.Tensor,
  losses: tf.Tensor,
  may_overflow: tf.Tensor,
) -> tf.Tensor:
  """Returns one replica's float32[1 + num_replicas], to be summed over all.

  Args:
    health: The worker's.
    gradient_norm: float32[], of this replica's gradients alone, before they are summed.
    losses: float32[batch] of this replica.
    may_overflow: bool[], whether loss scaling skips a gradient that is not finite.
  """
  context = tf.distribute.get_replica_context()
  is_finite = tf.math.is_finite(gradient_norm) | may_overflow
  is_finite &= tf.reduce_all(tf.math.is_finite(losses))
  place = tf.cast(context.replica_id_in_sync_group, tf.int32)
  bad = tf.one_hot(place, context.num_replicas_in_sync) * tf.cast(
    ~is_finite, tf.float32
  )
  with tf.control_dependencies([is_finite]):
    health.arrivals.assign_add(1)
  return tf.concat([[health.stop.read_value()], bad], axis=0)


def continues(row: tf.Tensor) -> tf.Tensor:
  """Returns bool[]: may training continue; takes summed float32[1 + num_replicas]."""
  return tf.reduce_all(row == 0.0)


def find_problem(rows: np.ndarray, is_finite: np.ndarray) -> HealthProblem:
  """Reads the health flags of some steps.

  Args:
    rows: float32[steps, 1 + num_replicas], summed over replicas.
    is_finite: bool[steps], whether the sums of each step are finite.
  """
  bad = np.flatnonzero(rows[:, 1:].any(axis=1) | ~is_finite)
  if not len(bad):
    return HealthProblem(bool(rows[:, 0].any()), None, ())
  replicas = np.flatnonzero(rows[bad[0], 1:])
  return HealthProblem(False, int(bad[0]), tuple(replicas.tolist()))


AGREED = (
  errors.DifferentError,
  errors.DivergedError,
  errors.PreemptedError,
)
"""Errors that all workers raise together."""


@dataclasses.dataclass(frozen=True)
class HealthMonitor:
  """Reports what this worker does to its failure detector.

  Attributes:
    health: This worker's variables.
    detector: Its failure detector, which tells the other workers.
    replicas_a_worker: Replicas of each worker.
  """

  health: StepHealth
  detector: FailureDetector
  replicas_a_worker: int

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.detector.is_chief

  def note(self, activity: str, *, step: int) -> None:
    """Reports what this worker does from now on."""
    self.detector.note(activity, step=step)

  def name_replicas(self, replicas: Iterable[int]) -> str:
    """Returns `replica 3 (worker 1)`, or several of them."""
    return ", ".join(
      f"replica {replica} (worker {replica // self.replicas_a_worker})"
      for replica in replicas
    )

  @contextlib.contextmanager
  def together(self, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Waits for all workers after the body, unless it ended with an error of its own.

    A worker that leaves early would look like one that died.
    """
    try:
      yield
    except AGREED:
      self._meet(strategy)
      raise
    self._meet(strategy)

  def _meet(self, strategy: tf.distribute.Strategy) -> None:
    """Waits until every worker has come to its end."""
    self.detector.note("waiting for all workers to end")
    self.detector.finish()
    collectives.barrier(strategy)
