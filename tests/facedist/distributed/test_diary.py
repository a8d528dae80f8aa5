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


def idle(log: HeartbeatLog) -> float:
  """Returns for how long the worker says that it has got on with nothing."""
  log.update(hears_all=True)
  return log.heartbeat.idle


def test_a_gradient_a_note_and_an_arrival_are_progress_and_a_heartbeat_is_none(
  clock: Clock,
):
  log = HeartbeatLog(Cluster(), facts={})
  gradients = [0]
  log.count(lambda: gradients[0])
  clock.now += 5.0
  assert idle(log) == 5.0
  clock.now += 5.0
  assert idle(log) == 10.0
  gradients[0] += 1
  assert idle(log) == 0.0
  clock.now += 5.0
  log.note("saving", step=7)
  assert idle(log) == 0.0
  assert (log.heartbeat.activity, log.heartbeat.step) == ("saving", 7)
  clock.now += 5.0
  assert idle(log) == 5.0
  log.arrive()
  assert idle(log) == 0.0
