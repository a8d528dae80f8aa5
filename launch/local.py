"""Trains with several workers on this machine, a process each.

  python launch/local.py --workers=2 -- --data_dir=shards --workdir=run

Starts `python -m facedist.train --strategy=multiworker` once a worker, with the flags
after `--`, as a cluster on loopback. Each line that a worker prints appears after its
name, such as [worker-0]. The workers divide the machine's CPU cores and GPUs. SIGINT,
SIGTERM and SIGUSR1 go to every worker. When one fails the others are stopped, and the
exit code is that of the one that failed first; it is 0 when all are done.

An exit code of 128 and above asks for a restart: all workers start again, on new ports,
up to --max_restarts times, and training continues from the newest checkpoint. Each
attempt ends with a line of the log.
"""

import dataclasses
import glob
import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import logging

from facedist import config, errors, progress
from facedist.distributed import detect

if TYPE_CHECKING:
  from launch.cluster import LocalCluster
else:
  from cluster import LocalCluster  # a script finds modules, not packages, beside it

_MAX_BACKOFF_SECONDS = 60.0
_LONG_SECONDS = 600.0  # after an attempt of this length the back-off starts again


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  """The launcher's flags."""

  workers: int = config.setting(
    2, help="Number of processes.", at_least=1, at_most=1024
  )
  grace_seconds: float = config.setting(
    30.0,
    help="Seconds that workers have to stop before SIGKILL; 30 is Kubernetes' default.",
    at_least=0,
  )
  threads_per_worker: int = config.setting(
    0,
    help="TensorFlow's CPU threads in a worker; 0 divides the cores.",
    at_least=0,
    at_most=1024,
  )
  pin_cpus: bool = config.setting(
    False,
    help="Whether each worker is pinned to its own CPU cores, for steady timings.",
  )
  max_restarts: int = config.setting(
    0, help="Restarts of all workers after exit codes of 128 and above.", at_least=0
  )
  backoff_seconds: float = config.setting(
    1.0,
    help="Seconds before the first restart; doubles with each restart, up to a minute.",
    at_least=0,
  )
  module: str = config.setting("facedist.train", help="Python module to run.")


def main(settings: LocalConfig, worker_flags: Sequence[str]) -> int:
  """Runs the workers until all are done or may not restart; returns the exit code."""
  cores = sorted(os.sched_getaffinity(0))
  if settings.pin_cpus and len(cores) < settings.workers:
    raise errors.UsageError(
      f"--pin_cpus with --workers={settings.workers} needs as many CPU cores and there "
      f"are {len(cores)}; start fewer workers or drop --pin_cpus."
    )
  gpus = divide_gpus(visible_gpus(os.environ), settings.workers)
  received = ReceivedSignals()
  backoff = settings.backoff_seconds
  for attempt in range(settings.max_restarts + 1):
    started = time.monotonic()
    code = run_attempt(
      settings, worker_flags, cores=cores, gpus=gpus, received=received
    )
    seconds = time.monotonic() - started
    restarts = code >= errors.FIRST_RESTART_CODE and not received.is_asked_to_stop
    restarts &= attempt < settings.max_restarts
    logging.info(
      "attempt %d ended with exit code %d after %s; %s",
      attempt + 1,
      code,
      progress.duration(seconds),
      f"starting again in {backoff:g} s" if restarts else "no restart",
    )
    if not restarts:
      return code
    if received.wait(backoff):
      return errors.ExitCode.PREEMPTED
    backoff = next_backoff(backoff, first=settings.backoff_seconds, seconds=seconds)
  return code


def next_backoff(backoff: float, *, first: float, seconds: float) -> float:
  """Returns the seconds to wait before the next restart but one.

  Args:
    backoff: Seconds before the next.
    first: Seconds before the first of a row of short attempts.
    seconds: That the last attempt took.
  """
  if seconds > _LONG_SECONDS:
    return first
  return min(2 * backoff, _MAX_BACKOFF_SECONDS)


class ReceivedSignals:
  """The signals that this process receives; none is lost while workers start."""

  def __init__(self) -> None:
    self.signals: list[int] = []  # not yet passed on
    self.is_asked_to_stop = False
    self._arrived = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
      signal.signal(number, self._note)

  def wait(self, seconds: float) -> bool:
    """Waits; returns at once with True if this process was asked to stop."""
    return self._arrived.wait(seconds)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    self.signals.append(number)
    self.is_asked_to_stop = True
    self._arrived.set()


def run_attempt(
  settings: LocalConfig,
  worker_flags: Sequence[str],
  *,
  cores: Sequence[int],
  gpus: Sequence[Sequence[str]],
  received: ReceivedSignals,
) -> int:
  """Starts all workers as a cluster on free ports; returns their exit code."""
  threads = settings.threads_per_worker or max(1, len(cores) // settings.workers)
  addresses = detect.free_addresses(settings.workers)
  command = [sys.executable, "-m", settings.module, "--strategy=multiworker"]
  logging.info("Workers, %d threads each: %s", threads, ", ".join(addresses))
  cluster = LocalCluster(settings.grace_seconds, signals=received.signals)
  for index in range(settings.workers):
    environment = os.environ | cluster_variables(addresses, index)
    environment |= {"TF_NUM_INTRAOP_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if gpus:
      environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index])
    pinned = cores[index :: settings.workers] if settings.pin_cpus else cores
    cluster.start([*command, *worker_flags], environment, pinned)
  return cluster.run()


def cluster_variables(addresses: Sequence[str], index: int) -> dict[str, str]:
  """Returns the environment variables that make a process worker `index`."""
  task = {"type": "worker", "index": index}
  workers = {"worker": list(addresses)}
  return {"TF_CONFIG": json.dumps({"cluster": workers, "task": task})}


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
  """Returns the names of the GPUs that CUDA would use, without starting CUDA."""
  if "CUDA_VISIBLE_DEVICES" in environment:
    names = environment["CUDA_VISIBLE_DEVICES"].split(",")
    return [name.strip() for name in names if name.strip() not in ("", "-1")]
  return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def divide_gpus(gpus: Sequence[str], workers: int) -> list[Sequence[str]]:
  """Returns as many GPUs for each worker as for any other; [] where there are none.

  Raises:
    errors.UsageError: There are fewer GPUs than workers.
  """
  count = len(gpus) // workers
  if gpus and not count:
    raise errors.UsageError(
      f"--workers={workers} but there are {len(gpus)} GPUs; start fewer workers, or "
      "train on the CPU with CUDA_VISIBLE_DEVICES= before the command."
    )
  return [gpus[count * i : count * (i + 1)] for i in range(workers)] if gpus else []


def run() -> None:
  """Runs the command line; what follows `--` is for the workers."""
  end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  worker_flags = sys.argv[end + 1 :]
  sys.argv = sys.argv[:end]
  config.run_command(lambda settings: main(settings, worker_flags), LocalConfig)


if __name__ == "__main__":
  run()
