"""A heartbeat: what one worker says of itself, in one datagram."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

MOST_BYTES = 1200  # below every network's limit, so that no heartbeat is cut in pieces
_MOST_TEXT = 300
_MOST_UNHEARD = 40


@dataclasses.dataclass(frozen=True)
class Pulse:
  """What a worker says of itself.

  Attributes:
    run: The same for all workers of a cluster, and another for other clusters.
    index: The worker's place in the cluster.
    life: Another after each start of the process.
    facts: What must be the same on all workers, by name: version, config.
    step: Last finished step.
    arrivals: Times it came to where all workers meet: the forming of the cluster, then
      each gradient that it has computed; a stuck worker's lag behind.
    idle: Seconds since it last got on with anything.
    activity: What it is doing, in a few words.
    exit_code: Set when it is about to leave.
    reason: Why it leaves.
    unheard: Places of the workers that it has not heard of, at the start ever, in
      training for some heartbeats; the first of them where there are many.
  """

  run: str
  index: int
  life: str
  facts: dict[str, str]
  step: int = 0
  arrivals: int = 0
  idle: float = 0.0
  activity: str = "starting"
  exit_code: int | None = None
  reason: str = ""
  unheard: list[int] = dataclasses.field(default_factory=list)

  @property
  def has_left(self) -> bool:
    """Whether the sender has said that it ends."""
    return self.exit_code is not None

  def hears(self, index: int) -> bool:
    """Says whether the sender is known to hear a worker."""
    return index not in self.unheard and len(self.unheard) < _MOST_UNHEARD


def run_name(workers: Sequence[str]) -> str:
  """Returns the `run` of a cluster with these addresses."""
  return hashlib.blake2b("\n".join(workers).encode(), digest_size=8).hexdigest()


def encode(pulse: Pulse) -> bytes:
  """Returns the datagram; what is long is cut, so that it fits into MOST_BYTES."""
  short = dataclasses.replace(
    pulse,
    activity=pulse.activity[:_MOST_TEXT],
    reason=pulse.reason[:_MOST_TEXT],
    unheard=pulse.unheard[:_MOST_UNHEARD],
  )
  return json.dumps(dataclasses.asdict(short)).encode()


def decode(datagram: bytes) -> Pulse | None:
  """Reads a datagram; None where it is no heartbeat: anybody may send to a port."""
  try:
    pulse = Pulse(**json.loads(datagram))
  except (ValueError, TypeError, RecursionError):
    return None
  kinds = {
    "run": str,
    "index": int,
    "life": str,
    "facts": dict,
    "step": int,
    "arrivals": int,
    "idle": float | int,
    "activity": str,
    "exit_code": int | None,
    "reason": str,
    "unheard": list,
  }
  if not all(isinstance(getattr(pulse, name), kind) for name, kind in kinds.items()):
    return None
  return pulse
