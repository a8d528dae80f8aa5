"""Who has come at the start, and who hears whom; no clock, no network.

Training starts once every worker hears every other and knows it of all: a network that
loses one direction from the very start is found here, where it can be named, and not in
TensorFlow's own start, which waits for ever.
"""

from collections.abc import Mapping, Sequence

from facedist import errors
from facedist.peers import verdict
from facedist.peers.pulse import Pulse
from facedist.peers.verdict import Verdict

ADVICE = "; see why, or wait longer with --start_timeout"


class Muster:
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
    self._last: dict[int, Pulse] = {}
    # Who has once heard all: what becomes of the others later is no matter here.
    self._hearing_all: set[int] = set()

  def hear(self, pulse: Pulse) -> None:
    """Notes a heartbeat of this cluster; one from nowhere in it is left out."""
    if pulse.index == self._index or pulse.index not in range(len(self._workers)):
      return
    before = self._last.get(pulse.index)
    if before is not None and before.life == pulse.life and before.has_left:
      return  # sent before its last words, and come after them
    if before is not None and before.life != pulse.life:
      self._hearing_all.discard(pulse.index)
    self._last[pulse.index] = pulse
    if not pulse.unheard:
      self._hearing_all.add(pulse.index)

  def unheard(self) -> list[int]:
    """Returns the peers that have never been heard of."""
    places = range(len(self._workers))
    return [place for place in places if place not in {*self._last, self._index}]

  def out_of_touch(self) -> list[int]:
    """Returns the peers whose address may have changed: unheard, or deaf to us."""
    deaf = [place for place, last in self._last.items() if self._index in last.unheard]
    return [*self.unheard(), *deaf]

  def is_complete(self) -> bool:
    """Says whether all have come and each has said that it hears all the others."""
    return not self.unheard() and self._last.keys() == self._hearing_all

  def judge(self, *, waited: float, patience: float) -> Verdict | None:
    """Returns why this worker must end; None if all is well or may still become so.

    Args:
      waited: Seconds since the start.
      patience: Seconds to wait at most.
    """
    if stranger := self._stranger():
      return stranger
    if self.is_complete():
      return None
    for pulse in self._last.values():
      if found := verdict.on_leaver(self._workers, self._index, pulse):
        return found
    if waited <= patience:
      return None
    return Verdict(
      f"{self.obstacles()} within {patience:g} s{ADVICE}.",
      errors.ExitCode.PEER_LOST,
    )

  def obstacles(self) -> str:
    """Returns who has not come, and who has not heard whom."""
    absent = self.unheard()
    texts = [f"{self._name(index)} did not start" for index in absent]
    for index in sorted(self._last.keys() - self._hearing_all):
      for missed in self._last[index].unheard:
        if missed not in absent:
          way = verdict.lost_way(self._workers, missed, index)
          texts.append(f"{self._name(index)} did not hear worker {missed} ({way})")
    return "; ".join(texts)

  def _stranger(self) -> Verdict | None:
    """Returns the verdict on a peer whose facts are not this worker's."""
    for index, pulse in sorted(self._last.items()):
      differing = [
        f"{name} {pulse.facts.get(name)} there, {value} here"
        for name, value in self._facts.items()
        if pulse.facts.get(name) != value
      ]
      if differing:
        return Verdict(
          f"{self._name(index)} does not belong to this run: {'; '.join(differing)}; "
          "start all workers with the same version and flags.",
          errors.ExitCode.CONFIG,
        )
    return None

  def _name(self, index: int) -> str:
    return verdict.name(self._workers, index)
