"""Datagrams between the workers of a cluster."""

import contextlib
import errno
import socket
import time
from collections.abc import Collection, Iterator
from typing import Any

from facedist import errors
from facedist.cluster import Cluster, split_address
from facedist.peers import pulse

_RESOLVE_SECONDS = 5.0
_PORT_SECONDS = 10.0  # what held the port may be on its way out, as after a restart
_RETRY_SECONDS = 0.2
_MAX_WAITING = 10_000  # datagrams that are taken in before anything else is done


class Post:
  """Sends to every peer and receives from any; a process by itself does neither."""

  def __init__(self, cluster: Cluster) -> None:
    """Opens the UDP port of this worker's address, and tries the TCP port.

    Raises:
      errors.NotFormedError: A port is taken, and stays so for some seconds.
      errors.UsageError: The address has no host that is known, or a port not allowed.
    """
    self._cluster = cluster
    self._socket = _open_port(cluster) if cluster.num_workers > 1 else None
    self._addresses: dict[int, Any] = {}
    self._next_look = 0.0

  def send(self, datagram: bytes, *, look_up_again: Collection[int] | None) -> None:
    """Sends to every peer whose name resolves.

    Args:
      datagram: What to send.
      look_up_again: Peers to find anew every few seconds: a name may appear late, and
        a worker that was started again may have another address. None: there is no
        time for that, only those already found are sent to.
    """
    if self._socket is None:
      return
    if look_up_again is not None:
      self._look_up(look_up_again)
    for address in self._addresses.values():
      with contextlib.suppress(OSError):  # a network that is down; silence tells
        self._socket.sendto(datagram, address)

  def receive(self, *, until: float) -> Iterator[bytes]:
    """Yields what comes in until `time.monotonic()` gets there.

    What is there already comes first, however late it is: on a busy machine a peer has
    spoken in time, and its words have waited here.
    """
    if self._socket is None:
      time.sleep(max(0.0, until - time.monotonic()))
      return
    for _ in range(_MAX_WAITING):
      self._socket.settimeout(0.0)
      try:
        yield self._socket.recv(2 * pulse.MOST_BYTES)
      except BlockingIOError:
        break
      except OSError:  # the answer of a closed port
        continue
    while (left := until - time.monotonic()) > 0:
      self._socket.settimeout(left)
      with contextlib.suppress(OSError):  # no time left, or the answer of a closed port
        yield self._socket.recv(2 * pulse.MOST_BYTES)

  def close(self) -> None:
    """Closes the port."""
    if self._socket is not None:
      self._socket.close()

  def _look_up(self, again: Collection[int]) -> None:
    """Finds the addresses of peers that have none yet, or that may have moved."""
    now = time.monotonic()
    if now < self._next_look:
      return
    self._next_look = now + _RESOLVE_SECONDS
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
  """Opens this worker's UDP port; waits a while for it and for the TCP port."""
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
  """Opens the UDP port of an address where the TCP port is free too.

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
