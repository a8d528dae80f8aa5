"""Deadlines after which the kernel ends this process, even if the GIL is held.

A process has one such deadline. When it passes, faulthandler prints the stacks of all
threads to stderr, and SIGALRM ends the process (exit code 142 for a shell and a
scheduler). Neither needs the GIL.
"""

import contextlib
import faulthandler
import math
import signal
import threading
from collections.abc import Iterator

_MAX_RENEWAL_SECONDS = 1.0
_RENEWALS_PER_DEADLINE = 10
_STDERR = 2  # the descriptor: sys.stderr may be replaced


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
  """Ends the process if the body takes longer; call it in the main thread."""
  with _timer():
    _renew(seconds)
    yield


@contextlib.contextmanager
def ended_unless_python_runs(seconds: float) -> Iterator[None]:
  """Ends the process if other Python threads cannot run for that long during the body.

  Native code that never releases the GIL stops every Python thread, including one that
  would detect this. Call it in the main thread.
  """
  is_over = threading.Event()
  pause = min(_MAX_RENEWAL_SECONDS, seconds / _RENEWALS_PER_DEADLINE)

  def keep_renewing() -> None:
    while not is_over.is_set():
      _renew(seconds)
      is_over.wait(pause)

  thread = threading.Thread(target=keep_renewing, name="deadline", daemon=True)
  with _timer():
    thread.start()
    try:
      yield
    finally:
      is_over.set()
      thread.join()


@contextlib.contextmanager
def _timer() -> Iterator[None]:
  """Uses the kernel's timer during the body, and restores its earlier use."""
  handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
  timer = signal.setitimer(signal.ITIMER_REAL, 0)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def _renew(seconds: float) -> None:
  """Sets the deadline, or postpones it."""
  faulthandler.dump_traceback_later(seconds, file=_STDERR)
  signal.alarm(math.ceil(seconds) + 1)
