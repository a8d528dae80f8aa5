"""What the trainer tells the lookout, and how both name replicas."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import tensorflow as tf

from facedist import errors, strategies
from facedist.peers.lookout import Lookout
from facedist.training.vitals import Vitals

AGREED = (
  errors.DifferentError,
  errors.DivergedError,
  errors.PreemptedError,
)
"""What all workers raise alike."""


@dataclasses.dataclass(frozen=True)
class Watch:
  """This worker's vitals and the lookout that reads them.

  Attributes:
    vitals: The variables that link host and graph.
    lookout: Tells the peers what this worker does.
    replicas_a_worker: The same on every worker.
  """

  vitals: Vitals
  lookout: Lookout
  replicas_a_worker: int

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.lookout.is_chief

  def note(self, activity: str, *, step: int) -> None:
    """Says what this worker turns to now."""
    self.lookout.note(activity, step=step)

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
    self.lookout.note("waiting for all workers to end")
    self.lookout.finish()
    strategies.barrier(strategy)
