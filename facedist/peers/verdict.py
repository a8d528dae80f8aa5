"""What a worker concludes of its peers: one line, and the exit code it calls for."""

import dataclasses
from collections.abc import Sequence

from facedist import errors
from facedist.peers.pulse import Pulse


@dataclasses.dataclass(frozen=True)
class Verdict:
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


def name(workers: Sequence[str], index: int) -> str:
  """Returns `worker 1 at host:port`."""
  return f"worker {index} at {workers[index]}"


def lost_way(workers: Sequence[str], sender: int, receiver: int) -> str:
  """Says that the network loses what one worker sends another."""
  return f"packets from {workers[sender]} to {workers[receiver]} are lost on the way"


def on_leaver(workers: Sequence[str], own_index: int, left: Pulse) -> Verdict | None:
  """Returns the verdict on a peer that has said that it ends, and why; else None."""
  if left.exit_code is None:
    return None
  text = ""
  if left.exit_code == errors.ExitCode.PEER_LOST and not left.hears(own_index):
    text = f" This worker hears it: {lost_way(workers, own_index, left.index)}."
  return Verdict(
    f"{name(workers, left.index)} left at step {left.step} with exit code "
    f"{left.exit_code}: {left.reason}{text}",
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
