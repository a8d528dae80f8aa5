"""Who has come at the start, and who hears whom."""

import pytest

from facedist import errors
from facedist.distributed.failure_detector import Joining
from facedist.distributed.heartbeat import Heartbeat

WORKERS = ("node9:2222", "node10:2222", "node11:2222")
FACTS = {"version": "0.1.0", "config": "aa"}


def heartbeat(index: int, *, hears_all: bool = True, **more) -> Heartbeat:
  fields = {"run": "r", "life": f"life {index}", "facts": FACTS} | more
  return Heartbeat(index=index, hears_all=hears_all, **fields)


def deaf(index: int, **more) -> Heartbeat:
  return heartbeat(index, hears_all=False, **more)


@pytest.fixture
def cluster() -> Joining:
  """Worker 0's view before anybody has spoken."""
  return Joining(WORKERS, 0, facts=FACTS)


def reason_after(cluster: Joining, seconds: float) -> str:
  """Returns why worker 0 gives up where it waits for 60 s at most."""
  failure = cluster.judge(waited=seconds, timeouts=60.0)
  assert failure is not None
  assert failure.exit_code == errors.ExitCode.PEER_LOST
  return failure.reason


def test_all_are_there_once_each_hears_all_the_others(cluster: Joining):
  assert cluster.unheard() == [1, 2]
  cluster.hear(deaf(1))
  cluster.hear(deaf(2))
  assert cluster.unheard() == []
  assert not cluster.is_complete()
  cluster.hear(heartbeat(1))
  assert not cluster.is_complete()
  cluster.hear(heartbeat(2))
  assert cluster.is_complete()
  assert cluster.judge(waited=99.0, timeouts=60.0) is None


def test_those_unheard_and_those_who_do_not_hear_this_worker_are_looked_up_again(
  cluster: Joining,
):
  assert cluster.out_of_touch() == [1, 2]
  cluster.hear(deaf(1))
  cluster.hear(heartbeat(2))
  assert cluster.out_of_touch() == [1]


def test_one_that_starts_again_has_to_hear_all_anew(cluster: Joining):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(2))
  cluster.hear(deaf(2, life="another"))
  assert not cluster.is_complete()


def test_a_process_by_itself_is_complete():
  assert Joining((), 0, facts=FACTS).is_complete()


def test_those_that_did_not_come_in_time_are_named(cluster: Joining):
  cluster.hear(deaf(1))
  assert cluster.judge(waited=60.0, timeouts=60.0) is None
  assert reason_after(cluster, 61.0).startswith(
    "worker 2 at node11:2222 did not start within 60 s; see why"
  )


def test_a_heartbeat_that_comes_after_the_last_words_of_its_sender_changes_nothing(
  cluster: Joining,
):
  cluster.hear(deaf(1, exit_code=144, reason="worker 0 did not start."))
  cluster.hear(deaf(1))  # sent before, by another thread
  assert "left at step 0 with exit code 144" in reason_after(cluster, 1.0)


def test_a_fault_for_good_of_one_at_the_start_is_one_of_all(cluster: Joining):
  cluster.hear(deaf(1, exit_code=2, reason="the port is taken."))
  failure = cluster.judge(waited=1.0, timeouts=60.0)
  assert failure is not None
  assert failure.error().exit_code == errors.ExitCode.USAGE


def test_one_that_leaves_once_all_were_there_is_not_the_start_s_matter(
  cluster: Joining,
):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(2, exit_code=0))
  assert cluster.judge(waited=1.0, timeouts=60.0) is None


def test_one_that_does_not_receive_all_heartbeats_is_named(cluster: Joining):
  cluster.hear(heartbeat(1))
  cluster.hear(deaf(2))
  assert reason_after(cluster, 61.0).startswith(
    "worker 2 at node11:2222 did not receive the heartbeats of all workers within 60 s"
  )


@pytest.mark.parametrize("index", [0, 3])
def test_a_heartbeat_from_outside_the_cluster_is_nobody_s(cluster: Joining, index: int):
  cluster.hear(heartbeat(index))
  assert cluster.unheard() == [1, 2]


@pytest.mark.parametrize("name", ["version", "config"])
def test_a_peer_with_other_facts_is_refused_by_name(cluster: Joining, name: str):
  cluster.hear(heartbeat(2, facts=FACTS | {name: "zz"}))
  failure = cluster.judge(waited=1.0, timeouts=60.0)
  assert failure is not None
  assert isinstance(failure.error(), errors.ConfigError)
  assert f"worker 2 at node11:2222 does not belong to this run: {name} zz there" in (
    failure.reason
  )
