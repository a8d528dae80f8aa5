"""Checks of the cluster: names, ports, clocks, and that all workers are alike.

Workers tell each other what they are, over the TCP ports that training will use.

Every worker serves its report on its own cluster address and fetches those of all
others. So a report that arrived shows that one way is open, and one that was fetched
from here shows the other; comparing the reports shows what differs.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from facedist import errors
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster, split_address
from facedist.distributed.failure_detector import FailureDetector
from facedist.preflight import checks
from facedist.preflight.checks import BAD, WARNING, Finding

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


def call(cluster: Cluster, report: Mapping[str, Any], *, seconds: float) -> Answers:
  """Exchanges reports with all peers.

  Args:
    cluster: The cluster, of several workers.
    report: This worker's; JSON values.
    seconds: How long to wait for the peers.

  Raises:
    errors.UsageError: This worker's port cannot be opened.
  """
  deadline = time.monotonic() + seconds
  answers = Answers({cluster.index: dict(report)}, {}, {}, set())
  with _Server(cluster, report, answers.callers) as server:
    for index in range(cluster.num_workers):
      if index != cluster.index:
        _fetch(cluster, index, answers, deadline=deadline)
    peers = cluster.num_workers - 1
    while len(answers.callers) < peers and time.monotonic() < deadline:
      time.sleep(_RETRY_SECONDS)
    server.linger()
  return answers


class _Server:
  """Serves this worker's report, a connection at a time."""

  def __init__(
    self, cluster: Cluster, report: Mapping[str, Any], callers: set[int]
  ) -> None:
    host, port = split_address(cluster.workers[cluster.index])
    self._report, self._callers = dict(report), callers
    try:
      family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
      self._socket = socket.create_server(("", port), family=family, backlog=512)
    except OSError as error:
      raise errors.UsageError(
        f"worker {cluster.index} cannot listen at {cluster.workers[cluster.index]} "
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


def _fetch(cluster: Cluster, index: int, answers: Answers, *, deadline: float) -> None:
  """Fetches a peer's report, again and again until the deadline."""
  address = split_address(cluster.workers[index])
  question = json.dumps({"index": cluster.index}).encode()
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


_MOST_CLOCK_SECONDS = 2.0
_ALIKE = ("config", "data", "facedist", "tensorflow", "python", "numpy", "devices")
_RESTART = errors.ExitCode.PEER_LOST


def check_names(cluster: Cluster) -> Finding:
  """Says whether every worker's name resolves."""
  if cluster.num_workers == 1:
    text = (
      f"one worker ({cluster.origin})" if cluster.workers else "a process by itself"
    )
    return checks.ok_finding("cluster", text)
  unknown = []
  for worker in cluster.workers:
    host, _ = split_address(worker)
    try:
      socket.getaddrinfo(host, None)
    except OSError:
      unknown.append(host)
  if unknown:
    return Finding(
      "names",
      BAD,
      f"{', '.join(unknown)} of {cluster.origin} cannot be resolved",
      "correct the names, or wait until the workers are there",
      _RESTART,
    )
  return checks.ok_finding(
    "names",
    f"this is worker {cluster.index} of {cluster.num_workers} ({cluster.origin}); all "
    "names resolve",
  )


def check_proxies(
  cluster: Cluster, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
  """Yields what becomes of a proxy that the environment names, if it does."""
  names = strategies.proxies(environment)
  if names and cluster.num_workers > 1:
    yield checks.ok_finding(
      "proxies",
      f"{', '.join(names)} set: the workers talk past the proxy, buckets are reached "
      "through it",
    )


def check_answers(cluster: Cluster, answers: Answers) -> Iterator[Finding]:
  """Yields what the roll call shows: ports both ways, clocks, and what differs."""
  yield _check_ports(cluster, answers)
  yield _check_clocks(cluster, answers)
  yield _check_description(cluster, answers)
  for name in _ALIKE:
    yield _check_alike(cluster, answers, name)
  yield from _check_others(cluster, answers)


def _check_ports(cluster: Cluster, answers: Answers) -> Finding:
  """Says which peers could not be called, and which did not call."""
  peers = set(range(cluster.num_workers)) - {cluster.index}
  deaf = [
    f"worker {index} at {cluster.workers[index]} cannot be reached ({reason})"
    for index, reason in sorted(answers.unreached.items())
  ]
  deaf += [
    f"worker {index} at {cluster.workers[index]} does not reach this worker at "
    f"{cluster.workers[cluster.index]}"
    for index in sorted(peers - answers.callers - set(answers.unreached))
  ]
  if deaf:
    mend = "start it, or open its TCP and UDP port for the other workers"
    return Finding("ports", BAD, "; ".join(deaf), mend, _RESTART)
  return checks.ok_finding("ports", f"open both ways to all {len(peers)} peers")


def _check_clocks(cluster: Cluster, answers: Answers) -> Finding:
  """Says how far the clocks are apart; only logs and leases depend on them."""
  offsets = answers.clock_offsets
  if not offsets:
    return Finding("clocks", WARNING, "no peer's clock was seen", "see ports")
  worst = max(offsets, key=lambda index: abs(offsets[index]))
  text = f"worker {worst}'s is {offsets[worst]:+.2f} s from this one's, the farthest"
  if abs(offsets[worst]) > _MOST_CLOCK_SECONDS:
    return Finding("clocks", WARNING, text, "run NTP on all machines")
  return checks.ok_finding("clocks", text)


def check_heartbeats(detector: FailureDetector) -> Finding:
  """Says whether heartbeats, which go by UDP, pass both ways between all workers."""
  try:
    detector.join()
  except errors.FacedistError as error:
    text = (
      str(error)
      .replace("; see why, or wait longer with --start_timeout", "")
      .removesuffix(".")
    )
    mend = "open the UDP port of the same number as the TCP port"
    return Finding("heartbeats", BAD, f"UDP: {text}", mend, _RESTART)
  return checks.ok_finding("heartbeats", "UDP passes both ways between all workers")


def _check_description(cluster: Cluster, answers: Answers) -> Finding:
  """Says whether all workers were told of the same workers, in the same order."""
  for index, report in sorted(answers.reports.items()):
    told = report.get("workers", [])
    if told == list(cluster.workers):
      continue
    pairs = itertools.zip_longest(told, cluster.workers, fillvalue="nobody")
    place, (there, here) = next(
      (place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    return Finding(
      "cluster",
      BAD,
      f"worker {index} was told that worker {place} is {there}, this one that it is "
      f"{here}",
      "give all workers the same description, each with its own index",
    )
  return checks.ok_finding("cluster", f"{cluster.num_workers} workers, the same to all")


def _check_alike(cluster: Cluster, answers: Answers, name: str) -> Finding:
  """Says whether all reports have the same value of that name."""
  own = answers.reports[cluster.index].get(name)
  others = {
    index: report.get(name)
    for index, report in sorted(answers.reports.items())
    if report.get(name) != own
  }
  if not others:
    return checks.ok_finding(name, f"{_brief(own)}, on all that answered")
  texts = [f"worker {index} has {_brief(value)}" for index, value in others.items()]
  return Finding(
    name,
    BAD,
    f"{'; '.join(texts)}; this worker {cluster.index} has {_brief(own)}",
    _MENDS[name],
    errors.ExitCode.CONFIG,
  )


def _check_others(cluster: Cluster, answers: Answers) -> Iterator[Finding]:
  """Yields a finding for each peer whose own checks keep it from training."""
  for index, report in sorted(answers.reports.items()):
    code = errors.ExitCode(report.get("exit_code", errors.ExitCode.DONE))
    if index != cluster.index and code != errors.ExitCode.DONE:
      text = (
        f"worker {index} at {cluster.workers[index]} found what keeps it from training"
      )
      yield Finding("peers", BAD, text, "see its findings", code)


def _brief(value: Any) -> str:
  """Returns a value of a report as text."""
  return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_SAME_IMAGE = "install the same versions on all workers"
_MENDS = {
  "config": "start all workers with the same flags",
  "data": "give all workers the same --data_dir",
  "facedist": _SAME_IMAGE,
  "tensorflow": _SAME_IMAGE,
  "python": _SAME_IMAGE,
  "numpy": _SAME_IMAGE,
  "devices": "give all workers the same number and kind of GPUs, alike in memory",
}
