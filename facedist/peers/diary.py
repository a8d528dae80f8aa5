"""What a worker says of itself, written by any of its threads; no network."""

import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from facedist.cluster import Cluster
from facedist.peers import pulse
from facedist.peers.pulse import Pulse


class Diary:
  """This worker's own heartbeat; any thread may write into it."""

  def __init__(self, cluster: Cluster, *, facts: Mapping[str, str]) -> None:
    """Starts a new life.

    Args:
      cluster: Who this worker is.
      facts: What must be the same on every worker.
    """
    self._pulse = Pulse(
      run=pulse.run_name(cluster.workers),
      index=cluster.index,
      life=uuid.uuid4().hex,
      facts=dict(facts),
    )
    self._moved = time.monotonic()  # when this worker last got on with something
    self._count_gradients: Callable[[], int] = lambda: 0
    self._meetings = 0
    self._lock = threading.Lock()

  @property
  def pulse(self) -> Pulse:
    """What there is to say now."""
    return self._pulse

  def note(self, activity: str, step: int | None = None) -> None:
    """Says what this worker turns to; that is progress."""
    with self._lock:
      step = self._pulse.step if step is None else step
      self._pulse = dataclasses.replace(self._pulse, activity=activity, step=step)
      self._moved = time.monotonic()

  def count(self, gradients: Callable[[], int]) -> None:
    """Takes the function that counts gradients from here on."""
    with self._lock:
      self._count_gradients = gradients
      self._moved = time.monotonic()

  def arrive(self) -> None:
    """Says that this worker has come to where all meet."""
    with self._lock:
      self._meetings += 1

  def update(self, unheard: Sequence[int]) -> None:
    """Counts and measures what changes by itself.

    Args:
      unheard: The peers that this worker does not hear.
    """
    gradients = self._count_gradients()
    now = time.monotonic()
    with self._lock:
      arrivals = self._meetings + gradients
      if arrivals != self._pulse.arrivals:
        self._moved = now
      self._pulse = dataclasses.replace(
        self._pulse,
        arrivals=arrivals,
        idle=round(now - self._moved, 1),
        unheard=list(unheard),
      )

  def leave(self, exit_code: int, reason: str) -> None:
    """Says that this worker ends, and why."""
    with self._lock:
      self._pulse = dataclasses.replace(
        self._pulse, exit_code=int(exit_code), reason=reason
      )
