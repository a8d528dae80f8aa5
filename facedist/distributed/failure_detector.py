"""Detects lost and stuck workers, and ends this process when training cannot continue.

Every worker sends heartbeats to every other worker (heartbeat.py) from a thread of its
own. TensorFlow's own heartbeat runs in native threads: it does not notice a worker that
is stuck in Python, and its errors name no worker.

A detector is in one of three states, in this order:

- JOINING: `join` waits until every worker receives the heartbeats of all others. Only
  then TensorFlow starts, which would wait for ever for a worker that it cannot reach.
- TRAINING: a peer that leaves, restarts or is silent ends this process, and so does a
  worker that makes no progress.
- FINISHING: as TRAINING, but peers may leave with an exit code that all agreed on.
"""

import dataclasses
import enum
import faulthandler
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping

from absl import logging

from facedist import errors
from facedist.distributed import heartbeat as heartbeats
from facedist.distributed.cluster import Cluster
from facedist.distributed.heartbeat import Heartbeat

_JOIN_INTERVAL = 0.2  # seconds between heartbeats until training starts
_MAX_INTERVAL = 1.0  # seconds between heartbeats in training
_HEARTBEATS_A_TIMEOUT = 10
_MISSED_HEARTBEATS = 3  # after an error, a peer that missed so many was the cause
_LOG_SECONDS = 10.0

_AGREED_EXITS = (
  errors.ExitCode.DONE,
  errors.ExitCode.DIVERGED,
  errors.ExitCode.SAVING,
  errors.ExitCode.PREEMPTED,
  errors.ExitCode.DIFFERENT,
)
"""What all workers end with together; one of them leaves first."""

_RESTART = "Start all workers again to continue from the newest checkpoint."


class State(enum.Enum):
  """How far this worker is; see the module."""

  JOINING = "joining"
  TRAINING = "training"
  FINISHING = "finishing"


@dataclasses.dataclass(frozen=True)
class Timeouts:
  """How long to wait, in seconds.

  Attributes:
    start: Until all workers have joined.
    peer: For a heartbeat of a peer.
    step: For the next step, or for whatever this worker does between steps.
  """

  start: float
  peer: float
  step: float


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why this worker must end: one line, and the exit code.

  Attributes:
    reason: The line.
    exit_code: What to end with.
    is_own_fault: Whether this worker is the stuck one, so that its stacks are printed.
  """

  reason: str
  exit_code: errors.ExitCode
  is_own_fault: bool = False

  def error(self) -> errors.FacedistError:
    """Returns what to raise where the main thread can still end by itself."""
    is_config = self.exit_code == errors.ExitCode.CONFIG
    error = (errors.ConfigError if is_config else errors.PeerLostError)(self.reason)
    error.exit_code = self.exit_code
    return error


@dataclasses.dataclass
class _Peer:
  """Another worker, as its last heartbeat described it.

  Attributes:
    name: `worker 1 at host:port`.
    last_seen: Time of its last heartbeat; of the detector's start if there is none.
    heartbeat: The last one, if any.
    clock_offset: Seconds that its clock is ahead of this worker's, about.
    has_restarted: Whether its process was replaced after all workers had joined.
  """

  name: str
  last_seen: float
  heartbeat: Heartbeat | None = None
  clock_offset: float = 0.0
  has_restarted: bool = False

  @property
  def has_joined(self) -> bool:
    """Whether it is there and receives the heartbeats of all workers."""
    return self.heartbeat is not None and self.heartbeat.receives_all

  @property
  def has_left(self) -> bool:
    """Whether it has said that it ends."""
    return self.heartbeat is not None and self.heartbeat.has_left

  @property
  def sync_points(self) -> int:
    """Times it has reached a point where all workers meet."""
    return self.heartbeat.sync_points if self.heartbeat is not None else 0


class FailureDetector:
  """Knows which peers live; ends this process when training cannot continue.

  A thread that waits in a collective cannot be reached from Python, so the detector's
  own thread ends the process: one line on stderr, for a stuck worker the stacks of all
  threads before it, and the exit code of the failure.
  """

  def __init__(
    self,
    cluster: Cluster,
    *,
    facts: Mapping[str, str],
    timeouts: Timeouts,
    on_heartbeat: Callable[[], None] = lambda: None,
    end: Callable[[int], None] = os._exit,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Opens the port; nothing is sent yet.

    Args:
      cluster: Who the peers are; may be a single process.
      facts: What must be the same on every worker, by name.
      timeouts: How long to wait.
      on_heartbeat: Called with every heartbeat, such as to touch a file.
      end: Ends the process at once. If it returns, `synchronize` raises the failure.
      clock: Seconds; decides about silence and progress.

    Raises:
      errors.NotFormedError: The port is taken.
      errors.UsageError: This worker's address is wrong.
    """
    self._timeouts = timeouts
    self._on_heartbeat = on_heartbeat
    self._end = end
    self._clock = clock
    self._interval = min(_MAX_INTERVAL, timeouts.peer / _HEARTBEATS_A_TIMEOUT)
    self._transport = heartbeats.Transport(cluster)
    self._thread = threading.Thread(target=self._run, name="detector", daemon=True)
    self._stopping = threading.Event()
    self._lock = threading.Lock()  # for all that follows
    self._state = State.JOINING
    self._started = self._last_progress = clock()
    self._peers = {
      index: _Peer(f"worker {index} at {address}", self._started)
      for index, address in enumerate(cluster.workers)
      if index != cluster.index
    }
    self._own = Heartbeat(
      cluster=heartbeats.cluster_id(cluster.workers),
      index=cluster.index,
      process=uuid.uuid4().hex,
      facts=dict(facts),
    )
    self._meetings = 0
    self._count_gradients: Callable[[], int] = lambda: 0
    self._has_synchronized = False
    self._failure: Failure | None = None

  @property
  def is_chief(self) -> bool:
    """Whether this process is the chief."""
    return self._own.index == 0

  # What the main thread calls, in this order.

  def start(self) -> None:
    """Starts to send and to receive heartbeats."""
    self._thread.start()

  def join(self) -> None:
    """Returns once every worker receives the heartbeats of all others.

    Raises:
      errors.PeerLostError: Some did not join in time; names them.
      errors.ConfigError: A peer has another version or config; names it.
    """
    next_line = self._clock() + _LOG_SECONDS
    while True:
      have_joined = not self._missing()
      if failure := self.find_failure():
        self.leave(failure.exit_code, failure.reason)
        raise failure.error()
      if have_joined:
        break
      if self._clock() > next_line:
        logging.info("waiting for workers: %s", self._describe_missing())
        next_line += _LOG_SECONDS
      time.sleep(_JOIN_INTERVAL / 2)
    self._send_some_heartbeats()

  def clock_offsets(self) -> dict[int, float]:
    """Returns about how many seconds each peer's clock is ahead of this worker's."""
    return {index: peer.clock_offset for index, peer in self._peers.items()}

  def begin_training(self, count_gradients: Callable[[], int]) -> None:
    """From here on a lost or a stuck worker ends this process.

    Args:
      count_gradients: -> batches whose gradient this worker has computed; called from
        the detector's thread.
    """
    with self._lock:
      self._count_gradients = count_gradients
      self._last_progress = self._clock()
      self._state = State.TRAINING

  def synchronize(self) -> None:
    """Returns once every worker has called this as often; after `begin_training`.

    TensorFlow may then form its cluster, which keeps every Python thread from running,
    the detector's too. While this waits, lost workers are detected and signals are
    handled.

    Raises:
      errors.FacedistError: The detector found a failure, and `end` returned.
    """
    with self._lock:
      self._meetings += 1
    self.note("waiting for all workers to be ready")
    while any(peer.sync_points < self._meetings for peer in self._peers.values()):
      if self._failure is not None:
        raise self._failure.error()
      time.sleep(_JOIN_INTERVAL / 2)
    self._send_some_heartbeats()
    self._has_synchronized = True

  def note(self, activity: str, *, step: int | None = None) -> None:
    """Says what this worker turns to now; that counts as progress."""
    with self._lock:
      step = self._own.step if step is None else step
      self._own = dataclasses.replace(self._own, activity=activity, step=step)
      self._last_progress = self._clock()

  def finish(self) -> None:
    """From here on a peer that leaves as agreed, done or preempted, is not lost."""
    with self._lock:
      self._state = State.FINISHING

  def explain(self, *, is_loss: bool = True) -> Failure | None:
    """Waits until it is clear which peer caused an error; None if none did.

    Args:
      is_loss: Whether only a lost peer causes such an error; the wait is short if not.
    """
    silence = _MISSED_HEARTBEATS * self._interval
    seconds = self._timeouts.peer if is_loss else 2 * silence
    deadline = self._clock() + (seconds if self._peers else 0.0)
    while self._clock() < deadline:
      with self._lock:
        if failure := self._find_lost(silence=silence):
          return failure
      time.sleep(self._interval / 2)
    return None

  def leave(self, exit_code: int, reason: str = "") -> None:
    """Tells the peers that this worker ends, and why; then sends nothing more."""
    self._refresh()  # a peer that waits in `synchronize` must see that this one did
    with self._lock:
      if self._stopping.is_set():
        return
      self._stopping.set()
      self._own = dataclasses.replace(
        self._own, exit_code=int(exit_code), reason=reason
      )
    for _ in range(2):  # a datagram may be lost
      self._transport.send(heartbeats.encode(self._own), look_up=None)
    if self._thread.is_alive() and self._thread is not threading.current_thread():
      self._thread.join(_MAX_INTERVAL)  # it may be resolving a name for long
    self._transport.close()

  # What the detector's thread does.

  def _run(self) -> None:
    """Receives, decides and sends, until `leave`."""
    next_time = 0.0
    before = self._clock()
    while not self._stopping.is_set():
      self._receive_until(next_time)
      now = self._clock()
      paused = now - before - self._interval
      before = now
      if paused > _MISSED_HEARTBEATS * self._interval:
        # This process was stopped and woken up. Heartbeats sent meanwhile wait in the
        # socket, and the silence of the pause is not the peers'.
        self._receive_until(time.monotonic() + self._interval)
        self._forgive_silence(paused)
      interval = self._interval if self._has_synchronized else _JOIN_INTERVAL
      next_time = time.monotonic() + interval
      is_joining = self._state is State.JOINING
      failure = self.find_failure()
      if failure is not None and not is_joining:  # `join` raises what it finds itself
        self._end_process(failure)
        return
      # last, because resolving names may take long
      self._transport.send(heartbeats.encode(self._own), look_up=self._missing())
      self._on_heartbeat()

  def _receive_until(self, until: float) -> None:
    """Receives heartbeats until a time."""
    for datagram in self._transport.receive(until=until):
      self.receive(datagram)

  def receive(self, datagram: bytes) -> None:
    """Takes in a heartbeat of a peer; ignores any other datagram."""
    heartbeat = heartbeats.decode(datagram)
    if heartbeat is None or heartbeat.cluster != self._own.cluster:
      return
    with self._lock:
      peer = self._peers.get(heartbeat.index)
      if peer is None:
        return
      last = peer.heartbeat
      is_same = last is None or last.process == heartbeat.process
      if is_same and peer.has_left:
        return  # sent before the last one, but received after it
      if not is_same and self._state is not State.JOINING:
        peer.has_restarted = True
      peer.heartbeat = heartbeat
      peer.last_seen = self._clock()
      peer.clock_offset = heartbeat.sent_at - time.time()

  def _refresh(self) -> None:
    """Updates what changes by itself in this worker's heartbeat."""
    gradients = self._count_gradients()
    with self._lock:
      now = self._clock()
      sync_points = self._meetings + gradients
      if sync_points != self._own.sync_points:
        self._last_progress = now
      self._own = dataclasses.replace(
        self._own,
        sync_points=sync_points,
        sent_at=time.time(),
        idle=round(now - self._last_progress, 1),
        receives_all=all(peer.heartbeat is not None for peer in self._peers.values()),
      )

  def _forgive_silence(self, seconds: float) -> None:
    """Does not count seconds in which this process itself did not run."""
    with self._lock:
      for peer in self._peers.values():
        peer.last_seen += seconds

  def _end_process(self, failure: Failure) -> None:
    """Says why, to stderr and to the peers, and ends the process."""
    if self._stopping.is_set():
      return
    if failure.is_own_fault:
      faulthandler.dump_traceback(all_threads=True)
    print(f"error: {failure.reason}", file=sys.stderr, flush=True)
    self.leave(failure.exit_code, failure.reason)
    self._end(int(failure.exit_code))
    self._failure = failure

  def _send_some_heartbeats(self) -> None:
    """Lets the thread tell the peers what has just changed."""
    if self._peers:
      time.sleep(_MISSED_HEARTBEATS * _JOIN_INTERVAL)

  # How it decides.

  def find_failure(self) -> Failure | None:
    """Returns why this worker must end now; None if it need not."""
    self._refresh()
    with self._lock:
      if self._state is State.JOINING:
        return self._find_different() or self._find_not_joined()
      agreed = _AGREED_EXITS if self._state is State.FINISHING else ()
      return (
        self._find_lost(silence=self._timeouts.peer, agreed=agreed)
        or self._find_stuck()
      )

  def _missing(self) -> list[int]:
    """Returns the peers that have not joined; their addresses may have changed."""
    return [index for index, peer in self._peers.items() if not peer.has_joined]

  def _describe_missing(self) -> str:
    """Says which peers did not start or, if all did, which do not receive all."""
    absent = [peer.name for peer in self._peers.values() if peer.heartbeat is None]
    if absent:
      return "; ".join(f"{name} did not start" for name in absent)
    return "; ".join(
      f"{self._peers[index].name} did not receive the heartbeats of all workers"
      for index in self._missing()
    )

  def _find_different(self) -> Failure | None:
    """Finds a peer whose facts are not this worker's."""
    for peer in self._peers.values():
      if peer.heartbeat is None:
        continue
      differing = [
        f"{name} {peer.heartbeat.facts.get(name)} there, {value} here"
        for name, value in self._own.facts.items()
        if peer.heartbeat.facts.get(name) != value
      ]
      if differing:
        return Failure(
          f"{peer.name} does not belong to this run: {'; '.join(differing)}; "
          "start all workers with the same version and flags.",
          errors.ExitCode.CONFIG,
        )
    return None

  def _find_not_joined(self) -> Failure | None:
    """Finds a peer that left before all had joined, or did not join in time."""
    if not self._missing():
      return None
    if failure := self._find_left():
      return failure
    if self._clock() - self._started <= self._timeouts.start:
      return None
    return Failure(
      f"{self._describe_missing()} within {self._timeouts.start:g} s; see why, or wait "
      "longer with --start_timeout.",
      errors.ExitCode.PEER_LOST,
    )

  def _find_left(self, agreed: Iterable[int] = ()) -> Failure | None:
    """Finds a peer that has left with an exit code other than the agreed ones."""
    for peer in self._peers.values():
      last = peer.heartbeat
      if last is None or last.exit_code is None or last.exit_code in agreed:
        continue
      return Failure(
        f"{peer.name} left at step {last.step} with exit code {last.exit_code}: "
        f"{last.reason}",
        _exit_after(last.exit_code),
      )
    return None

  def _find_lost(self, *, silence: float, agreed: Iterable[int] = ()) -> Failure | None:
    """Finds peers that have left, restarted, or been silent for so many seconds."""
    if failure := self._find_left(agreed):
      return failure
    for peer in self._peers.values():
      if peer.has_restarted:
        return Failure(
          f"{peer.name} was lost and has started again; all workers must.",
          errors.ExitCode.PEER_LOST,
        )
    now = self._clock()
    texts = [
      f"{peer.name} has been silent for {now - peer.last_seen:.0f} s; last heard of at "
      f"step {peer.heartbeat.step} ({peer.heartbeat.activity})"
      for peer in self._peers.values()
      if peer.heartbeat is not None
      and not peer.has_left
      and now - peer.last_seen > silence
    ]
    if not texts:
      return None
    return Failure(f"{'; '.join(texts)}. {_RESTART}", errors.ExitCode.PEER_LOST)

  def _find_stuck(self) -> Failure | None:
    """Finds the stuck worker once this worker has made no progress for too long.

    All workers meet in every step, so when one is stuck the others wait for it. The
    stuck ones have reached fewer sync points. A worker that only waits gives them some
    seconds more, to print their stacks and to report it themselves.
    """
    own = self._own
    if own.idle <= self._timeouts.step:
      return None
    peers = [peer for peer in self._peers.values() if peer.heartbeat is not None]
    most = max([own.sync_points, *(peer.sync_points for peer in peers)])
    behind = [peer for peer in peers if peer.sync_points < most]
    if own.sync_points < most or not behind:
      return Failure(
        f"no progress for {own.idle:.0f} s at step {own.step} ({own.activity}); the "
        "stacks of all threads are above.",
        errors.ExitCode.STUCK,
        is_own_fault=True,
      )
    if own.idle <= self._timeouts.step + _MISSED_HEARTBEATS * self._interval:
      return None
    texts = [
      f"{peer.name} is alive, but stuck at step {last.step} "
      f"({last.activity}, {last.idle:.0f} s)"
      for peer in behind
      if (last := peer.heartbeat) is not None
    ]
    return Failure(f"{'; '.join(texts)}. {_RESTART}", errors.ExitCode.PEER_LOST)


def _exit_after(code: int) -> errors.ExitCode:
  """Returns what to exit with after a peer left with an exit code.

  A permanent fault of one worker is one of all, and so is a request to stop.
  """
  is_permanent = code < errors.FIRST_RESTART_CODE and code in set(errors.ExitCode)
  if is_permanent or code == errors.ExitCode.PREEMPTED:
    return errors.ExitCode(code)
  return errors.ExitCode.PEER_LOST
