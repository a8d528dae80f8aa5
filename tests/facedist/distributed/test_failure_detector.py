"""The failure detector: its decisions on a clock of the test, and over loopback.

Over loopback silence is measured in real time, and a busy machine may delay a thread
for seconds. So those tests wait for what must happen and not for a time.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from facedist import errors
from facedist.distributed import heartbeat as heartbeats
from facedist.distributed.cluster import Cluster
from facedist.distributed.detect import free_addresses
from facedist.distributed.failure_detector import Failure, FailureDetector, Timeouts
from facedist.distributed.heartbeat import Heartbeat
from tests.facedist.peers import Peer

FACTS = {"version": "0.1.0", "config": "aa"}
LONG = 3600.0  # seconds; no test takes that
NEVER = Timeouts(start=LONG, peer=LONG, step=LONG)
MAX_SECONDS = 120.0  # for what must happen


class Worker:
  """Worker 0 of three, on a clock of the test; no thread runs and nothing is sent."""

  def __init__(self) -> None:
    self.now = 100.0
    self.workers = free_addresses(3)
    self.detector = FailureDetector(
      Cluster(self.workers),
      facts=FACTS,
      timeouts=Timeouts(start=60.0, peer=5.0, step=20.0),
      clock=lambda: self.now,
    )

  def receive(self, index: int, **fields) -> None:
    """Takes in a heartbeat of a worker, one that receives all unless it says else."""
    given = {"process": f"process {index}", "facts": FACTS, "receives_all": True}
    cluster = heartbeats.cluster_id(self.workers)
    heartbeat = Heartbeat(cluster=cluster, index=index, **given | fields)
    self.detector.receive(heartbeats.encode(heartbeat))

  def train(self) -> None:
    """Has joined the others and trains."""
    self.receive(1, step=7, activity="training")
    self.receive(2, step=7, activity="saving")
    self.detector.begin_training(lambda: 0)

  def failure(self) -> Failure:
    found = self.detector.find_failure()
    assert found is not None
    return found

  def name(self, index: int) -> str:
    return f"worker {index} at {self.workers[index]}"


@pytest.fixture
def worker() -> Iterator[Worker]:
  made = Worker()
  yield made
  made.detector.leave(errors.ExitCode.DONE)


def test_who_has_not_joined_in_time_is_named_with_what_is_missing(worker: Worker):
  worker.receive(1)
  worker.now += 60.0
  assert worker.detector.find_failure() is None
  worker.now += 1.0
  failure = worker.failure()
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  assert failure.reason == (
    f"{worker.name(2)} did not start within 60 s; see why, or wait longer with "
    "--start_timeout."
  )
  worker.receive(2, receives_all=False)
  assert worker.failure().reason.startswith(
    f"{worker.name(2)} did not receive the heartbeats of all workers within 60 s"
  )


def test_all_have_joined_once_each_receives_all_others(worker: Worker):
  worker.receive(1)
  worker.receive(2)
  worker.receive(2, receives_all=False, process="another")  # it has started again
  worker.now += 61.0
  assert worker.detector.find_failure() is not None
  worker.receive(2, process="another")
  assert worker.detector.find_failure() is None
  worker.detector.begin_training(lambda: 0)
  assert worker.detector.find_failure() is not None  # silent; no longer restarted
  worker.receive(1)
  worker.receive(2, process="another")
  assert worker.detector.find_failure() is None


def test_a_permanent_fault_before_all_have_joined_ends_all(worker: Worker):
  worker.receive(1, receives_all=False, exit_code=2, reason="the port is taken.")
  worker.receive(1, receives_all=False)  # sent before the last one, by another thread
  error = worker.failure().error()
  assert error.exit_code == errors.ExitCode.USAGE
  assert str(error).endswith("left at step 0 with exit code 2: the port is taken.")


def test_a_peer_that_leaves_once_all_have_joined_is_no_failure_to_join(worker: Worker):
  worker.receive(1)
  worker.receive(2, exit_code=0)
  assert worker.detector.find_failure() is None


@pytest.mark.parametrize("name", ["version", "config"])
def test_a_peer_with_other_facts_is_refused_by_name(worker: Worker, name: str):
  worker.receive(2, facts=FACTS | {name: "zz"})
  failure = worker.failure()
  assert isinstance(failure.error(), errors.ConfigError)
  assert f"{worker.name(2)} does not belong to this run: {name} zz there" in (
    failure.reason
  )


def test_heartbeats_from_outside_the_cluster_change_nothing(worker: Worker):
  worker.train()
  worker.receive(3, exit_code=1)
  worker.receive(0, exit_code=1)  # this worker's own number
  alien = Heartbeat(cluster="x", index=1, process="x", facts=FACTS, exit_code=1)
  worker.detector.receive(heartbeats.encode(alien))
  worker.detector.receive(b"no heartbeat")
  assert worker.detector.find_failure() is None


def test_a_peer_is_lost_once_it_is_silent_for_longer_than_allowed(worker: Worker):
  worker.train()
  worker.now += 4.0
  worker.receive(1, step=8)
  worker.now += 1.0
  assert worker.detector.find_failure() is None
  worker.now += 1.0
  failure = worker.failure()
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  assert failure.reason == (
    f"{worker.name(2)} has been silent for 6 s; last heard of at step 7 (saving). "
    "Start all workers again to continue from the newest checkpoint."
  )


def test_a_peer_that_started_again_was_lost(worker: Worker):
  worker.train()
  worker.receive(1, process="another")
  assert f"{worker.name(1)} was lost and has started again" in worker.failure().reason


@pytest.mark.parametrize(
  ("code", "expected"), [(4, 4), (3, 3), (1, 1), (144, 144), (143, 143), (77, 144)]
)
def test_a_permanent_fault_of_a_peer_ends_all(worker: Worker, code: int, expected: int):
  worker.train()
  worker.receive(2, step=9, exit_code=code, reason="no such shard.")
  assert worker.failure() == Failure(
    f"{worker.name(2)} left at step 9 with exit code {code}: no such shard.",
    errors.ExitCode(expected),
  )


def test_a_peer_that_is_done_early_is_lost_until_all_have_agreed(worker: Worker):
  worker.train()
  worker.receive(1, exit_code=0)
  assert worker.detector.find_failure() is not None
  worker.detector.finish()
  assert worker.detector.find_failure() is None
  worker.now += 10.0
  worker.receive(1)  # sent before the last one, by another thread
  worker.receive(2)
  assert worker.detector.find_failure() is None  # one that has left is not silent
  worker.now += 9.0
  assert worker.failure().reason.startswith(f"{worker.name(2)} has been silent for 9 s")


def test_the_worker_with_fewer_gradients_is_the_stuck_one(worker: Worker):
  worker.train()
  worker.detector.begin_training(lambda: 42)
  assert worker.detector.find_failure() is None
  worker.now += 21.0
  worker.receive(1, sync_points=41, step=7, activity="reading", idle=22.0)
  worker.receive(2, sync_points=42)
  assert worker.detector.find_failure() is None  # the stuck one is to say it itself
  worker.now += 2.0
  failure = worker.failure()
  assert not failure.is_own_fault
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  assert failure.reason.startswith(
    f"{worker.name(1)} is alive, but stuck at step 7 (reading, 22 s)"
  )


@pytest.mark.parametrize("gradients", [41, 42])
def test_one_behind_the_others_or_among_equals_is_stuck_itself(
  worker: Worker, gradients: int
):
  worker.train()
  worker.detector.begin_training(lambda: gradients)
  worker.detector.note("saving", step=7)
  assert worker.detector.find_failure() is None
  worker.now += 21.0
  worker.receive(1, sync_points=42)
  worker.receive(2, sync_points=42)
  failure = worker.failure()
  assert failure.is_own_fault
  assert failure.exit_code == errors.ExitCode.STUCK
  assert "no progress for 21 s at step 7 (saving)" in failure.reason


def test_gradients_and_notes_are_progress_in_a_single_process_too():
  now, gradients = 0.0, 0
  timeouts = dataclasses.replace(NEVER, step=5.0)
  alone = FailureDetector(Cluster(), facts={}, timeouts=timeouts, clock=lambda: now)
  alone.begin_training(lambda: gradients)
  for _ in range(3):
    now += 4.0
    gradients += 1
    assert alone.find_failure() is None
  for _ in range(3):
    now += 4.0
    alone.note("saving", step=7)
    assert alone.find_failure() is None
  now += 6.0
  failure = alone.find_failure()
  assert failure is not None
  assert failure.is_own_fault
  alone.synchronize()
  assert alone.find_failure() is None


Make = Callable[..., tuple[FailureDetector, list[int]]]


@pytest.fixture
def make(workers: tuple[str, ...]) -> Iterator[Make]:
  """Makes and starts detectors; each comes with the exit codes that it ended with."""
  made = []

  def make_one(index: int, **more) -> tuple[FailureDetector, list[int]]:
    codes: list[int] = []
    settings = {"facts": FACTS, "timeouts": NEVER, "end": codes.append} | more
    made.append(FailureDetector(Cluster(workers, index), **settings))
    made[-1].start()
    return made[-1], codes

  yield make_one
  for detector in made:
    detector.leave(errors.ExitCode.DONE)


def in_parallel(*calls: Callable[[], object]) -> None:
  """Calls functions in a thread each, and waits until all have returned."""
  threads = [threading.Thread(target=call) for call in calls]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(MAX_SECONDS)
    assert not thread.is_alive()


def until(codes: list[int]) -> int:
  """Waits for an exit code."""
  deadline = time.monotonic() + MAX_SECONDS
  while not codes:
    assert time.monotonic() < deadline, "nothing ended"
    time.sleep(0.02)
  return codes[0]


def test_a_pause_of_this_process_itself_is_no_silence_of_its_peers(
  make: Make, workers: tuple[str, ...]
):
  peer = Peer(workers)
  now = 0.0
  pauses, resumed = threading.Event(), threading.Event()

  def pause_once() -> None:
    nonlocal now
    if now > 0.0:
      resumed.set()
    elif pauses.is_set():
      now = LONG  # as after SIGSTOP and SIGCONT

  timeouts = dataclasses.replace(NEVER, peer=2.0)
  detector, codes = make(
    0, timeouts=timeouts, clock=lambda: now, on_heartbeat=pause_once
  )
  peer.send(facts=FACTS)
  detector.join()
  detector.begin_training(lambda: 0)
  pauses.set()
  assert resumed.wait(MAX_SECONDS)
  assert codes == []
  peer.close()


def test_joining_gives_up_on_a_worker_that_never_starts(make: Make):
  detector, _ = make(0, timeouts=dataclasses.replace(NEVER, start=0.5))
  with pytest.raises(errors.PeerLostError, match=r"worker 1 at .* did not start"):
    detector.join()


def test_a_worker_may_leave_as_soon_as_it_has_met_the_others(make: Make):
  (first, _), (second, _) = make(0), make(1)
  in_parallel(first.join, second.join)
  for detector in (first, second):
    detector.begin_training(lambda: 0)
  in_parallel(first.synchronize, second.synchronize)
  second.finish()
  waiting = threading.Thread(target=second.synchronize)
  waiting.start()
  first.synchronize()
  first.leave(errors.ExitCode.DONE)  # may be before its next heartbeat
  waiting.join(MAX_SECONDS)
  assert not waiting.is_alive()


def test_workers_wait_for_each_other_and_name_the_one_that_is_stuck(
  make: Make, capfd: pytest.CaptureFixture
):
  (first, codes), (second, own) = (
    make(0),
    make(1, timeouts=dataclasses.replace(NEVER, step=2.0)),
  )
  in_parallel(first.join, second.join)
  first.begin_training(lambda: 7)  # has computed one gradient more
  waiting = threading.Thread(target=first.synchronize)
  waiting.start()
  waiting.join(0.5)
  assert waiting.is_alive()
  second.note("reading", step=6)
  second.begin_training(lambda: 6)
  second.synchronize()
  waiting.join(MAX_SECONDS)
  assert not waiting.is_alive()
  assert until(own) == errors.ExitCode.STUCK
  assert until(codes) == errors.ExitCode.PEER_LOST
  error = capfd.readouterr().err
  assert "most recent call first" in error  # faulthandler's stacks
  assert "no progress for" in error
  assert "worker 1 at" in error
