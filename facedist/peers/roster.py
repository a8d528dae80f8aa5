"""What a worker knows of its peers in training; no clock, no network."""

from collections.abc import Sequence

from facedist import errors
from facedist.peers import verdict
from facedist.peers.pulse import Pulse
from facedist.peers.verdict import Verdict

_AGREED_ENDS = (
  errors.ExitCode.DONE,
  errors.ExitCode.DIVERGED,
  errors.ExitCode.SAVING,
  errors.ExitCode.PREEMPTED,
  errors.ExitCode.DIFFERENT,
)


class Roster:
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
    self._last: dict[int, Pulse] = {}
    self._restarted: set[int] = set()

  @property
  def peers(self) -> list[int]:
    """The other workers' places."""
    return [place for place in range(len(self._workers)) if place != self._index]

  def name(self, index: int) -> str:
    """Returns `worker 1 at host:port`."""
    return verdict.name(self._workers, index)

  def hear(self, pulse: Pulse, now: float) -> None:
    """Notes a heartbeat of this cluster; one from nowhere in it is left out."""
    if pulse.index not in self._heard:
      return
    before = self._last.get(pulse.index)
    if before is not None and before.life == pulse.life and before.has_left:
      return  # sent before its last words, and come after them
    if before is not None and before.life != pulse.life:
      self._restarted.add(pulse.index)
    self._last[pulse.index] = pulse
    self._heard[pulse.index] = now

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
    asks_others: bool = True,
  ) -> Verdict | None:
    """Returns the verdict on a peer that has left, was started again, or is silent.

    Args:
      now: The time.
      silence: Seconds without a word after which a peer counts as lost.
      is_finishing: Whether all workers have agreed to end, so that some leave first.
      asks_others: Whether to say who still hears a silent peer; what they say is some
        heartbeats old.
    """
    for _, pulse in sorted(self._last.items()):
      found = verdict.on_leaver(self._workers, self._index, pulse)
      if found and not (is_finishing and pulse.exit_code in _AGREED_ENDS):
        return found
    for index in sorted(self._restarted):
      return Verdict(
        f"{self.name(index)} was lost and has started again; all workers must.",
        errors.ExitCode.PEER_LOST,
      )
    silent = self.silent(now, silence)
    if not silent:
      return None
    texts = [self._silent_text(index, now) for index in silent]
    if asks_others:
      texts += self._witness_texts(silent)
    return Verdict(
      f"{'; '.join(texts)}. All workers started again go on from the newest "
      "checkpoint.",
      errors.ExitCode.PEER_LOST,
    )

  def stuck(
    self, own: Pulse, *, patience: float, politeness: float = 0.0
  ) -> Verdict | None:
    """Returns the verdict when this worker gets on with nothing: who holds it up.

    All workers meet in every step, so where one is stuck the others wait for it;
    the stuck ones are those that have arrived there less often than some other.

    Args:
      own: What this worker would say now.
      patience: Seconds of standing still that are too many.
      politeness: Seconds more that one who only waits leaves to the stuck ones, to
        print their stacks and to say so themselves.
    """
    if own.idle <= patience:
      return None
    arrivals = {index: pulse.arrivals for index, pulse in self._last.items()}
    most = max([own.arrivals, *arrivals.values()])
    if own.arrivals < most or all(count == most for count in arrivals.values()):
      return Verdict(
        f"no progress for {own.idle:.0f} s at step {own.step} ({own.activity}); the "
        "stacks of all threads are above.",
        errors.ExitCode.STUCK,
        is_own_fault=True,
      )
    if own.idle <= patience + politeness:
      return None
    behind = [index for index in sorted(arrivals) if arrivals[index] < most]
    texts = [
      f"{self.name(index)} is alive, but stuck at step {self._last[index].step} "
      f"({self._last[index].activity}, {self._last[index].idle:.0f} s)"
      for index in behind
    ]
    return Verdict(
      f"{'; '.join(texts)}. All workers started again go on from the newest "
      "checkpoint.",
      errors.ExitCode.PEER_LOST,
    )

  def _has_left(self, index: int) -> bool:
    """Says whether a peer has said that it leaves."""
    last = self._last.get(index)
    return last is not None and last.has_left

  def _witness_texts(self, silent: Sequence[int]) -> list[str]:
    """Says who still hears silent peers: the network is at fault then."""
    texts = []
    for index in silent:
      witnesses = [
        self.name(other)
        for other, pulse in sorted(self._last.items())
        if other not in silent and pulse.hears(index)
      ]
      if witnesses:
        way = verdict.lost_way(self._workers, index, self._index)
        texts.append(f"{', '.join(witnesses)} still hears worker {index}: {way}")
    return texts

  def _silent_text(self, index: int, now: float) -> str:
    """Says for how long a peer has been silent, and what it did before."""
    seconds = now - self._heard[index]
    last = self._last[index]  # training starts once all were heard of
    return (
      f"{self.name(index)} has been silent for {seconds:.0f} s; last heard of at step "
      f"{last.step} ({last.activity})"
    )
