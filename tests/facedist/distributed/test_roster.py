"""What a worker concludes from its peers' heartbeats, and from their silence."""

import dataclasses

import pytest

from facedist import errors
from facedist.distributed import failure_detector
from facedist.distributed.failure_detector import Failure as Failure
from facedist.distributed.heartbeat import Heartbeat

WORKERS = ("node9:2222", "node10:2222", "node11:2222")


def heartbeat(index: int, **more) -> Heartbeat:
  fields = {"run": "r", "life": f"life {index}", "facts": {}} | more
  return Heartbeat(index=index, **fields)


@pytest.fixture
def cluster() -> failure_detector.PeerTable:
  """Worker 0's view at second 100, when it has just heard of both others."""
  known = failure_detector.PeerTable(WORKERS, 0, started=90.0)
  known.hear(heartbeat(1, step=7, activity="training"), 100.0)
  known.hear(heartbeat(2, step=7, activity="saving"), 100.0)
  return known


def test_a_heartbeat_from_outside_the_cluster_changes_nothing(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(3, exit_code=1), 100.0)
  cluster.hear(heartbeat(0, exit_code=1), 100.0)  # our own number: an impostor
  assert cluster.lost(100.0, silence=5.0) is None


def test_silence_is_a_loss_only_once_it_is_longer_than_allowed(
  cluster: failure_detector.PeerTable,
):
  assert cluster.lost(105.0, silence=5.0) is None
  cluster.hear(heartbeat(1, step=8), 104.0)
  failure = cluster.lost(106.0, silence=5.0)
  assert failure is not None
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  assert failure.reason.startswith(
    "worker 2 at node11:2222 has been silent for 6 s; last heard of at step 7 (saving)"
  )
  assert "worker 1 at node10:2222 has been silent" not in failure.reason


def test_a_pause_of_this_process_itself_is_no_silence_of_others(
  cluster: failure_detector.PeerTable,
):
  cluster.excuse(60.0)
  assert cluster.lost(163.0, silence=5.0) is None


def test_a_heartbeat_that_comes_after_the_last_words_of_its_sender_changes_nothing(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(1, step=8, exit_code=143), 101.0)
  cluster.hear(heartbeat(1, step=7), 101.1)  # sent before, by another thread
  cluster.hear(heartbeat(2, step=8), 199.0)
  assert cluster.silent(200.0, 5.0) == []
  assert cluster.lost(200.0, silence=5.0, is_finishing=True) is None


def test_a_peer_that_started_again_was_lost(cluster: failure_detector.PeerTable):
  cluster.hear(heartbeat(1, life="another"), 101.0)
  failure = cluster.lost(101.0, silence=5.0)
  assert failure is not None
  assert "worker 1 at node10:2222 was lost and has started again" in failure.reason


def test_a_peer_that_started_again_before_all_were_there_was_not_lost(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(1, life="another"), 101.0)
  cluster.settle()
  assert cluster.lost(101.0, silence=5.0) is None


@pytest.mark.parametrize(
  ("code", "expected"), [(4, 4), (3, 3), (1, 1), (144, 144), (143, 143), (77, 144)]
)
def test_a_fault_for_good_of_a_peer_is_one_of_all(
  cluster: failure_detector.PeerTable, code: int, expected: int
):
  cluster.hear(heartbeat(2, step=9, exit_code=code, reason="no such shard."), 101.0)
  failure = cluster.lost(101.0, silence=5.0)
  assert failure == Failure(
    f"worker 2 at node11:2222 left at step 9 with exit code {code}: no such shard.",
    errors.ExitCode(expected),
  )


def test_a_heartbeat_tells_who_has_been_silent_for_some_time(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(1), 103.0)
  assert cluster.silent(102.0, silence=2.0) == []
  assert cluster.silent(103.0, silence=2.0) == [2]
  cluster.hear(heartbeat(2, exit_code=0), 103.0)
  assert cluster.silent(110.0, silence=2.0) == [1]  # one that has left is not silent


def test_a_peer_that_is_done_early_is_a_loss_until_all_have_agreed(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(1, exit_code=0), 101.0)
  assert cluster.lost(101.0, silence=5.0) is not None
  assert cluster.lost(101.0, silence=5.0, is_finishing=True) is None
  cluster.hear(heartbeat(2), 199.0)
  assert cluster.lost(200.0, silence=5.0, is_finishing=True) is None  # it has left
  assert cluster.lost(209.0, silence=5.0, is_finishing=True) is not None  # worker 2


def test_who_computed_fewer_gradients_holds_the_others_up(
  cluster: failure_detector.PeerTable,
):
  cluster.hear(heartbeat(1, arrivals=41, step=7, activity="reading", idle=9.0), 110.0)
  cluster.hear(heartbeat(2, arrivals=42), 110.0)
  own = heartbeat(0, arrivals=42, step=7, idle=8.0)
  assert cluster.stuck(dataclasses.replace(own, idle=3.0), timeouts=5.0) is None
  assert cluster.stuck(own, timeouts=5.0, politeness=4.0) is None  # its turn to say so
  failure = cluster.stuck(own, timeouts=5.0)
  assert failure is not None
  assert not failure.is_own_fault
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  assert failure.reason.startswith(
    "worker 1 at node10:2222 is alive, but stuck at step 7 (reading, 9 s)"
  )


@pytest.mark.parametrize("arrivals", [41, 42])
def test_one_behind_the_others_or_among_equals_is_itself_at_fault(
  cluster: failure_detector.PeerTable, arrivals: int
):
  cluster.hear(heartbeat(1, arrivals=42), 110.0)
  cluster.hear(heartbeat(2, arrivals=42), 110.0)
  own = heartbeat(0, arrivals=arrivals, step=7, idle=8.0, activity="saving")
  failure = cluster.stuck(own, timeouts=5.0)
  assert failure is not None
  assert failure.is_own_fault
  assert failure.exit_code == errors.ExitCode.STUCK
  assert "no progress for 8 s at step 7 (saving)" in failure.reason


def test_a_process_by_itself_can_be_stuck_too():
  alone = failure_detector.PeerTable((), 0, started=0.0)
  failure = alone.stuck(heartbeat(0, idle=8.0), timeouts=5.0)
  assert failure is not None
  assert failure.is_own_fault
