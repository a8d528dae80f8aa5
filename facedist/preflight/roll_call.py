"""Workers tell each other what they are, over the TCP ports that training will use.

Every worker serves its report on its own cluster address and fetches those of all
others. So a report that arrived shows that one way is open, and one that was fetched
from here shows the other; comparing the reports shows what differs.
"""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from facedist import errors
from facedist.cluster import Cluster, split_address

_RETRY_SECONDS = 0.2
_CALL_SECONDS = 5.0
_MOST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Answers:
  """What came of the roll call, as one worker sees it.

  Attributes:
    reports: By worker, this one's own included.
    clock_offsets: Seconds that a peer's clock is ahead of this one's, by worker.
    unreached: Why a peer could not be called, by worker.
    callers: The peers that have called this worker.
  """

  reports: dict[int, dict[str, Any]]
  clock_offsets: dict[int, float]
  unreached: dict[int, str]
  callers: set[int]


def call(crew: Cluster, report: Mapping[str, Any], *, seconds: float) -> Answers:
  """Exchanges reports with all peers.

  Args:
    crew: The cluster, of several workers.
    report: This worker's; JSON values.
    seconds: How long to wait for the peers.

  Raises:
    errors.UsageError: This worker's port cannot be opened.
  """
  deadline = time.monotonic() + seconds
  answers = Answers({crew.index: dict(report)}, {}, {}, set())
  with _Server(crew, report, answers.callers) as server:
    for index in range(crew.num_workers):
      if index != crew.index:
        _fetch(crew, index, answers, deadline=deadline)
    peers = crew.num_workers - 1
    while len(answers.callers) < peers and time.monotonic() < deadline:
      time.sleep(_RETRY_SECONDS)
    server.linger()
  return answers


class _Server:
  """Serves this worker's report, a connection at a time."""

  def __init__(
    self, crew: Cluster, report: Mapping[str, Any], callers: set[int]
  ) -> None:
    host, port = split_address(crew.workers[crew.index])
    self._report, self._callers = dict(report), callers
    try:
      family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
      self._socket = socket.create_server(("", port), family=family, backlog=512)
    except OSError as error:
      raise errors.UsageError(
        f"worker {crew.index} cannot listen at {crew.workers[crew.index]} "
        f"({error.strerror}); free the port, or give the cluster another."
      ) from error
    self._socket.settimeout(_RETRY_SECONDS)
    self._stopping = threading.Event()
    self._thread = threading.Thread(target=self._serve, name="roll call", daemon=True)

  def __enter__(self) -> "_Server":
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stopping.set()
    self._thread.join()
    self._socket.close()

  def linger(self) -> None:
    """Serves a moment longer: a caller's last answer may still be on its way."""
    time.sleep(2 * _RETRY_SECONDS)

  def _serve(self) -> None:
    while not self._stopping.is_set():
      with contextlib.suppress(OSError, ValueError):  # nobody called, or a stranger
        connection, _ = self._socket.accept()
        with connection:
          connection.settimeout(_CALL_SECONDS)
          caller = json.loads(_receive(connection))
          answer = self._report | {"time": time.time()}
          connection.sendall(json.dumps(answer).encode())
          connection.shutdown(socket.SHUT_WR)
          self._callers.add(int(caller["index"]))


def _fetch(crew: Cluster, index: int, answers: Answers, *, deadline: float) -> None:
  """Fetches a peer's report, again and again until the deadline."""
  address = split_address(crew.workers[index])
  question = json.dumps({"index": crew.index}).encode()
  while True:
    try:
      before = time.time()
      with socket.create_connection(address, _CALL_SECONDS) as line:
        line.sendall(question)
        line.shutdown(socket.SHUT_WR)
        report = json.loads(_receive(line))
      answers.clock_offsets[index] = report["time"] - (before + time.time()) / 2
      answers.reports[index] = report
      answers.unreached.pop(index, None)
      return
    except (OSError, ValueError, KeyError, TypeError) as error:
      answers.unreached[index] = str(error)
    if time.monotonic() >= deadline:
      return
    time.sleep(_RETRY_SECONDS)


def _receive(connection: socket.socket) -> bytes:
  """Returns all that the other side sends."""
  parts = []
  while part := connection.recv(1 << 16):
    parts.append(part)
    if sum(map(len, parts)) > _MOST_BYTES:
      raise ValueError("too long an answer")
  return b"".join(parts)
