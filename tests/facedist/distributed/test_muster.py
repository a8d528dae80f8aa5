"""Who has come at the start, and who hears whom."""

import pytest

from facedist import errors
from facedist.distributed.failure_detector import Joining
from facedist.distributed.heartbeat import Heartbeat

WORKERS = ("node9:2222", "node10:2222", "node11:2222")
FACTS = {"version": "0.1.0", "config": "aa"}


def heartbeat(index: int, *unheard: int, **more) -> Heartbeat:
  fields = {"run": "r", "life": f"life {index}", "facts": FACTS} | more
  return Heartbeat(index=index, unheard=list(unheard), **fields)


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
  cluster.hear(heartbeat(1, 0, 2))
  cluster.hear(heartbeat(2, 0))
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
  cluster.hear(heartbeat(1, 0, 2))
  cluster.hear(heartbeat(2, 1))
  assert cluster.out_of_touch() == [1]


def test_one_who_has_heard_all_may_fall_silent_to_others_later(cluster: Joining):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(1, 2))  # it trains already, while 2 forms the cluster
  cluster.hear(heartbeat(2))
  assert cluster.is_complete()


def test_one_that_starts_again_has_to_hear_all_anew(cluster: Joining):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(2))
  cluster.hear(heartbeat(2, 1, life="another"))
  assert not cluster.is_complete()


def test_a_process_by_itself_is_complete():
  assert Joining((), 0, facts=FACTS).is_complete()


def test_those_that_did_not_come_in_time_are_named(cluster: Joining):
  cluster.hear(heartbeat(1, 2))
  assert cluster.judge(waited=60.0, timeouts=60.0) is None
  assert reason_after(cluster, 61.0).startswith(
    "worker 2 at node11:2222 did not start within 60 s; see why"
  )


def test_one_that_is_heard_and_does_not_hear_is_named_with_the_way_that_is_lost(
  cluster: Joining,
):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(2, 0))
  assert reason_after(cluster, 61.0).startswith(
    "worker 2 at node11:2222 did not hear worker 0 (packets from node9:2222 to "
    "node11:2222 are lost on the way) within 60 s; see why"
  )


def test_a_way_lost_between_two_others_is_named_too(cluster: Joining):
  cluster.hear(heartbeat(1, 2))
  cluster.hear(heartbeat(2))
  assert reason_after(cluster, 61.0).startswith(
    "worker 1 at node10:2222 did not hear worker 2 (packets from node11:2222 to "
    "node10:2222 are lost on the way) within 60 s"
  )


def test_who_is_not_heard_learns_it_at_once_from_the_one_that_gives_up(
  cluster: Joining,
):
  cluster.hear(heartbeat(1, 0, exit_code=144, reason="worker 0 did not start."))
  assert reason_after(cluster, 1.0) == (
    "worker 1 at node10:2222 left at step 0 with exit code 144: worker 0 did not "
    "start. This worker hears it: packets from node9:2222 to node10:2222 are lost on "
    "the way."
  )


def test_a_heartbeat_that_comes_after_the_last_words_of_its_sender_changes_nothing(
  cluster: Joining,
):
  cluster.hear(heartbeat(1, 0, exit_code=144, reason="worker 0 did not start."))
  cluster.hear(heartbeat(1, 0))  # sent before, by another thread
  assert "left at step 0 with exit code 144" in reason_after(cluster, 1.0)


def test_a_fault_for_good_of_one_at_the_start_is_one_of_all(cluster: Joining):
  cluster.hear(heartbeat(1, 2, exit_code=2, reason="the port is taken."))
  failure = cluster.judge(waited=1.0, timeouts=60.0)
  assert failure is not None
  assert failure.error().exit_code == errors.ExitCode.USAGE


def test_one_that_leaves_once_all_were_there_is_not_the_start_s_matter(
  cluster: Joining,
):
  cluster.hear(heartbeat(1))
  cluster.hear(heartbeat(2, exit_code=0))
  assert cluster.judge(waited=1.0, timeouts=60.0) is None


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
