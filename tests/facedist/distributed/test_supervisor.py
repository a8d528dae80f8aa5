"""How a worker ends: it tells its peers, says why, and exits with its own code."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import tensorflow as tf

from facedist import errors
from facedist.distributed import supervisor
from facedist.distributed.cluster import Cluster
from facedist.distributed.detect import free_addresses
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from tests.facedist.peers import Peer

PROGRAM = """
import atexit, sys, time, types
from facedist import errors
from facedist.distributed import supervisor

atexit.register(time.sleep, 120)  # as TensorFlow's threads may wait
detector = types.SimpleNamespace(leave=lambda *told: print("left", *map(str, told)))
with supervisor._end_with_process(detector, is_alone=False):
  raise {error}
"""

# long enough for a busy machine; a peer counts as silent after 3 s in an explanation
TIMEOUTS = Timeouts(start=3600.0, peer=20.0, step=3600.0)


@pytest.fixture
def workers() -> tuple[str, ...]:
  """Two addresses on loopback whose ports are free."""
  return free_addresses(2)


Make = Callable[[int], FailureDetector]


@pytest.fixture
def make(workers: tuple[str, ...]) -> Iterator[Make]:
  """Makes and starts the detector of a worker."""
  made = []

  def make_one(index: int) -> FailureDetector:
    cluster = Cluster(workers, index)
    made.append(FailureDetector(cluster, facts={}, timeouts=TIMEOUTS))
    made[-1].start()
    return made[-1]

  yield make_one
  for detector in made:
    detector.leave(errors.ExitCode.DONE)


def test_any_error_of_tensorflow_is_explained_by_a_lost_peer(
  make: Make, workers: tuple[str, ...]
):
  peer, detector = Peer(workers), make(0)
  peer.send()
  detector.join()
  with (
    pytest.raises(errors.PeerLostError, match=r"worker 1 at .* has been silent for"),
    supervisor._name_lost_peer(detector, Cluster(workers, 0)),
  ):
    raise tf.errors.InternalError(None, None, "NCCL: unhandled system error")
  peer.close()


def test_an_error_while_no_peer_is_silent_is_raised_as_it_is(
  make: Make, workers: tuple[str, ...]
):
  detector, _ = make(0), make(1)
  detector.join()
  with (
    pytest.raises(tf.errors.InternalError, match="a bug"),
    supervisor._name_lost_peer(detector, Cluster(workers, 0)),
  ):
    raise tf.errors.InternalError(None, None, "a bug")


@pytest.mark.parametrize("error", [tf.errors.AbortedError, tf.errors.InternalError])
def test_a_single_process_blames_no_peer(error: type[tf.errors.OpError]):
  detector = FailureDetector(Cluster(), facts={}, timeouts=TIMEOUTS)
  with pytest.raises(error), supervisor._name_lost_peer(detector, Cluster()):
    raise error(None, None, "a bug")


@pytest.mark.parametrize(
  ("error", "code", "told", "said"),
  [
    ('errors.DataError("no; fix it")', 4, "left 4 no; fix it", "error: no; fix it"),
    ('errors.PeerLostError("gone")', 144, "left 144 gone", "error: gone"),
    ('ValueError("a bug")', 1, "left 1 ValueError: a bug", "ValueError: a bug"),
  ],
)
def test_a_worker_ends_with_its_own_code_although_something_blocks_its_exit(
  error: str, code: int, told: str, said: str
):
  started = time.monotonic()
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(error=error)],
    capture_output=True,
    text=True,
    timeout=110,
    check=False,
  )
  assert result.returncode == code, result.stderr
  assert result.stdout.strip() == told
  assert result.stderr.strip().splitlines()[-1] == said
  assert time.monotonic() - started < 100
