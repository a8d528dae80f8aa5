"""Sends and hears heartbeats in a thread of its own, and ends what cannot go on.

Heartbeats are datagrams to the UDP port of each worker's cluster address; TensorFlow
holds the TCP port of that number. TensorFlow's own heartbeat runs in native threads,
so it does not see a worker that is stuck in Python, and names nobody.

How long a worker waits for its peers, and for itself.

What a worker concludes of its peers: one line, and the exit code it calls for.

What a worker knows of its peers in training; no clock, no network.

Who has come at the start, and who hears whom; no clock, no network.

Training starts once every worker hears every other and knows it of all: a network that
loses one direction from the very start is found here, and not in TensorFlow's own
start, which waits for ever.
"""

import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from absl import logging

from facedist import errors
from facedist.distributed import heartbeat as heartbeats
from facedist.distributed.cluster import Cluster
from facedist.distributed.heartbeat import Heartbeat, HeartbeatLog


@dataclasses.dataclass(frozen=True)
class Timeouts:
  """How long to wait for what, in seconds.

  Attributes:
    start: For all peers to be there.
    peer: For a word of a peer.
    step: For the next step, or whatever this worker does between steps.
  """

  start: float
  peer: float
  step: float


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why this worker must end: one line, and the exit code that it calls for."""

  reason: str
  exit_code: errors.ExitCode
  is_own_fault: bool = False

  def error(self) -> errors.FacedistError:
    """Returns what to raise where the main thread can still end by itself."""
    is_config = self.exit_code == errors.ExitCode.CONFIG
    error = (errors.ConfigError if is_config else errors.PeerLostError)(self.reason)
    error.exit_code = self.exit_code
    return error


def worker_name(workers: Sequence[str], index: int) -> str:
  """Returns `worker 1 at host:port`."""
  return f"worker {index} at {workers[index]}"


def failure_of_leaver(workers: Sequence[str], left: Heartbeat) -> Failure | None:
  """Returns the failure on a peer that has said that it ends, and why; else None."""
  if left.exit_code is None:
    return None
  return Failure(
    f"{worker_name(workers, left.index)} left at step {left.step} with exit code "
    f"{left.exit_code}: {left.reason}",
    _exit_after(left.exit_code),
  )


def _exit_after(code: int) -> errors.ExitCode:
  """Returns what to exit with after a peer did with `code`.

  A fault for good of one is one of all, and so is a request to stop.
  """
  is_final = code < errors.FIRST_RESTART_CODE and code in set(errors.ExitCode)
  if is_final or code == errors.ExitCode.PREEMPTED:
    return errors.ExitCode(code)
  return errors.ExitCode.PEER_LOST


_AGREED_ENDS = (
  errors.ExitCode.DONE,
  errors.ExitCode.DIVERGED,
  errors.ExitCode.SAVING,
  errors.ExitCode.PREEMPTED,
  errors.ExitCode.DIFFERENT,
)


class PeerTable:
  """The workers of a cluster, when each was last heard of, and what it said then.

  All times are seconds of one monotonic clock.
  """

  def __init__(self, workers: Sequence[str], index: int, *, started: float) -> None:
    """Knows nothing of anybody yet.

    Args:
      workers: `host:port` of every worker, the chief first.
      index: This worker's place among them.
      started: The time now; silence counts from here.
    """
    self._workers = tuple(workers)
    self._index = index
    self._heard = dict.fromkeys(self.peers, started)
    self._last: dict[int, Heartbeat] = {}
    self._restarted: set[int] = set()

  @property
  def peers(self) -> list[int]:
    """The other workers' places."""
    return [place for place in range(len(self._workers)) if place != self._index]

  def name(self, index: int) -> str:
    """Returns `worker 1 at host:port`."""
    return worker_name(self._workers, index)

  def hear(self, heartbeat: Heartbeat, now: float) -> None:
    """Notes a heartbeat of this cluster; one from nowhere in it is left out."""
    if heartbeat.index not in self._heard:
      return
    before = self._last.get(heartbeat.index)
    if before is not None and before.life == heartbeat.life and before.has_left:
      return  # sent before its last words, and come after them
    if before is not None and before.life != heartbeat.life:
      self._restarted.add(heartbeat.index)
    self._last[heartbeat.index] = heartbeat
    self._heard[heartbeat.index] = now

  def settle(self) -> None:
    """Says that all are there: from here on one that starts again was lost."""
    self._restarted.clear()

  def behind(self, arrivals: int) -> list[int]:
    """Returns the peers that have not come as often to where all workers meet."""
    return [
      index
      for index in self.peers
      if index not in self._last or self._last[index].arrivals < arrivals
    ]

  def excuse(self, seconds: float) -> None:
    """Takes time out of all silences: this process itself did not run meanwhile."""
    for index in self._heard:
      self._heard[index] += seconds

  def silent(self, now: float, silence: float) -> list[int]:
    """Returns the peers without a word for that many seconds that have not left."""
    return [
      index
      for index in self.peers
      if now - self._heard[index] > silence and not self._has_left(index)
    ]

  def lost(
    self,
    now: float,
    *,
    silence: float,
    is_finishing: bool = False,
  ) -> Failure | None:
    """Returns the failure on a peer that has left, was started again, or is silent.

    Args:
      now: The time.
      silence: Seconds without a word after which a peer counts as lost.
      is_finishing: Whether all workers have agreed to end, so that some leave first.
    """
    for _, heartbeat in sorted(self._last.items()):
      found = failure_of_leaver(self._workers, heartbeat)
      if found and not (is_finishing and heartbeat.exit_code in _AGREED_ENDS):
        return found
    for index in sorted(self._restarted):
      return Failure(
        f"{self.name(index)} was lost and has started again; all workers must.",
        errors.ExitCode.PEER_LOST,
      )
    silent = self.silent(now, silence)
    if not silent:
      return None
    texts = [self._silent_text(index, now) for index in silent]
    return Failure(
      f"{'; '.join(texts)}. All workers started again go on from the newest "
      "checkpoint.",
      errors.ExitCode.PEER_LOST,
    )

  def stuck(
    self, own: Heartbeat, *, timeouts: float, politeness: float = 0.0
  ) -> Failure | None:
    """Returns the failure when this worker gets on with nothing: who holds it up.

    All workers meet in every step, so where one is stuck the others wait for it;
    the stuck ones are those that have arrived there less often than some other.

    Args:
      own: What this worker would say now.
      timeouts: Seconds of standing still that are too many.
      politeness: Seconds more that one who only waits leaves to the stuck ones, to
        print their stacks and to say so themselves.
    """
    if own.idle <= timeouts:
      return None
    arrivals = {index: heartbeat.arrivals for index, heartbeat in self._last.items()}
    most = max([own.arrivals, *arrivals.values()])
    if own.arrivals < most or all(count == most for count in arrivals.values()):
      return Failure(
        f"no progress for {own.idle:.0f} s at step {own.step} ({own.activity}); the "
        "stacks of all threads are above.",
        errors.ExitCode.STUCK,
        is_own_fault=True,
      )
    if own.idle <= timeouts + politeness:
      return None
    behind = [index for index in sorted(arrivals) if arrivals[index] < most]
    texts = [
      f"{self.name(index)} is alive, but stuck at step {self._last[index].step} "
      f"({self._last[index].activity}, {self._last[index].idle:.0f} s)"
      for index in behind
    ]
    return Failure(
      f"{'; '.join(texts)}. All workers started again go on from the newest "
      "checkpoint.",
      errors.ExitCode.PEER_LOST,
    )

  def _has_left(self, index: int) -> bool:
    """Says whether a peer has said that it leaves."""
    last = self._last.get(index)
    return last is not None and last.has_left

  def _silent_text(self, index: int, now: float) -> str:
    """Says for how long a peer has been silent, and what it did before."""
    seconds = now - self._heard[index]
    last = self._last[index]  # training starts once all were heard of
    return (
      f"{self.name(index)} has been silent for {seconds:.0f} s; last heard of at step "
      f"{last.step} ({last.activity})"
    )


ADVICE = "; see why, or wait longer with --start_timeout"


class Joining:
  """The workers of a cluster that have been heard of, and whom each of them hears."""

  def __init__(
    self, workers: Sequence[str], index: int, *, facts: Mapping[str, str]
  ) -> None:
    """Knows nothing of anybody yet.

    Args:
      workers: `host:port` of every worker, the chief first.
      index: This worker's place among them.
      facts: What must be the same on every worker, by name.
    """
    self._workers = tuple(workers)
    self._index = index
    self._facts = dict(facts)
    self._last: dict[int, Heartbeat] = {}

  def hear(self, heartbeat: Heartbeat) -> None:
    """Notes a heartbeat of this cluster; one from nowhere in it is left out."""
    if heartbeat.index == self._index or heartbeat.index not in range(
      len(self._workers)
    ):
      return
    before = self._last.get(heartbeat.index)
    if before is not None and before.life == heartbeat.life and before.has_left:
      return  # sent before its last words, and come after them
    self._last[heartbeat.index] = heartbeat

  def unheard(self) -> list[int]:
    """Returns the peers that have never been heard of."""
    places = range(len(self._workers))
    return [place for place in places if place not in {*self._last, self._index}]

  def out_of_touch(self) -> list[int]:
    """Returns the peers whose address may have changed: they do not hear all."""
    deaf = [place for place, last in self._last.items() if not last.hears_all]
    return [*self.unheard(), *deaf]

  def is_complete(self) -> bool:
    """Says whether all have come and each has said that it hears all the others."""
    return not self.out_of_touch()

  def judge(self, *, waited: float, timeouts: float) -> Failure | None:
    """Returns why this worker must end; None if all is well or may still become so.

    Args:
      waited: Seconds since the start.
      timeouts: Seconds to wait at most.
    """
    if stranger := self._stranger():
      return stranger
    if self.is_complete():
      return None
    for heartbeat in self._last.values():
      if found := failure_of_leaver(self._workers, heartbeat):
        return found
    if waited <= timeouts:
      return None
    return Failure(
      f"{self.obstacles()} within {timeouts:g} s{ADVICE}.",
      errors.ExitCode.PEER_LOST,
    )

  def obstacles(self) -> str:
    """Returns who has not come, and who does not hear all the others."""
    absent = self.unheard()
    texts = [f"{self._name(index)} did not start" for index in absent]
    if not absent:
      texts = [
        f"{self._name(index)} did not receive the heartbeats of all workers"
        for index in sorted(self.out_of_touch())
      ]
    return "; ".join(texts)

  def _stranger(self) -> Failure | None:
    """Returns the failure on a peer whose facts are not this worker's."""
    for index, heartbeat in sorted(self._last.items()):
      differing = [
        f"{name} {heartbeat.facts.get(name)} there, {value} here"
        for name, value in self._facts.items()
        if heartbeat.facts.get(name) != value
      ]
      if differing:
        return Failure(
          f"{self._name(index)} does not belong to this run: {'; '.join(differing)}; "
          "start all workers with the same version and flags.",
          errors.ExitCode.CONFIG,
        )
    return None

  def _name(self, index: int) -> str:
    return worker_name(self._workers, index)


_BEATS_A_TIMEOUT = 10
_MOST_SECONDS_A_BEAT = 1.0
_SECONDS_A_BEAT_AT_START = 0.2
_PARTING_BEATS = 3  # sent once all are there, for those who have not heard of us
_SILENT_BEATS = 3  # after an error, a peer that missed so many was the cause
_LINE_SECONDS = 10.0


class FailureDetector:
  """Knows which peers live; ends this process when training cannot go on.

  The threads of a process that waits in a collective are out of Python's reach, so a
  failure ends the process from the failure detector's own thread: one line on stderr,
  for a stuck worker its stacks before it, and the failure's exit code.
  """

  def __init__(
    self,
    cluster: Cluster,
    *,
    facts: Mapping[str, str],
    timeouts: Timeouts,
    on_beat: Callable[[], None] = lambda: None,
    end: Callable[[int], None] = os._exit,
  ) -> None:
    """Opens the port; nothing is sent yet.

    Args:
      cluster: Who the peers are; may be a process by itself.
      facts: What must be the same on every worker.
      timeouts: How long to wait for what.
      on_beat: Called with every heartbeat, such as to touch a file.
      end: Ends the process at once.

    Raises:
      errors.NotFormedError: The port is taken.
      errors.UsageError: This worker's address is wrong.
    """
    self._timeouts = timeouts
    self._on_beat = on_beat
    self._end = end
    self._seconds_a_beat = min(_MOST_SECONDS_A_BEAT, timeouts.peer / _BEATS_A_TIMEOUT)
    self._joining = Joining(cluster.workers, cluster.index, facts=facts)
    self._peers = PeerTable(cluster.workers, cluster.index, started=time.monotonic())
    self._log = HeartbeatLog(cluster, facts=facts)
    self._is_guarding = self._is_finishing = self._has_met = False
    self._stopping = threading.Event()
    self._lock = threading.Lock()
    self._transport = heartbeats.Transport(cluster)
    self._thread = threading.Thread(target=self._watch, name="detector", daemon=True)

  @property
  def is_chief(self) -> bool:
    """Whether this process is the chief."""
    return self._log.heartbeat.index == 0

  def start(self) -> None:
    """Starts to send and to hear."""
    self._thread.start()

  def wait_for_peers(self) -> None:
    """Returns once every worker hears every other, and all have said so.

    Raises:
      errors.PeerLostError: Some did not start in time, or are not heard by all; names
        them.
      errors.ConfigError: A peer has another version or config; names it.
    """
    started = time.monotonic()
    next_line = _LINE_SECONDS
    while True:
      waited = time.monotonic() - started
      with self._lock:
        failure = self._joining.judge(waited=waited, timeouts=self._timeouts.start)
        is_complete = self._joining.is_complete()
      if failure is not None:
        self.leave(failure.exit_code, failure.reason)
        raise failure.error()
      if is_complete:
        time.sleep(_PARTING_BEATS * _SECONDS_A_BEAT_AT_START)
        with self._lock:
          self._peers.settle()
        return
      if waited > next_line:
        logging.info("not all are there: %s", self._joining.obstacles())
        next_line += _LINE_SECONDS
      time.sleep(_SECONDS_A_BEAT_AT_START / 2)

  def guard(self, count_gradients: Callable[[], int]) -> None:
    """From here on a lost or a stuck worker ends this process.

    Args:
      count_gradients: -> batches whose gradient this worker has computed; called from
        the failure detector's thread.
    """
    self._log.count(count_gradients)
    with self._lock:
      self._is_guarding = True

  def meet(self) -> None:
    """Returns once every worker has come here; to be called once, after `guard`.

    What comes next keeps every thread of Python from running, this detector's too: as
    long as it waits here, a worker that is lost is named and one that is asked to stop
    does.
    """
    self._log.arrive()
    self.note("waiting for all workers to be ready")
    while self._peers.behind(1):
      time.sleep(_SECONDS_A_BEAT_AT_START / 2)
    if self._peers.peers:
      time.sleep(_PARTING_BEATS * _SECONDS_A_BEAT_AT_START)
    self._has_met = True

  def finish(self) -> None:
    """From here on a peer that leaves as agreed, done or preempted, is no loss."""
    with self._lock:
      self._is_finishing = True

  def note(self, activity: str, *, step: int | None = None) -> None:
    """Says what this worker turns to now; that is progress, too."""
    self._log.note(activity, step)

  def explain(self, *, is_loss: bool = True) -> Failure | None:
    """Waits until it is clear which peer an error came from; None if it is not.

    Args:
      is_loss: Whether only a lost peer causes such an error; the wait is short if not.
    """
    silence = _SILENT_BEATS * self._seconds_a_beat
    seconds = self._timeouts.peer if is_loss else 2 * silence
    deadline = time.monotonic() + (seconds if self._peers.peers else 0.0)
    while time.monotonic() < deadline:
      with self._lock:
        now = time.monotonic()
        failure = self._peers.lost(now, silence=silence)
      if failure is not None:
        return failure
      time.sleep(self._seconds_a_beat / 2)
    return None

  def leave(self, exit_code: int, reason: str = "") -> None:
    """Tells the peers that this worker is about to end, and why; then falls silent."""
    if self._stopping.is_set():
      return
    self._stopping.set()
    self._log.leave(exit_code, reason)
    for _ in range(2):  # a datagram may be lost
      self._transport.send(heartbeats.encode(self._log.heartbeat), look_up_again=None)
    if self._thread.is_alive() and self._thread is not threading.current_thread():
      self._thread.join(_MOST_SECONDS_A_BEAT)  # it may be looking up a name for long
    self._transport.close()

  def _watch(self) -> None:
    """Hears, sends and judges, until `leave`."""
    next_beat = 0.0
    before = time.monotonic()
    while not self._stopping.is_set():
      self._hear(until=next_beat)
      now = time.monotonic()
      if now < next_beat:
        continue
      asleep = now - before - self._seconds_a_beat
      if asleep > _SILENT_BEATS * self._seconds_a_beat:
        # Stopped and woken again: what peers said meanwhile waits in the socket.
        self._hear(until=now + self._seconds_a_beat)
        with self._lock:
          self._peers.excuse(asleep)
      before = now
      next_beat = now + (
        self._seconds_a_beat if self._has_met else _SECONDS_A_BEAT_AT_START
      )
      self._update()
      self._judge()  # right after it has heard: to send may take long, where names are
      self._send()  # looked up
      self._on_beat()

  def _hear(self, *, until: float) -> None:
    """Takes in heartbeats until the time comes."""
    for datagram in self._transport.receive(until=until):
      heard = heartbeats.decode(datagram)
      if heard is not None and heard.run == self._log.heartbeat.run:
        with self._lock:
          self._joining.hear(heard)
          self._peers.hear(heard, time.monotonic())

  def _update(self) -> None:
    """Brings up to date what this worker says of itself."""
    with self._lock:
      hears_all = not self._joining.unheard()
    self._log.update(hears_all=hears_all)

  def _send(self) -> None:
    """Sends a heartbeat to every peer."""
    with self._lock:
      again = self._joining.out_of_touch()
    self._transport.send(heartbeats.encode(self._log.heartbeat), look_up_again=again)

  def _judge(self) -> None:
    """Ends the process if training cannot go on."""
    with self._lock:
      if not self._is_guarding or self._stopping.is_set():
        return
      failure = self._peers.lost(
        time.monotonic(),
        silence=self._timeouts.peer,
        is_finishing=self._is_finishing,
      ) or self._peers.stuck(
        self._log.heartbeat,
        timeouts=self._timeouts.step,
        politeness=_SILENT_BEATS * self._seconds_a_beat,
      )
    if failure is None:
      return
    if failure.is_own_fault:
      faulthandler.dump_traceback(all_threads=True)
    print(f"error: {failure.reason}", file=sys.stderr, flush=True)
    self.leave(failure.exit_code, failure.reason)
    self._end(int(failure.exit_code))
