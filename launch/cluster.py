"""Runs the worker processes of one attempt: starts, prints and stops them."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from absl import logging

from facedist import errors

_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


class LocalCluster:
  """The workers of one attempt, from their start until the last has ended."""

  def __init__(self, grace_seconds: float, *, signals: list[int]):
    """Starts no worker yet.

    Args:
      grace_seconds: From the first signal that stops workers to SIGKILL.
      signals: The numbers of received signals, to be passed on to the workers.
    """
    self._grace_seconds = grace_seconds
    self._workers: dict[str, subprocess.Popen[bytes]] = {}
    self._codes: dict[str, int] = {}  # exit codes, in the order in which workers ended
    self._causes: list[int] = []  # of these, failures that no other failure caused
    self._signals = signals
    self._kill_time: float | None = None  # set once the workers were told to stop
    self._print_lock = threading.Lock()

  def start(
    self, command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int]
  ) -> None:
    """Starts the next worker on `cores`; it is killed when this process ends."""
    name = f"worker-{len(self._workers)}"
    self._workers[name] = subprocess.Popen(
      command,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
      preexec_fn=functools.partial(_bind, ctypes.CDLL(None), os.getpid(), cores),
    )

  def run(self) -> int:
    """Prints output and passes signals on until all ended; returns the exit code."""
    printers = [
      threading.Thread(target=self._print, args=(name, process.stdout))
      for name, process in self._workers.items()
    ]
    try:
      for printer in printers:
        printer.start()
      while len(self._codes) < len(self._workers):
        self._pass_signals_on()
        self._collect()
        if self._kill_time is not None and time.monotonic() >= self._kill_time:
          self._send(signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    finally:
      for process in self._workers.values():  # its own child processes, too
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      for printer in printers:
        printer.join()
    failures = [code for code in self._codes.values() if code != errors.ExitCode.DONE]
    return (self._causes + failures + [errors.ExitCode.DONE])[0]

  def _pass_signals_on(self) -> None:
    """Sends the received signals to every worker."""
    while self._signals:
      number = self._signals.pop(0)
      logging.info("Passing %s on to the workers.", signal.Signals(number).name)
      self._send(number)

  def _collect(self) -> None:
    """Records which workers have ended; the first failure stops the others."""
    for name, process in self._workers.items():
      if name in self._codes or process.poll() is None:
        continue
      status = process.returncode
      code = status if status >= 0 else 128 - status
      logging.info("%s ended with exit code %d.", name, code)
      self._codes[name] = code
      if code == errors.ExitCode.DONE:
        continue
      stopping = self._kill_time is not None
      # A worker that fails closes its connections first, so another one that lost it
      # may end earlier.
      if code != errors.ExitCode.PEER_LOST and not (stopping and code in _STOPPED):
        self._causes.append(code)
      if status == errors.ExitCode.PREEMPTED:
        # All agreed on a step to stop at, and the others may still be saving: another
        # signal would end them at once.
        self._start_grace()
      elif not stopping:
        self._send(signal.SIGTERM)

  def _send(self, number: int) -> None:
    """Sends a signal to all that run; the first that stops them starts the grace."""
    if number != signal.SIGUSR1:
      self._start_grace()
    for process in self._workers.values():
      if process.poll() is None:
        os.killpg(process.pid, number)

  def _start_grace(self) -> None:
    """Sets when the workers that still run are killed."""
    if self._kill_time is None:
      self._kill_time = time.monotonic() + self._grace_seconds

  def _print(self, name: str, stream: IO[bytes]) -> None:
    """Copies a worker's output to stdout, line by line, until it ends."""
    prefix = f"[{name}] ".encode()
    with stream:
      for line in stream:
        with self._print_lock, contextlib.suppress(BrokenPipeError):
          sys.stdout.buffer.write(prefix + line.rstrip(b"\r\n") + b"\n")
          sys.stdout.buffer.flush()


def _bind(library: ctypes.CDLL, parent: int, cores: Sequence[int]) -> None:
  """In the new process: lets it die with its parent, and binds it to `cores`."""
  library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(errors.ExitCode.INTERNAL)
  os.sched_setaffinity(0, cores)
