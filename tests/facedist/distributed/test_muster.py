"""Who has come at the start, and who hears whom."""

import pytest

from facedist import errors
from facedist.distributed.failure_detector import Joining
from facedist.distributed.heartbeat import Heartbeat

WORKERS = ("node9:2222", "node10:2222", "node11:2222")
FACTS = {"version": "0.1.0", "config": "aa"}


def pulse(index: int, *unheard: int, **more) -> Heartbeat:
  fields = {"run": "r", "life": f"life {index}", "facts": FACTS} | more
  return Heartbeat(index=index, unheard=list(unheard), **fields)


@pytest.fixture
def crew() -> Joining:
  """Worker 0's view before anybody has spoken."""
  return Joining(WORKERS, 0, facts=FACTS)


def reason_after(crew: Joining, seconds: float) -> str:
  """Returns why worker 0 gives up where it waits for 60 s at most."""
  verdict = crew.judge(waited=seconds, patience=60.0)
  assert verdict is not None
  assert verdict.exit_code == errors.ExitCode.PEER_LOST
  return verdict.reason


def test_all_are_there_once_each_hears_all_the_others(crew: Joining):
  assert crew.unheard() == [1, 2]
  crew.hear(pulse(1, 0, 2))
  crew.hear(pulse(2, 0))
  assert crew.unheard() == []
  assert not crew.is_complete()
  crew.hear(pulse(1))
  assert not crew.is_complete()
  crew.hear(pulse(2))
  assert crew.is_complete()
  assert crew.judge(waited=99.0, patience=60.0) is None


def test_those_unheard_and_those_who_do_not_hear_this_worker_are_looked_up_again(
  crew: Joining,
):
  assert crew.out_of_touch() == [1, 2]
  crew.hear(pulse(1, 0, 2))
  crew.hear(pulse(2, 1))
  assert crew.out_of_touch() == [1]


def test_one_who_has_heard_all_may_fall_silent_to_others_later(crew: Joining):
  crew.hear(pulse(1))
  crew.hear(pulse(1, 2))  # it trains already, while 2 forms the cluster
  crew.hear(pulse(2))
  assert crew.is_complete()


def test_one_that_starts_again_has_to_hear_all_anew(crew: Joining):
  crew.hear(pulse(1))
  crew.hear(pulse(2))
  crew.hear(pulse(2, 1, life="another"))
  assert not crew.is_complete()


def test_a_process_by_itself_is_complete():
  assert Joining((), 0, facts=FACTS).is_complete()


def test_those_that_did_not_come_in_time_are_named(crew: Joining):
  crew.hear(pulse(1, 2))
  assert crew.judge(waited=60.0, patience=60.0) is None
  assert reason_after(crew, 61.0).startswith(
    "worker 2 at node11:2222 did not start within 60 s; see why"
  )


def test_one_that_is_heard_and_does_not_hear_is_named_with_the_way_that_is_lost(
  crew: Joining,
):
  crew.hear(pulse(1))
  crew.hear(pulse(2, 0))
  assert reason_after(crew, 61.0).startswith(
    "worker 2 at node11:2222 did not hear worker 0 (packets from node9:2222 to "
    "node11:2222 are lost on the way) within 60 s; see why"
  )


def test_a_way_lost_between_two_others_is_named_too(crew: Joining):
  crew.hear(pulse(1, 2))
  crew.hear(pulse(2))
  assert reason_after(crew, 61.0).startswith(
    "worker 1 at node10:2222 did not hear worker 2 (packets from node11:2222 to "
    "node10:2222 are lost on the way) within 60 s"
  )


def test_who_is_not_heard_learns_it_at_once_from_the_one_that_gives_up(crew: Joining):
  crew.hear(pulse(1, 0, exit_code=144, reason="worker 0 did not start."))
  assert reason_after(crew, 1.0) == (
    "worker 1 at node10:2222 left at step 0 with exit code 144: worker 0 did not "
    "start. This worker hears it: packets from node9:2222 to node10:2222 are lost on "
    "the way."
  )


def test_a_heartbeat_that_comes_after_the_last_words_of_its_sender_changes_nothing(
  crew: Joining,
):
  crew.hear(pulse(1, 0, exit_code=144, reason="worker 0 did not start."))
  crew.hear(pulse(1, 0))  # sent before, by another thread
  assert "left at step 0 with exit code 144" in reason_after(crew, 1.0)


def test_a_fault_for_good_of_one_at_the_start_is_one_of_all(crew: Joining):
  crew.hear(pulse(1, 2, exit_code=2, reason="the port is taken."))
  verdict = crew.judge(waited=1.0, patience=60.0)
  assert verdict is not None
  assert verdict.error().exit_code == errors.ExitCode.USAGE


def test_one_that_leaves_once_all_were_there_is_not_the_start_s_matter(crew: Joining):
  crew.hear(pulse(1))
  crew.hear(pulse(2, exit_code=0))
  assert crew.judge(waited=1.0, patience=60.0) is None


@pytest.mark.parametrize("index", [0, 3])
def test_a_heartbeat_from_outside_the_cluster_is_nobody_s(crew: Joining, index: int):
  crew.hear(pulse(index))
  assert crew.unheard() == [1, 2]


@pytest.mark.parametrize("name", ["version", "config"])
def test_a_peer_with_other_facts_is_refused_by_name(crew: Joining, name: str):
  crew.hear(pulse(2, facts=FACTS | {name: "zz"}))
  verdict = crew.judge(waited=1.0, patience=60.0)
  assert verdict is not None
  assert isinstance(verdict.error(), errors.ConfigError)
  assert f"worker 2 at node11:2222 does not belong to this run: {name} zz there" in (
    verdict.reason
  )
