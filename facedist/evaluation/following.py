"""Following a training run: what is left to score, held until it is scored."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any

from absl import logging

RENEW_SECONDS = 30.0


class Backlog:
  """The checkpoints that are not scored yet, held against deletion all the while.

  Inside a `with` block a thread finds new checkpoints and renews the hold, so that
  checkpoints saved while one is being scored are held as well. Leaving it after an
  error keeps the hold: a restart wants the same checkpoints, and it runs out by itself.
  """

  def __init__(
    self,
    *,
    list_steps: Callable[[], Collection[int]],
    hold: Callable[[Collection[int]], None],
    scored: Collection[int],
    renew_seconds: float = RENEW_SECONDS,
  ) -> None:
    """Nothing is listed or held yet.

    Args:
      list_steps: Returns the steps of all complete checkpoints.
      hold: Keeps the checkpoints of these steps, and no others, from being deleted.
      scored: Steps that need no score.
      renew_seconds: Time between two renewals.
    """
    self._list_steps = list_steps
    self._hold = hold
    self._scored = set(scored)
    self._renew_seconds = renew_seconds
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

  def refresh(self) -> list[int]:
    """Holds and returns the steps left to score, in order.

    A checkpoint that was deleted before the hold was in place is left out.
    """
    with self._lock:
      wanted = set(self._list_steps()) - self._scored
      self._hold(wanted)
      return sorted(wanted.intersection(self._list_steps()) if wanted else wanted)

  def mark_scored(self, step: int) -> None:
    """Takes a step off the backlog; the next refresh lets go of it."""
    with self._lock:
      self._scored.add(step)

  def __enter__(self) -> "Backlog":
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._stop.set()
    self._thread.join()
    if kind is None:
      self._hold(())

  def _keep_renewing(self) -> None:
    """Refreshes until told to stop; a failure is said and tried again."""
    while not self._stop.wait(self._renew_seconds):
      try:
        self.refresh()
      except Exception as error:  # whatever it is, the scoring itself goes on
        logging.warning("Could not renew the hold on checkpoints: %s", error)


def steps_to_score(
  backlog: Backlog,
  *,
  is_done: Callable[[], bool],
  poll_seconds: float,
  idle_timeout_seconds: float = 0.0,
  sleep: Callable[[float], Any] = time.sleep,
) -> Iterator[int]:
  """Yields each step to score, in order, until training is done and none is left.

  The caller marks a step as scored, or it comes again.

  Args:
    backlog: What is left to score.
    is_done: Whether training has saved its last checkpoint.
    poll_seconds: Time between two looks while there is nothing to score.
    idle_timeout_seconds: Time without a new checkpoint after which to give up; 0 waits
      for ever.
    sleep: Waits that many seconds.

  Raises:
    TimeoutError: There was nothing to score for `idle_timeout_seconds`.
  """
  idle_seconds = 0.0
  while True:
    done = is_done()  # asked first: what is listed after it includes the last one
    steps = backlog.refresh()
    if steps:
      idle_seconds = 0.0
      yield steps[0]
    elif done:
      return
    elif 0 < idle_timeout_seconds <= idle_seconds:
      raise TimeoutError
    else:
      sleep(poll_seconds)
      idle_seconds += poll_seconds
