"""What a worker says of itself."""

import time

import pytest

from facedist.distributed.cluster import Cluster
from facedist.distributed.heartbeat import HeartbeatLog


class Clock:
  """A clock that goes when it is told to."""

  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  made = Clock()
  monkeypatch.setattr(time, "monotonic", made)
  return made


def idle(diary: HeartbeatLog) -> float:
  """Returns for how long the worker says that it has got on with nothing."""
  diary.update([])
  return diary.pulse.idle


def test_a_gradient_a_note_and_an_arrival_are_progress_and_a_heartbeat_is_none(
  clock: Clock,
):
  diary = HeartbeatLog(Cluster(), facts={})
  gradients = [0]
  diary.count(lambda: gradients[0])
  clock.now += 5.0
  assert idle(diary) == 5.0
  clock.now += 5.0
  assert idle(diary) == 10.0
  gradients[0] += 1
  assert idle(diary) == 0.0
  clock.now += 5.0
  diary.note("saving", step=7)
  assert idle(diary) == 0.0
  assert (diary.pulse.activity, diary.pulse.step) == ("saving", 7)
  clock.now += 5.0
  assert idle(diary) == 5.0
  diary.arrive()
  assert idle(diary) == 0.0
