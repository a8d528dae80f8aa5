"""How long a worker waits for its peers, and for itself."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long to wait for what, in seconds.

  Attributes:
    start: For all peers to be there.
    peer: For a word of a peer.
    step: For the next step, or whatever this worker does between steps.
  """

  start: float
  peer: float
  step: float
