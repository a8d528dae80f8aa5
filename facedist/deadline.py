"""A last resort: the kernel ends this process, whatever holds the interpreter's lock.

A process has one such deadline. It passes with the stacks of all threads on stderr and
SIGALRM, which a shell and a scheduler call 142. Neither needs the lock.
"""

import contextlib
import faulthandler
import math
import signal
import threading
from collections.abc import Iterator

_MOST_SECONDS_A_PUSH = 1.0
_PUSHES_A_DEADLINE = 10
_STDERR = 2  # by its number: sys.stderr may be anything


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
  """Ends the process if the body takes longer; to be called in the main thread."""
  with _timer():
    _push(seconds)
    yield


@contextlib.contextmanager
def ended_unless_python_runs(seconds: float) -> Iterator[None]:
  """Ends the process if no other thread can run for so long while the body does.

  Native code that never gives the lock back stops every thread of Python, so also the
  one that would find that out.
  To be called in the main thread.
  """
  is_over = threading.Event()
  pause = min(_MOST_SECONDS_A_PUSH, seconds / _PUSHES_A_DEADLINE)

  def push_on() -> None:
    while not is_over.is_set():
      _push(seconds)
      is_over.wait(pause)

  thread = threading.Thread(target=push_on, name="deadline", daemon=True)
  with _timer():
    thread.start()
    try:
      yield
    finally:
      is_over.set()
      thread.join()


@contextlib.contextmanager
def _timer() -> Iterator[None]:
  """Takes the kernel's timer for the body; whoever had it before has it afterwards."""
  handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
  timer = signal.setitimer(signal.ITIMER_REAL, 0)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def _push(seconds: float) -> None:
  """Sets the deadline, or moves it on."""
  faulthandler.dump_traceback_later(seconds, file=_STDERR)
  signal.alarm(math.ceil(seconds) + 1)
