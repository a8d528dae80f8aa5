"""What a worker says of itself, written by any of its threads; no network.

A heartbeat: what one worker says of itself, in one datagram.

Datagrams between the workers of a cluster.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from facedist import errors
from facedist.distributed.cluster import Cluster, split_address

MOST_BYTES = 1200  # below every network's limit, so that no heartbeat is cut in pieces
_MOST_TEXT = 300


@dataclasses.dataclass(frozen=True)
class Heartbeat:
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
    hears_all: Whether it has received a heartbeat of every other worker.
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
  hears_all: bool = False

  @property
  def has_left(self) -> bool:
    """Whether the sender has said that it ends."""
    return self.exit_code is not None


def run_name(workers: Sequence[str]) -> str:
  """Returns the `run` of a cluster with these addresses."""
  return hashlib.blake2b("\n".join(workers).encode(), digest_size=8).hexdigest()


def encode(heartbeat: Heartbeat) -> bytes:
  """Returns the datagram; what is long is cut, so that it fits into MOST_BYTES."""
  short = dataclasses.replace(
    heartbeat,
    activity=heartbeat.activity[:_MOST_TEXT],
    reason=heartbeat.reason[:_MOST_TEXT],
  )
  return json.dumps(dataclasses.asdict(short)).encode()


def decode(datagram: bytes) -> Heartbeat | None:
  """Reads a datagram; None where it is no heartbeat: anybody may send to a port."""
  try:
    heartbeat = Heartbeat(**json.loads(datagram))
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
    "hears_all": bool,
  }
  if not all(
    isinstance(getattr(heartbeat, name), kind) for name, kind in kinds.items()
  ):
    return None
  return heartbeat


_RESOLVE_SECONDS = 5.0
_PORT_SECONDS = 10.0  # what held the port may be on its way out, as after a restart
_RETRY_SECONDS = 0.2
_MAX_WAITING = 10_000  # datagrams that are taken in before anything else is done


class Transport:
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
        yield self._socket.recv(2 * MOST_BYTES)
      except BlockingIOError:
        break
      except OSError:  # the answer of a closed port
        continue
    while (left := until - time.monotonic()) > 0:
      self._socket.settimeout(left)
      with contextlib.suppress(OSError):  # no time left, or the answer of a closed port
        yield self._socket.recv(2 * MOST_BYTES)

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


class HeartbeatLog:
  """This worker's own heartbeat; any thread may write into it."""

  def __init__(self, cluster: Cluster, *, facts: Mapping[str, str]) -> None:
    """Starts a new life.

    Args:
      cluster: Who this worker is.
      facts: What must be the same on every worker.
    """
    self._heartbeat = Heartbeat(
      run=run_name(cluster.workers),
      index=cluster.index,
      life=uuid.uuid4().hex,
      facts=dict(facts),
    )
    self._moved = time.monotonic()  # when this worker last got on with something
    self._count_gradients: Callable[[], int] = lambda: 0
    self._meetings = 0
    self._lock = threading.Lock()

  @property
  def heartbeat(self) -> Heartbeat:
    """What there is to say now."""
    return self._heartbeat

  def note(self, activity: str, step: int | None = None) -> None:
    """Says what this worker turns to; that is progress."""
    with self._lock:
      step = self._heartbeat.step if step is None else step
      self._heartbeat = dataclasses.replace(
        self._heartbeat, activity=activity, step=step
      )
      self._moved = time.monotonic()

  def count(self, gradients: Callable[[], int]) -> None:
    """Takes the function that counts gradients from here on."""
    with self._lock:
      self._count_gradients = gradients
      self._moved = time.monotonic()

  def arrive(self) -> None:
    """Says that this worker has come to where all meet."""
    with self._lock:
      self._meetings += 1

  def update(self, *, hears_all: bool) -> None:
    """Counts and measures what changes by itself.

    Args:
      hears_all: Whether this worker has received a heartbeat of every peer.
    """
    gradients = self._count_gradients()
    now = time.monotonic()
    with self._lock:
      arrivals = self._meetings + gradients
      if arrivals != self._heartbeat.arrivals:
        self._moved = now
      self._heartbeat = dataclasses.replace(
        self._heartbeat,
        arrivals=arrivals,
        idle=round(now - self._moved, 1),
        hears_all=hears_all,
      )

  def leave(self, exit_code: int, reason: str) -> None:
    """Says that this worker ends, and why."""
    with self._lock:
      self._heartbeat = dataclasses.replace(
        self._heartbeat, exit_code=int(exit_code), reason=reason
      )
