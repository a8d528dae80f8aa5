"""How a worker ends: it tells its peers, says why, and exits with its own code."""

import contextlib
import pathlib
import re
import time
from collections.abc import Callable

import pytest

from tests import processes
from tests.facedist.peers import Peer

PROGRAM = """
import atexit, sys, time
import tensorflow as tf
from facedist import errors
from facedist.distributed import cluster, failure_detector, supervisor

workers = tuple(sys.argv[1:])
if workers:
  atexit.register(time.sleep, 120)  # as TensorFlow's threads may wait
# long enough for a busy machine; a peer counts as silent after 3 s in an explanation
timeouts = failure_detector.Timeouts(start=3600.0, peer=20.0, step=3600.0)
with supervisor.supervise(
  cluster.Cluster(workers),
  facts={{}},
  timeouts=timeouts,
  grace_seconds=60.0,
  heartbeat_file=None,
):
  print("supervised", flush=True)
  raise {error}
"""


def run_to_its_end(
  folder: pathlib.Path,
  error: str,
  *workers: str,
  meanwhile: Callable[[str], None] = lambda log: None,
) -> tuple[int | None, str]:
  """Runs a worker that an error ends; returns its exit code and its last line.

  Args:
    folder: For its files.
    error: What is raised in it.
    workers: The addresses of its cluster.
    meanwhile: Called with the worker's log until it ends.
  """
  program, log = folder / "worker.py", folder / "log"
  program.write_text(PROGRAM.format(error=error))
  process = processes.start(str(program), *workers, log=log)
  deadline = time.monotonic() + 100
  while process.poll() is None:
    assert time.monotonic() < deadline, log.read_text()
    meanwhile(log.read_text())
    time.sleep(0.1)
  return process.returncode, log.read_text().splitlines()[-1]


BUG = 'tf.errors.InternalError(None, None, "a bug")'
NCCL = 'tf.errors.InternalError(None, None, "NCCL: unhandled system error")'


@pytest.mark.parametrize(
  ("error", "falls_silent", "code", "reason"),
  [
    ('errors.DataError("no; fix it")', False, 4, "no; fix it"),
    ('ValueError("a bug")', False, 1, "ValueError: a bug"),
    (BUG, False, 1, "InternalError: a bug"),
    (NCCL, True, 144, r"worker 1 at .* has been silent for"),
  ],
)
def test_a_worker_ends_with_its_own_code_although_something_blocks_its_exit(
  workers: tuple[str, ...],
  tmp_path: pathlib.Path,
  error: str,
  falls_silent: bool,
  code: int,
  reason: str,
):
  def send(log: str) -> None:
    if not (falls_silent and "supervised" in log):
      peer.send()

  with contextlib.closing(Peer(workers)) as peer:
    ended = run_to_its_end(tmp_path, error, *workers, meanwhile=send)
    told = peer.last_words()
  assert ended[0] == told.exit_code == code
  assert re.match(reason, told.reason)
  assert re.search(reason, ended[1])


@pytest.mark.parametrize("name", ["AbortedError", "InternalError"])
def test_a_single_process_blames_no_peer(name: str, tmp_path: pathlib.Path):
  error = f'tf.errors.{name}(None, None, "a bug")'
  code, line = run_to_its_end(tmp_path, error)
  assert code == 1
  assert line.endswith(f"{name}: a bug")
