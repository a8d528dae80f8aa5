"""A cluster: the addresses of its workers, and which of them this process is."""

import dataclasses
import ipaddress
import re
from collections.abc import Mapping

from facedist import errors

PORT = "FACEDIST_PORT"
_LAST_PORT = 65535
_MAX_DIGITS = 10  # of any number in a description, such as a Slurm job's
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")  # of a host name
_MAX_HOST = 253  # characters of a host name
_FORM = "write host:port, as in node-1:2222 or [fe80::1]:2222"


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of one training job, and which of them this process is.

  Attributes:
    workers: `host:port` of every worker, the chief first; empty if nothing describes
      a cluster. A single process may be a cluster of one.
    index: This process's place among the workers.
    origin: Where this was read, for messages.
    left_out: Why a single process is probably meant to be one of several, and the fix;
      empty if there is no sign of that.
  """

  workers: tuple[str, ...] = ()
  index: int = 0
  origin: str = "the environment"
  left_out: str = ""

  def __post_init__(self) -> None:
    """Checks the addresses.

    Raises:
      errors.UsageError: Other workers cannot connect to one, or two are the same.
    """
    seen: set[str] = set()
    for worker in self.workers:
      if fault := _address_fault(worker):
        raise errors.UsageError(
          f"{self.origin} has the worker address {worker!r:.100}: {fault}; {_FORM}."
        )
      if worker.lower() in seen:
        raise errors.UsageError(
          f"{self.origin} has the worker address {worker!r:.100} twice; each worker "
          "needs a port of its own."
        )
      seen.add(worker.lower())

  @property
  def num_workers(self) -> int:
    """Number of processes that train together, at least one."""
    return max(1, len(self.workers))

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.index == 0


def split_address(address: str) -> tuple[str, int]:
  """Splits `host:port`; an IPv6 host is written in brackets."""
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _address_fault(address: object) -> str:
  """Returns what is wrong with an address; empty if it is `host:port`."""
  if not isinstance(address, str):
    return "it is no text"
  if "://" in address:
    return "an address has no scheme"
  host, colon, port = address.rpartition(":")
  if not colon:
    return "it has no port"
  is_number = re.fullmatch(r"[1-9][0-9]{0,4}", port) is not None
  if not is_number or int(port) > _LAST_PORT:
    return f"its port must be a whole number of 1 to {_LAST_PORT}"
  if host.startswith("[") and host.endswith("]"):
    return "" if _is_ip(host[1:-1], 6) else "there is no IPv6 address in the brackets"
  if ":" in host:
    return "an IPv6 address stands in brackets"
  return _host_fault(host.removesuffix("."))


def _host_fault(host: str) -> str:
  """Returns what is wrong with a host name or an IPv4 address, if anything."""
  labels = host.split(".")
  if len(host) > _MAX_HOST or any(len(label) > 63 for label in labels):
    return (
      f"a host name has at most {_MAX_HOST} characters, and 63 between two dots, so "
      "the job needs a shorter name"
    )
  if not all(_LABEL.fullmatch(label) for label in labels):
    return "its host must be letters, digits, - and _, in parts with dots between them"
  if labels[-1].isdecimal() and not _is_ip(host, 4):
    return "its host is neither a name nor an IPv4 address"
  return ""


def _is_ip(host: str, version: int) -> bool:
  """Says whether a host is an address of that version of IP."""
  try:
    return ipaddress.ip_address(host).version == version
  except ValueError:
    return False


def parse_number(
  environment: Mapping[str, str], name: str, *, default: int | None = None
) -> int:
  """Returns a variable that must be a whole number, 0 or more.

  Raises:
    errors.UsageError: It is something else, or is not set and has no default.
  """
  text = environment.get(name, "")
  if not text and default is not None:
    return default
  if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
    raise errors.UsageError(
      f"{name}={text!r:.40} must be a whole number; correct the job's environment, or "
      "set TF_CONFIG, which wins."
    )
  return int(text)


def base_port(environment: Mapping[str, str], *, default: int, ports: int = 1) -> int:
  """Returns FACEDIST_PORT or the default, the first of `ports` ports in a row.

  Raises:
    errors.UsageError: They do not all lie in 1 to 65535.
  """
  first = parse_number(environment, PORT, default=default)
  if not 1 <= first <= _LAST_PORT + 1 - ports:
    raise errors.UsageError(
      f"{PORT}={first} must be 1 to {_LAST_PORT + 1 - ports}, so that the {ports} "
      "workers of a host have a port each."
    )
  return first
