"""Heartbeats: what a worker tells the others about itself, and how it is sent.

A heartbeat is one datagram to the UDP port of a worker's cluster address; TensorFlow
listens at the TCP port of the same number.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from facedist import errors
from facedist.distributed.cluster import Cluster, split_address

MAX_BYTES = 1200  # below the packet size of every network, so it is never fragmented
_MAX_TEXT = 300  # characters of the activity and of the reason


@dataclasses.dataclass(frozen=True)
class Heartbeat:
  """What a worker says about itself.

  Attributes:
    cluster: The same on all workers of a cluster, different for any other cluster.
    index: The worker's place in the cluster.
    process: Different after each start of the worker.
    facts: What must be the same on all workers, by name: version, config.
    sent_at: Unix time.
    step: Last finished step.
    sync_points: Times it has reached a point where all workers meet: the forming of
      the cluster, then each gradient that it has computed. A stuck worker has fewer.
    idle: Seconds since it last made progress.
    activity: What it is doing, in a few words.
    exit_code: Set when it is about to leave.
    reason: Why it leaves.
    receives_all: Whether it has received a heartbeat of every other worker.
  """

  cluster: str
  index: int
  process: str
  facts: dict[str, str]
  sent_at: float = 0.0
  step: int = 0
  sync_points: int = 0
  idle: float = 0.0
  activity: str = "starting"
  exit_code: int | None = None
  reason: str = ""
  receives_all: bool = False

  @property
  def has_left(self) -> bool:
    """Whether this is the last heartbeat of a worker that ends."""
    return self.exit_code is not None


_TYPES: dict[str, Any] = {
  "cluster": str,
  "index": int,
  "process": str,
  "facts": dict,
  "sent_at": float | int,
  "step": int,
  "sync_points": int,
  "idle": float | int,
  "activity": str,
  "exit_code": int | None,
  "reason": str,
  "receives_all": bool,
}


def cluster_id(workers: Sequence[str]) -> str:
  """Returns the `cluster` of a heartbeat between workers at these addresses."""
  return hashlib.blake2b("\n".join(workers).encode(), digest_size=8).hexdigest()


def encode(heartbeat: Heartbeat) -> bytes:
  """Returns the datagram; cuts long texts so that it fits into MAX_BYTES."""
  short = dataclasses.replace(
    heartbeat,
    activity=heartbeat.activity[:_MAX_TEXT],
    reason=heartbeat.reason[:_MAX_TEXT],
  )
  return json.dumps(dataclasses.asdict(short)).encode()


def decode(datagram: bytes) -> Heartbeat | None:
  """Reads a datagram; None if it is no heartbeat, since anyone may send to a port."""
  try:
    heartbeat = Heartbeat(**json.loads(datagram))
  except (ValueError, TypeError, RecursionError):
    return None
  is_valid = all(
    isinstance(getattr(heartbeat, name), kind) for name, kind in _TYPES.items()
  )
  return heartbeat if is_valid else None


_RESOLVE_SECONDS = 5.0
_PORT_SECONDS = 10.0  # whatever holds the port may be ending, as after a restart
_RETRY_SECONDS = 0.2
_MAX_WAITING = 10_000  # datagrams that are received before anything else is done


class Transport:
  """Sends datagrams to every peer and receives theirs; a single process has none."""

  def __init__(self, cluster: Cluster) -> None:
    """Opens the UDP port of this worker's address; the TCP port must be free, too.

    Raises:
      errors.NotFormedError: A port is taken, and still is after some seconds.
      errors.UsageError: The host of the address is unknown, or the port not allowed.
    """
    self._cluster = cluster
    self._socket = _open_port(cluster) if cluster.num_workers > 1 else None
    self._addresses: dict[int, Any] = {}
    self._next_look_up = 0.0

  def send(self, datagram: bytes, *, look_up: Collection[int] | None) -> None:
    """Sends to every peer whose name resolves.

    Args:
      datagram: What to send.
      look_up: Peers whose addresses are resolved again every few seconds: a name may
        appear late, and a restarted worker may have another address. With None no name
        is resolved, which may take long: only known addresses are sent to.
    """
    if self._socket is None:
      return
    if look_up is not None:
      self._resolve(look_up)
    for address in self._addresses.values():
      with contextlib.suppress(
        OSError
      ):  # the network is down; peers notice the silence
        self._socket.sendto(datagram, address)

  def receive(self, *, until: float) -> Iterator[bytes]:
    """Yields datagrams until `time.monotonic()` reaches a time.

    Those that have arrived before come first, even when that time has passed: on a
    busy machine a peer may have sent in time, and its datagram waits in the socket.
    """
    if self._socket is None:
      time.sleep(max(0.0, until - time.monotonic()))
      return
    for _ in range(_MAX_WAITING):
      self._socket.settimeout(0.0)
      try:
        yield self._socket.recv(2 * MAX_BYTES)
      except BlockingIOError:
        break
      except OSError:  # the reply of a closed port
        continue
    while (left := until - time.monotonic()) > 0:
      self._socket.settimeout(left)
      with contextlib.suppress(OSError):  # time is up, or the reply of a closed port
        yield self._socket.recv(2 * MAX_BYTES)

  def close(self) -> None:
    """Closes the port."""
    if self._socket is not None:
      self._socket.close()

  def _resolve(self, again: Collection[int]) -> None:
    """Resolves the names of peers without an address, and of those in `again`."""
    now = time.monotonic()
    if now < self._next_look_up:
      return
    self._next_look_up = now + _RESOLVE_SECONDS
    for index, worker in enumerate(self._cluster.workers):
      if index == self._cluster.index:
        continue
      if index not in self._addresses or index in again:
        with contextlib.suppress(OSError):  # the peer has no name yet
          host, port = split_address(worker)
          family = self._socket.family  # type: ignore[union-attr]
          found = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)
          self._addresses[index] = found[0][4]


def _open_port(cluster: Cluster) -> socket.socket:
  """Opens this worker's UDP port; waits some seconds for it and for the TCP port."""
  own = cluster.workers[cluster.index]
  deadline = time.monotonic() + _PORT_SECONDS
  while True:
    try:
      return _open_once(own)
    except OSError as error:
      is_taken = error.errno == errno.EADDRINUSE
      if is_taken and time.monotonic() < deadline:
        time.sleep(_RETRY_SECONDS)
        continue
      raise (errors.NotFormedError if is_taken else errors.UsageError)(
        f"cannot listen at {own}, UDP for heartbeats and TCP for TensorFlow "
        f"({error.strerror}); free the port, or give the cluster another."
      ) from error


def _open_once(own: str) -> socket.socket:
  """Opens the UDP port of an address if the TCP port is free too.

  Raises:
    OSError: One of them cannot be opened.
  """
  host, port = split_address(own)
  family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
  opened = socket.socket(family, socket.SOCK_DGRAM)
  try:
    opened.bind(("", port))
    socket.create_server(("", port), family=family).close()
  except OSError:
    opened.close()
    raise
  return opened
