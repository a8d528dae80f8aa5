"""Sends and hears heartbeats in a thread of its own, and ends what cannot go on.

Heartbeats are datagrams to the UDP port of each worker's cluster address; TensorFlow
holds the TCP port of that number. TensorFlow's own heartbeat runs in native threads,
so it does not see a worker that is stuck in Python, and names nobody.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

from absl import logging

from facedist.cluster import Cluster
from facedist.peers import muster, post, pulse, roster
from facedist.peers.diary import Diary
from facedist.peers.patience import Patience
from facedist.peers.verdict import Verdict

_BEATS_A_TIMEOUT = 10
_MOST_SECONDS_A_BEAT = 1.0
_SECONDS_A_BEAT_AT_START = 0.2
_PARTING_BEATS = 3  # sent once all are there, for those who have not heard of us
_SILENT_BEATS = 3  # after an error, a peer that missed so many was the cause
_LINE_SECONDS = 10.0


class Lookout:
  """Knows which peers live; ends this process when training cannot go on.

  The threads of a process that waits in a collective are out of Python's reach, so a
  verdict ends the process from the lookout's own thread: one line on stderr, for a
  stuck worker its stacks before it, and the verdict's exit code.
  """

  def __init__(
    self,
    cluster: Cluster,
    *,
    facts: Mapping[str, str],
    patience: Patience,
    on_beat: Callable[[], None] = lambda: None,
    end: Callable[[int], None] = os._exit,
  ) -> None:
    """Opens the port; nothing is sent yet.

    Args:
      cluster: Who the peers are; may be a process by itself.
      facts: What must be the same on every worker.
      patience: How long to wait for what.
      on_beat: Called with every heartbeat, such as to touch a file.
      end: Ends the process at once.

    Raises:
      errors.NotFormedError: The port is taken.
      errors.UsageError: This worker's address is wrong.
    """
    self._patience = patience
    self._on_beat = on_beat
    self._end = end
    self._seconds_a_beat = min(_MOST_SECONDS_A_BEAT, patience.peer / _BEATS_A_TIMEOUT)
    self._muster = muster.Muster(cluster.workers, cluster.index, facts=facts)
    self._roster = roster.Roster(
      cluster.workers, cluster.index, started=time.monotonic()
    )
    self._diary = Diary(cluster, facts=facts)
    self._is_guarding = self._is_finishing = self._has_met = False
    self._stopping = threading.Event()
    self._lock = threading.Lock()
    self._post = post.Post(cluster)
    self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)

  @property
  def is_chief(self) -> bool:
    """Whether this process is the chief."""
    return self._diary.pulse.index == 0

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
        verdict = self._muster.judge(waited=waited, patience=self._patience.start)
        is_complete = self._muster.is_complete()
      if verdict is not None:
        self.leave(verdict.exit_code, verdict.reason)
        raise verdict.error()
      if is_complete:
        time.sleep(_PARTING_BEATS * _SECONDS_A_BEAT_AT_START)
        with self._lock:
          self._roster.settle()
        return
      if waited > next_line:
        logging.info("not all are there: %s", self._muster.obstacles())
        next_line += _LINE_SECONDS
      time.sleep(_SECONDS_A_BEAT_AT_START / 2)

  def guard(self, count_gradients: Callable[[], int]) -> None:
    """From here on a lost or a stuck worker ends this process.

    Args:
      count_gradients: -> batches whose gradient this worker has computed; called from
        the lookout's thread.
    """
    self._diary.count(count_gradients)
    with self._lock:
      self._is_guarding = True

  def meet(self) -> None:
    """Returns once every worker has come here; to be called once, after `guard`.

    What comes next keeps every thread of Python from running, this lookout's too: as
    long as it waits here, a worker that is lost is named and one that is asked to stop
    does.
    """
    self._diary.arrive()
    self.note("waiting for all workers to be ready")
    while self._roster.behind(1):
      time.sleep(_SECONDS_A_BEAT_AT_START / 2)
    if self._roster.peers:
      time.sleep(_PARTING_BEATS * _SECONDS_A_BEAT_AT_START)
    self._has_met = True

  def finish(self) -> None:
    """From here on a peer that leaves as agreed, done or preempted, is no loss."""
    with self._lock:
      self._is_finishing = True

  def note(self, activity: str, *, step: int | None = None) -> None:
    """Says what this worker turns to now; that is progress, too."""
    self._diary.note(activity, step)

  def explain(self, *, is_loss: bool = True) -> Verdict | None:
    """Waits until it is clear which peer an error came from; None if it is not.

    Args:
      is_loss: Whether only a lost peer causes such an error; the wait is short if not.
    """
    silence = _SILENT_BEATS * self._seconds_a_beat
    seconds = self._patience.peer if is_loss else 2 * silence
    deadline = time.monotonic() + (seconds if self._roster.peers else 0.0)
    while time.monotonic() < deadline:
      with self._lock:
        now = time.monotonic()
        verdict = self._roster.lost(now, silence=silence, asks_others=False)
      if verdict is not None:
        return verdict
      time.sleep(self._seconds_a_beat / 2)
    return None

  def leave(self, exit_code: int, reason: str = "") -> None:
    """Tells the peers that this worker is about to end, and why; then falls silent."""
    if self._stopping.is_set():
      return
    self._stopping.set()
    self._diary.leave(exit_code, reason)
    for _ in range(2):  # a datagram may be lost
      self._post.send(pulse.encode(self._diary.pulse), look_up_again=None)
    if self._thread.is_alive() and self._thread is not threading.current_thread():
      self._thread.join(_MOST_SECONDS_A_BEAT)  # it may be looking up a name for long
    self._post.close()

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
          self._roster.excuse(asleep)
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
    for datagram in self._post.receive(until=until):
      heard = pulse.decode(datagram)
      if heard is not None and heard.run == self._diary.pulse.run:
        with self._lock:
          self._muster.hear(heard)
          self._roster.hear(heard, time.monotonic())

  def _update(self) -> None:
    """Brings up to date what this worker says of itself."""
    some = _SILENT_BEATS * self._seconds_a_beat
    with self._lock:
      unheard = self._muster.unheard()
      if self._is_guarding:
        unheard = self._roster.silent(time.monotonic(), some)
    self._diary.update(unheard)

  def _send(self) -> None:
    """Sends a heartbeat to every peer."""
    with self._lock:
      again = self._muster.out_of_touch()
    self._post.send(pulse.encode(self._diary.pulse), look_up_again=again)

  def _judge(self) -> None:
    """Ends the process if training cannot go on."""
    with self._lock:
      if not self._is_guarding or self._stopping.is_set():
        return
      verdict = self._roster.lost(
        time.monotonic(),
        silence=self._patience.peer,
        is_finishing=self._is_finishing,
      ) or self._roster.stuck(
        self._diary.pulse,
        patience=self._patience.step,
        politeness=_SILENT_BEATS * self._seconds_a_beat,
      )
    if verdict is None:
      return
    if verdict.is_own_fault:
      faulthandler.dump_traceback(all_threads=True)
    print(f"error: {verdict.reason}", file=sys.stderr, flush=True)
    self.leave(verdict.exit_code, verdict.reason)
    self._end(int(verdict.exit_code))
