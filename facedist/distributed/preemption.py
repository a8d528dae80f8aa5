"""Handles requests to stop: SIGTERM or SIGUSR1 to any worker stops all of them.

Python runs a signal's handler only when its main thread returns from native code, which
may take a whole logging interval. So the interpreter's C handler writes the signal's
number to a pipe, and a thread reads it there.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

from absl import logging

from facedist import errors

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
  """Receives the signals that ask for a stop.

  After the first one, training saves and ends. The second, and any that arrives while
  there is nothing to save yet, ends the process at once with the same exit code; so
  does the end of the grace period.
  """

  def __init__(self, *, grace_seconds: float, end: Callable[[int, str], None]) -> None:
    """Receives nothing before `listen`.

    Args:
      grace_seconds: From the first signal to the end.
      end: Ends the process at once: with an exit code, and why.
    """
    self._grace_seconds = grace_seconds
    self._end = end
    self._on_request: Callable[[], None] | None = None
    self._requests = 0
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)

  @property
  def is_requested(self) -> bool:
    """Whether this process was asked to stop."""
    return self._requests > 0

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Receives signals while the body runs; call it in the main thread."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    self.take_signals()
    thread = threading.Thread(target=self._read, name="signals", daemon=True)
    thread.start()
    try:
      yield
    finally:
      signal.set_wakeup_fd(-1)
      for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
      os.close(self._writer)
      thread.join()
      os.close(self._reader)

  def take_signals(self) -> None:
    """Installs the handlers; again after TensorFlow has installed its own."""
    signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
      signal.signal(number, _do_nothing)

  def arm(self, on_request: Callable[[], None]) -> None:
    """From here on the first signal calls `on_request`, in the listener's thread."""
    self._on_request = on_request

  def _read(self) -> None:
    """Reads signals from the pipe until it is closed."""
    while numbers := os.read(self._reader, 16):
      for number in numbers:
        if number in STOP_SIGNALS:
          self.handle(signal.Signals(number).name)

  def handle(self, name: str) -> None:
    """Handles one signal."""
    self._requests += 1
    if self._on_request is None:
      self._end_now(f"{name}: there is nothing to save yet; ending.")
    elif self._requests > 1:
      self._end_now(f"{name} again: ending at once; the newest checkpoint stays valid.")
    else:
      logging.info("%s: all workers save at the next step and end", name)
      self._on_request()
      killer = threading.Timer(self._grace_seconds, self._give_up)
      killer.daemon = True
      killer.start()

  def _give_up(self) -> None:
    """Ends the process when saving takes longer than the scheduler waits."""
    self._end_now(
      f"not saved within --grace_seconds={self._grace_seconds:g}; ending. The newest "
      "checkpoint stays valid."
    )

  def _end_now(self, reason: str) -> None:
    """Prints why, and ends the process."""
    print(reason, file=sys.stderr, flush=True)
    self._end(int(errors.ExitCode.PREEMPTED), reason)


def _do_nothing(number: int, frame: types.FrameType | None) -> None:
  """Replaces the signal's default action; the pipe has its number."""
