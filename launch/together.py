"""Runs commands at the same time: all to their end, or none after one has failed."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 40.0  # more than launch/local.py gives its workers
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Command:
  """A command and what its lines of output start with; nothing leaves them alone."""

  words: tuple[str, ...]
  prefix: str = ""


def run(commands: Sequence[Command]) -> int:
  """Runs the commands side by side; stops the others when one fails.

  They are stopped too when this process is told to stop, or dies.

  Returns:
    0 if all ended with 0; else the exit code of the first that did not, 128 + n if
    signal n ended it.
  """
  processes: list[subprocess.Popen[bytes]] = []
  printers = []
  try:
    for command in commands:
      process = _start(command)
      processes.append(process)
      if process.stdout is not None:
        printer = threading.Thread(
          target=_print, args=(command.prefix.encode(), process.stdout)
        )
        printer.start()
        printers.append(printer)
    return _wait(processes)
  finally:
    _stop(processes)
    for printer in printers:
      printer.join()


def exit_on_signals() -> None:
  """Makes SIGINT and SIGTERM leave the main thread as SystemExit(128 + number)."""

  def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)


def _start(command: Command) -> subprocess.Popen[bytes]:
  """Starts a command, which is told to stop when this process dies."""
  library, parent = ctypes.CDLL(None), os.getpid()

  def bind() -> None:
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
      os._exit(1)

  return subprocess.Popen(
    command.words,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE if command.prefix else None,
    stderr=subprocess.STDOUT if command.prefix else None,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
    start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
    preexec_fn=bind,
  )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
  """Waits for the first failure, or for all to end with 0."""
  while True:
    codes = [process.poll() for process in processes]
    for code in codes:
      if code:
        return code if code > 0 else 128 - code
    if None not in codes:
      return 0
    time.sleep(_POLL_SECONDS)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
  """Ends those that still run: SIGTERM, and SIGKILL for what is left of the group."""
  running = [process for process in processes if process.poll() is None]
  for process in running:
    process.terminate()
  deadline = time.monotonic() + _GRACE_SECONDS
  for process in running:
    try:
      process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def _print(prefix: bytes, stream: IO[bytes]) -> None:
  """Copies a command's output to stdout, line by line, until it ends."""
  with stream:
    for line in stream:
      with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(prefix + line.rstrip(b"\r\n") + b"\n")
        sys.stdout.buffer.flush()
