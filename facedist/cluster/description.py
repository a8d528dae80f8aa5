"""What a cluster is, and what all ways to read one from variables have in common."""

import dataclasses
from collections.abc import Mapping

from facedist import errors

PORT = "FACEDIST_PORT"
_LAST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of one training job, and which of them this process is.

  Attributes:
    workers: `host:port` of every worker, the chief first; empty for a process that
      trains by itself.
    index: This process's place among the workers.
    origin: Where that was read, for messages.
    left_out: Why a process by itself is probably meant to be one of several, and
      the fix; empty where nothing speaks for it.
  """

  workers: tuple[str, ...] = ()
  index: int = 0
  origin: str = "the environment"
  left_out: str = ""

  @property
  def num_workers(self) -> int:
    """Number of processes that train together, at least one."""
    return max(1, len(self.workers))

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.index == 0


def split_address(address: str) -> tuple[str, int]:
  """Splits `host:port`; an IPv6 host may stand in brackets."""
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def number(
  environment: Mapping[str, str], name: str, *, default: int | None = None
) -> int:
  """Returns a variable that must be a whole number, 0 or more.

  Raises:
    errors.UsageError: It is something else, or is not set and has no default.
  """
  text = environment.get(name, "")
  if not text and default is not None:
    return default
  if not (text.isascii() and text.isdecimal()):
    raise errors.UsageError(
      f"{name}={text!r} must be a whole number; mend the job's environment, or set "
      "TF_CONFIG, which wins."
    )
  return int(text)


def base_port(environment: Mapping[str, str], *, default: int, ports: int = 1) -> int:
  """Returns FACEDIST_PORT or the default, the first of `ports` ports in a row.

  Raises:
    errors.UsageError: They do not all lie in 1 to 65535.
  """
  first = number(environment, PORT, default=default)
  if not 1 <= first <= _LAST_PORT + 1 - ports:
    raise errors.UsageError(
      f"{PORT}={first} must be 1 to {_LAST_PORT + 1 - ports}, so that the {ports} "
      "workers of a host have a port each."
    )
  return first
