"""What the trainer tells the failure detector, and how both name replicas.

What travels beside the metrics in every step: who wants to stop, who went wrong.

A step's all-reduce carries, behind the metrics' sums, how many replicas were asked to
stop and, for each replica, whether its part was not finite. Every worker so reads the
same numbers of the same step, and all leave the loop together without another word.
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
class HealthProblem:
  """What the health of some steps say.

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
    health.arrivals.assign_add(1)
  return tf.concat([[health.stop.read_value()], bad], axis=0)


def continues(row: tf.Tensor) -> tf.Tensor:
  """Says of summed health, float32[1 + num_replicas], whether training goes on."""
  return tf.reduce_all(row == 0.0)


def find_problem(rows: np.ndarray, is_finite: np.ndarray) -> HealthProblem:
  """Reads the health of some steps.

  Args:
    rows: float32[steps, 1 + num_replicas], summed over replicas.
    is_finite: bool[steps], whether the step's sums are as they should be.
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
"""What all workers raise alike."""


@dataclasses.dataclass(frozen=True)
class HealthMonitor:
  """This worker's health and the failure detector that reads them.

  Attributes:
    health: The variables that link host and graph.
    detector: Tells the peers what this worker does.
    replicas_a_worker: The same on every worker.
  """

  health: StepHealth
  detector: FailureDetector
  replicas_a_worker: int

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.detector.is_chief

  def note(self, activity: str, *, step: int) -> None:
    """Says what this worker turns to now."""
    self.detector.note(activity, step=step)

  def name_replicas(self, replicas: Iterable[int]) -> str:
    """Returns `replica 3 (worker 1)`, or several of them."""
    return ", ".join(
      f"replica {replica} (worker {replica // self.replicas_a_worker})"
      for replica in replicas
    )

  @contextlib.contextmanager
  def together(self, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Waits for all workers after the body, if it ended as they have agreed.

    One that leaves early looks like one that died, to TensorFlow and to its peers.
    """
    try:
      yield
    except AGREED:
      self._meet(strategy)
      raise
    self._meet(strategy)

  def _meet(self, strategy: tf.distribute.Strategy) -> None:
    """Waits until every worker is here."""
    self.detector.note("waiting for all workers to end")
    self.detector.finish()
    collectives.barrier(strategy)
