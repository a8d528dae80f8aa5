"""The processes of `benchmarks.head`: the workers of each case, run by turns."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.head_worker import WorkerConfig
from facedist.distributed.detect import free_addresses

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_IN_OWN_NETWORK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"')
_ENTER_SECONDS = 10.0


class Group:
  """The workers of one case; each is a process."""

  def __init__(self, case: WorkerConfig, processes: list[subprocess.Popen]) -> None:
    self.identities = case.identities
    self.network_parameters = 0
    self.sent_bytes: list[float] = []
    self._case = case
    self._processes = processes

  def wait_until_ready(self, *, counts_bytes: bool) -> None:
    """Waits until all have compiled.

    Args:
      counts_bytes: Whether no other process uses their loopback device.
    """
    self._counts_bytes = counts_bytes
    (first, *_) = [self._hear(process) for process in self._processes]
    weights = self.identities * self._case.embedding_size
    is_mirrored = self._case.sharding == "replicated"
    self.network_parameters = first["mirrored_parameters"] - weights * is_mirrored

  def run_round(self) -> None:
    """Runs a round on all workers at once and waits for its end."""
    for process in self._processes:
      assert process.stdin is not None
      process.stdin.write("go\n")
      process.stdin.flush()
    heard = [self._hear(process) for process in self._processes]
    if self._counts_bytes:
      self.sent_bytes.append(heard[0]["loopback_bytes"])

  def finish(self) -> int:
    """Ends the workers; returns the largest peak of one, in bytes."""
    for process in self._processes:
      assert process.stdin is not None
      process.stdin.close()
    return max(self._hear(process)["peak_bytes"] for process in self._processes)

  def _hear(self, process: subprocess.Popen) -> dict[str, Any]:
    """Returns what a worker says next."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
      raise RuntimeError(
        f"a worker with {self.identities:,} identities ended with "
        f"{process.wait()}; was there enough memory?"
      )
    return dict(json.loads(line))


@contextlib.contextmanager
def started(cases: Sequence[WorkerConfig], workers: int) -> Iterator[list[Group]]:
  """Yields a group of workers for each case, all of them ready; ends them after."""
  is_apart = workers > 1 and _may_unshare()
  with contextlib.ExitStack() as running:
    groups = []
    for case in cases:
      processes: list[subprocess.Popen] = []
      addresses = free_addresses(workers)
      for index in range(workers):
        first = processes[0].pid if is_apart and processes else None
        process = _start(case, addresses, index, is_apart=is_apart, beside=first)
        running.callback(_end, process)
        processes.append(process)
      groups.append(Group(case, processes))
    for group in groups:
      group.wait_until_ready(counts_bytes=is_apart)
    yield groups


def _start(
  case: WorkerConfig,
  addresses: Sequence[str],
  index: int,
  *,
  is_apart: bool,
  beside: int | None,
) -> subprocess.Popen:
  """Starts a worker.

  Args:
    case: What to train.
    addresses: Of all workers.
    index: Which it is.
    is_apart: Whether the group has a network of its own.
    beside: The process whose network that is; none for the first.
  """
  flags = [f"--{name}={value}" for name, value in dataclasses.asdict(case).items()]
  command = [sys.executable, "-m", "benchmarks.head_worker", *flags]
  if is_apart:
    if beside is None:
      command = [*_IN_OWN_NETWORK, "sh", *command]
    else:
      _wait_for_network(beside)
      command = ["nsenter", f"--net=/proc/{beside}/ns/net", *command]
  environment = os.environ | {"PATH": _PATH}
  if len(addresses) > 1:
    task = {"type": "worker", "index": index}
    cluster = {"worker": list(addresses)}
    environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
  return subprocess.Popen(
    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )


def _wait_for_network(process: int) -> None:
  """Waits until a process has left this process's network."""
  deadline = time.monotonic() + _ENTER_SECONDS
  while _network(str(process)) == _network("self"):
    if time.monotonic() > deadline:
      raise RuntimeError("a worker did not get a network of its own")
    time.sleep(0.01)


def _network(process: str) -> str:
  return os.readlink(f"/proc/{process}/ns/net")


def _may_unshare() -> bool:
  """Says whether processes here can have a network of their own."""
  if not all(shutil.which(name, path=_PATH) for name in ("unshare", "nsenter", "ip")):
    return False
  probe = subprocess.run(
    [*_IN_OWN_NETWORK, "sh", "true"],
    env=os.environ | {"PATH": _PATH},
    capture_output=True,
    check=False,
  )
  return probe.returncode == 0


def _end(process: subprocess.Popen) -> None:
  """Ends a worker, and its pipes."""
  with process:
    process.kill()
