"""Trains with several workers on this machine, a process each.

  python launch/local.py --workers=2 -- --data_dir=shards --workdir=run

Starts `python -m facedist.train --strategy=multiworker` once a worker, with the flags
after `--`, as a cluster on loopback. Each line that a worker prints comes out behind a
[worker-0]. The machine's CPU cores and GPUs are shared out among the workers. SIGINT,
SIGTERM and SIGUSR1 go to every worker. When one fails the others are stopped, and the
exit code is that of the one that failed first; it is 0 when all are done.
"""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import IO

from absl import logging

from facedist import config, errors

_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  """The launcher's flags."""

  workers: int = config.setting(2, help="Number of processes.", at_least=1)
  grace_seconds: float = config.setting(
    30.0,
    help="Seconds that workers have to stop in before SIGKILL; 30 is Kubernetes' own.",
    at_least=0,
  )
  threads_per_worker: int = config.setting(
    0,
    help="TensorFlow's CPU threads in a worker; 0 shares the cores out.",
    at_least=0,
  )
  pin_cpus: bool = config.setting(
    False, help="Whether each worker keeps to CPU cores of its own, for steady timings."
  )
  module: str = config.setting("facedist.train", help="Python module to run.")


def main(settings: LocalConfig, worker_flags: Sequence[str]) -> int:
  """Runs the workers until all have ended; returns the launcher's exit code."""
  cores = sorted(os.sched_getaffinity(0))
  if settings.pin_cpus and len(cores) < settings.workers:
    raise errors.UsageError(
      f"--pin_cpus with --workers={settings.workers} needs as many CPU cores and there "
      f"are {len(cores)}; start fewer workers or drop --pin_cpus."
    )
  threads = settings.threads_per_worker or max(1, len(cores) // settings.workers)
  gpus = gpu_shares(visible_gpus(os.environ), settings.workers)
  addresses = free_addresses(settings.workers)
  command = [sys.executable, "-m", settings.module, "--strategy=multiworker"]
  logging.info("Workers, %d threads each: %s", threads, ", ".join(addresses))
  crew = Crew(settings.grace_seconds)
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, crew.note_signal)
  for index in range(settings.workers):
    environment = os.environ | cluster_variables(addresses, index)
    environment |= {"TF_NUM_INTRAOP_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if gpus:
      environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index])
    pinned = cores[index :: settings.workers] if settings.pin_cpus else cores
    crew.start([*command, *worker_flags], environment, pinned)
  return crew.run()


def free_addresses(count: int) -> list[str]:
  """Returns `count` loopback addresses whose ports nobody listens on."""
  with contextlib.ExitStack() as held:
    sockets = [
      held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
    ]
    return [f"127.0.0.1:{taken.getsockname()[1]}" for taken in sockets]


def cluster_variables(addresses: Sequence[str], index: int) -> dict[str, str]:
  """Returns the environment variables that make a process worker `index`."""
  task = {"type": "worker", "index": index}
  cluster = {"worker": list(addresses)}
  return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
  """Returns the names of the GPUs that CUDA would use, without starting CUDA."""
  if "CUDA_VISIBLE_DEVICES" in environment:
    names = environment["CUDA_VISIBLE_DEVICES"].split(",")
    return [name.strip() for name in names if name.strip() not in ("", "-1")]
  return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def gpu_shares(gpus: Sequence[str], workers: int) -> list[Sequence[str]]:
  """Returns as many GPUs for each worker as for any other; [] where there are none.

  Raises:
    errors.UsageError: There are fewer GPUs than workers.
  """
  share = len(gpus) // workers
  if gpus and not share:
    raise errors.UsageError(
      f"--workers={workers} but there are {len(gpus)} GPUs; start fewer workers, or "
      "train on the CPU with CUDA_VISIBLE_DEVICES= before the command."
    )
  return [gpus[share * i : share * (i + 1)] for i in range(workers)] if gpus else []


class Crew:
  """The workers of one run, from their start until the last has ended."""

  def __init__(self, grace_seconds: float):
    self._grace_seconds = grace_seconds
    self._workers: dict[str, subprocess.Popen[bytes]] = {}
    self._codes: dict[str, int] = {}  # exit codes, in the order of the ends
    self._causes: list[int] = []  # of these, failures that did not follow from another
    self._signals: list[int] = []  # received and not yet passed on
    self._kill_time: float | None = None  # set once the workers were told to stop
    self._print_lock = threading.Lock()

  def note_signal(self, number: int, frame: types.FrameType | None) -> None:
    """Notes a signal for `run` to pass on; none is lost while workers start."""
    self._signals.append(number)

  def start(
    self, command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int]
  ) -> None:
    """Starts the next worker, bound to `cores` and to the life of this process."""
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
    """Prints, passes signals on and watches until all ended; returns the exit code."""
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
      for process in self._workers.values():  # what a worker started ends with it
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      for printer in printers:
        printer.join()
    failures = [code for code in self._codes.values() if code != errors.ExitCode.DONE]
    return (self._causes + failures + [errors.ExitCode.DONE])[0]

  def _pass_signals_on(self) -> None:
    """Sends what was received to every worker."""
    while self._signals:
      number = self._signals.pop(0)
      logging.info("Passing %s on to the workers.", signal.Signals(number).name)
      self._send(number)

  def _collect(self) -> None:
    """Notes who has ended; the first failure stops the others."""
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
      # A worker that fails closes its connections first: another that lost it may be
      # gone before it.
      if code != errors.ExitCode.PEER_LOST and not (stopping and code in _STOPPED):
        self._causes.append(code)
      if not stopping:
        self._send(signal.SIGTERM)

  def _send(self, number: int) -> None:
    """Sends a signal to all that run; the first that stops them starts the grace."""
    if number != signal.SIGUSR1 and self._kill_time is None:
      self._kill_time = time.monotonic() + self._grace_seconds
    for process in self._workers.values():
      if process.poll() is None:
        os.killpg(process.pid, number)

  def _print(self, name: str, stream: IO[bytes]) -> None:
    """Copies a worker's output to stdout, line by line, until it ends."""
    prefix = f"[{name}] ".encode()
    with stream:
      for line in stream:
        with self._print_lock, contextlib.suppress(BrokenPipeError):
          sys.stdout.buffer.write(prefix + line.rstrip(b"\r\n") + b"\n")
          sys.stdout.buffer.flush()


def _bind(library: ctypes.CDLL, parent: int, cores: Sequence[int]) -> None:
  """In the new process: dies with its parent, however that ends; keeps to `cores`."""
  library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(errors.ExitCode.INTERNAL)
  os.sched_setaffinity(0, cores)


def run() -> None:
  """Runs the command line; what follows `--` is for the workers."""
  end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  worker_flags = sys.argv[end + 1 :]
  sys.argv = sys.argv[:end]
  config.run_command(lambda settings: main(settings, worker_flags), LocalConfig)


if __name__ == "__main__":
  run()
