"""Two detectors in one process, over real datagrams on loopback.

Silence and standstill are measured in real time, and a busy machine may keep a thread
waiting for seconds. So a test waits for what happens and not for a time, and where
nothing must happen, the times allowed are longer than any wait.
"""

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from facedist import errors
from facedist.distributed import heartbeat
from facedist.distributed.cluster import Cluster
from facedist.distributed.detect import free_addresses
from facedist.distributed.failure_detector import FailureDetector, Timeouts

FACTS = {"version": "1", "config": "a"}
LONG = 3600.0  # seconds; nothing here takes that
PATIENCE = Timeouts(start=LONG, peer=LONG, step=LONG)
SILENCE = dataclasses.replace(PATIENCE, peer=2.0)
STANDSTILL = dataclasses.replace(PATIENCE, step=2.0)
MAX_SECONDS = 120.0  # for what must happen
Make = Callable[..., tuple[FailureDetector, list[int]]]


@pytest.fixture
def workers() -> tuple[str, ...]:
  """Two addresses on loopback whose ports are free."""
  return free_addresses(2)


@pytest.fixture
def make(workers: tuple[str, ...]) -> Iterator[Make]:
  """Makes detectors; each comes with the list of exit codes that it ended with."""
  made = []

  def make_one(index: int, **more) -> tuple[FailureDetector, list[int]]:
    codes: list[int] = []
    settings = {"facts": FACTS, "timeouts": PATIENCE, "end": codes.append} | more
    made.append(FailureDetector(Cluster(workers, index), **settings))
    return made[-1], codes

  yield make_one
  for detector in made:
    fall_silent(detector)


def fall_silent(detector: FailureDetector) -> None:
  """Stops a failure detector as a kill would: without another word."""
  detector._stopping.set()
  if detector._thread.is_alive():
    detector._thread.join()
  detector._transport.close()


class Beats:
  """Counts the heartbeats of a failure detector, as its `on_beat`."""

  def __init__(self) -> None:
    self._count = 0
    self._changed = threading.Condition()

  def __call__(self) -> None:
    with self._changed:
      self._count += 1
      self._changed.notify_all()

  def wait(self, more: int = 2) -> None:
    """Waits for as many more; two, so that one says all that was said before."""
    with self._changed:
      wanted = self._count + more
      assert self._changed.wait_for(lambda: self._count >= wanted, MAX_SECONDS)


def started(*detectors: FailureDetector) -> None:
  """Starts them and waits until each has heard of the others."""
  for detector in detectors:
    detector.start()
  threads = [threading.Thread(target=detector.wait_for_peers) for detector in detectors]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def until(codes: list[int]) -> int:
  """Waits for an exit code."""
  deadline = time.monotonic() + MAX_SECONDS
  while not codes:
    assert time.monotonic() < deadline, "nothing ended"
    time.sleep(0.02)
  return codes[0]


def test_a_peer_that_falls_silent_ends_the_other_and_is_named(
  make: Make, capfd: pytest.CaptureFixture
):
  beats = Beats()
  (first, codes), (second, _) = make(0, timeouts=SILENCE), make(1, on_beat=beats)
  started(first, second)
  second.note("saving", step=12)
  beats.wait()
  fall_silent(second)
  first.guard(lambda: 0)
  assert until(codes) == errors.ExitCode.PEER_LOST
  error = capfd.readouterr().err
  assert "error: worker 1 at 127.0.0.1:" in error
  assert "last heard of at step 12 (saving)" in error


def test_where_packets_are_lost_one_way_both_find_a_lost_peer(
  make: Make, capfd: pytest.CaptureFixture
):
  (first, codes), (second, others) = make(0, timeouts=SILENCE), make(1)
  started(first, second)
  first.guard(lambda: 0)
  second.guard(lambda: 0)
  second._transport.send = lambda *_, **__: None  # the network loses what it sends
  assert until(codes) == until(others) == errors.ExitCode.PEER_LOST
  error = capfd.readouterr().err
  assert "error: worker 1 at 127.0.0.1:" in error
  assert "error: worker 0 at 127.0.0.1:" in error
  assert "left at step 0 with exit code 144: worker 1 at" in error


def test_one_that_leaves_says_why(make: Make, capfd: pytest.CaptureFixture):
  (first, codes), (second, _) = make(0), make(1)
  started(first, second)
  first.guard(lambda: 0)
  second.leave(errors.ExitCode.DATA, "the shard is gone.")
  assert until(codes) == errors.ExitCode.DATA
  assert "left at step 0 with exit code 4: the shard is gone." in (
    capfd.readouterr().err
  )


def test_one_that_leaves_as_agreed_ends_nobody(make: Make):
  beats = Beats()
  (first, codes), (second, _) = make(0, timeouts=SILENCE, on_beat=beats), make(1)
  started(first, second)
  second.leave(errors.ExitCode.PREEMPTED)
  first.finish()
  first.guard(lambda: 0)
  time.sleep(2 * SILENCE.peer)
  beats.wait()
  assert codes == []


def test_an_error_is_explained_by_the_peer_that_is_silent(make: Make):
  (first, _), (second, _) = make(0, timeouts=SILENCE), make(1)
  started(first, second)
  fall_silent(second)
  failure = first.explain()
  assert failure is not None
  assert "worker 1 at" in failure.reason


def test_without_a_lost_peer_there_is_no_explanation(
  make: Make, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr("facedist.distributed.failure_detector._SILENT_BEATS", 10_000)
  (first, _), (second, _) = make(0, timeouts=SILENCE), make(1)
  started(first, second)
  assert first.explain() is None


def test_a_worker_that_never_starts_is_named(make: Make):
  detector, _ = make(0, timeouts=dataclasses.replace(PATIENCE, start=0.5))
  detector.start()
  with pytest.raises(errors.PeerLostError, match=r"worker 1 at .* did not start"):
    detector.wait_for_peers()


def test_one_that_is_heard_and_does_not_hear_is_waited_for_and_named(
  make: Make, workers: tuple[str, ...]
):
  timeouts = dataclasses.replace(PATIENCE, start=3.0)
  beats = Beats()
  (first, _), (second, _) = make(0, timeouts=timeouts), make(1, on_beat=beats)
  first._transport.send = lambda *_, **__: None  # the network loses what it sends
  second.start()
  beats.wait()
  first.start()
  with pytest.raises(errors.PeerLostError) as caught:
    first.wait_for_peers()
  assert str(caught.value).startswith(
    f"worker 1 at {workers[1]} did not receive the heartbeats of all workers within 3 s"
  )


@pytest.mark.parametrize(("name", "value"), [("version", "2"), ("config", "b")])
def test_a_peer_of_another_version_or_config_is_refused_on_both_sides(
  make: Make, name: str, value: str
):
  (first, _), (second, _) = make(0), make(1, facts=FACTS | {name: value})
  first.start()
  second.start()
  refusals = []

  def refuse(detector: FailureDetector) -> None:
    with pytest.raises(errors.ConfigError) as caught:
      detector.wait_for_peers()
    refusals.append(str(caught.value))

  threads = [threading.Thread(target=refuse, args=(one,)) for one in (first, second)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(MAX_SECONDS)
  assert len(refusals) == 2
  assert all(f"{name} " in refusal for refusal in refusals)


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_stuck_worker_prints_its_stacks_and_is_named_on_the_other(
  make: Make, stuck: int, capfd: pytest.CaptureFixture
):
  beats = Beats()
  first, codes = make(1 - stuck, on_beat=beats)
  second, own = make(stuck, timeouts=STANDSTILL)
  started(first, second)
  first.guard(lambda: 7)  # has computed one gradient more
  beats.wait()
  second.note("reading", step=6)
  second.guard(lambda: 6)
  assert until(own) == errors.ExitCode.STUCK
  assert until(codes) == errors.ExitCode.PEER_LOST
  error = capfd.readouterr().err
  assert "most recent call first" in error  # faulthandler's stacks
  assert "no progress for" in error
  assert f"worker {stuck} at" in error


def test_every_heartbeat_calls_back(make: Make):
  beats = Beats()
  detector, _ = make(0, on_beat=beats)
  detector.start()
  beats.wait(3)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_taken_port_is_an_error_that_names_it(
  make: Make,
  workers: tuple[str, ...],
  kind: socket.SocketKind,
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.setattr(heartbeat, "_PORT_SECONDS", 0.3)
  with taken(workers[0], kind), pytest.raises(errors.NotFormedError, match=workers[0]):
    make(0)


def test_a_port_that_is_freed_soon_is_waited_for(make: Make, workers: tuple[str, ...]):
  holder = taken(workers[0], socket.SOCK_STREAM)
  threading.Timer(0.5, holder.close).start()
  make(0)
  assert holder.fileno() == -1


def taken(address: str, kind: socket.SocketKind) -> socket.socket:
  """Returns a socket that holds a port."""
  holder = socket.socket(socket.AF_INET, kind)
  holder.bind(("127.0.0.1", int(address.rpartition(":")[2])))
  if kind == socket.SOCK_STREAM:
    holder.listen()
  return holder


def test_all_go_on_together_once_the_last_has_come(make: Make):
  beats = Beats()
  (first, codes), (second, _) = make(0), make(1, on_beat=beats)
  started(first, second)
  for detector in (first, second):
    detector.guard(lambda: 0)
  waiting = threading.Thread(target=first.meet)
  waiting.start()
  beats.wait(5)
  assert waiting.is_alive()
  second.meet()
  waiting.join(MAX_SECONDS)
  assert not waiting.is_alive()
  assert codes == []


def test_who_is_stuck_before_the_meeting_is_told_from_who_waits_there(
  make: Make, capfd: pytest.CaptureFixture
):
  beats = Beats()
  first, codes = make(0, on_beat=beats)
  second, own = make(1, timeouts=STANDSTILL)
  started(first, second)
  first.guard(lambda: 0)
  threading.Thread(target=first.meet, daemon=True).start()
  beats.wait()
  second.guard(lambda: 0)
  assert until(own) == errors.ExitCode.STUCK
  assert until(codes) == errors.ExitCode.PEER_LOST
  assert "worker 1 at" in capfd.readouterr().err
