"""Checks of the cluster: names, proxies, ports, clocks, and that all workers match.

Heartbeats show whether all workers are there and match; a plain TCP connection to each
peer shows that TensorFlow will reach it.
"""

import contextlib
import dataclasses
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping

from facedist import errors
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster, split_address
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.preflight import checks
from facedist.preflight.checks import BAD, WARNING, Finding

_PEER_SECONDS = 10.0  # without a heartbeat, once all have joined
_CONNECT_SECONDS = 10.0
_LINGER_SECONDS = 2.0  # in which peers connect to a worker that is about to leave
_MAX_CLOCK_SECONDS = 2.0


def check_names(cluster: Cluster) -> Finding:
  """Says whether every worker's name resolves."""
  if cluster.num_workers == 1:
    text = f"one worker ({cluster.origin})" if cluster.workers else "a single process"
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
      errors.ExitCode.PEER_LOST,
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


def check_peers(
  cluster: Cluster,
  facts: Mapping[str, str],
  *,
  own_code: errors.ExitCode,
  seconds: float,
) -> Iterator[Finding]:
  """Meets all other workers; yields what this worker learns about them.

  Every worker of the cluster calls this. If one of them finds a problem, all do.

  Args:
    cluster: The cluster, of several workers.
    facts: What must be the same on all workers, by name.
    own_code: What this worker's own checks come to so far.
    seconds: How long to wait for the others.

  Raises:
    errors.FacedistError: This worker's port cannot be opened.
  """
  timeouts = Timeouts(start=seconds, peer=_PEER_SECONDS, step=math.inf)
  detector = FailureDetector(
    cluster, facts=facts, timeouts=timeouts, end=lambda code: None
  )
  try:
    with _listening(cluster):
      detector.start()
      found = _check_heartbeats(detector)
      yield found
      if found.state == BAD:
        return
      yield _check_clocks(detector)
      ports = _check_ports(cluster)
      yield ports
      code = own_code or checks.exit_code([ports])
      if code != errors.ExitCode.DONE:
        time.sleep(_LINGER_SECONDS)
        detector.leave(code, "its own checks failed; see its findings.")
      else:
        yield _check_agreement(detector, facts)
  finally:
    detector.leave(errors.ExitCode.DONE)


@contextlib.contextmanager
def _listening(cluster: Cluster) -> Iterator[None]:
  """Lets peers connect to this worker's TCP port; the kernel does, nothing is read."""
  host, port = split_address(cluster.workers[cluster.index])
  family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
  with socket.create_server(("", port), family=family, backlog=cluster.num_workers):
    yield


def _check_heartbeats(detector: FailureDetector) -> Finding:
  """Says whether UDP passes both ways between all workers, and whether they match."""
  try:
    detector.join()
  except errors.ConfigError as error:
    return checks.finding_of_error("peers", error)
  except errors.FacedistError as error:
    fix = (
      "start it with the same description of the cluster, open its TCP and UDP port, "
      "or wait longer with --start_timeout"
    )
    return dataclasses.replace(checks.finding_of_error("heartbeats", error), fix=fix)
  return checks.ok_finding("heartbeats", "UDP passes both ways between all workers")


def _check_clocks(detector: FailureDetector) -> Finding:
  """Says how far the clocks are apart; only logs and leases depend on them."""
  offsets = detector.clock_offsets()
  worst = max(offsets, key=lambda index: abs(offsets[index]))
  text = f"worker {worst}'s is {offsets[worst]:+.2f} s from this one's, the farthest"
  if abs(offsets[worst]) > _MAX_CLOCK_SECONDS:
    return Finding("clocks", WARNING, text, "run NTP on all machines")
  return checks.ok_finding("clocks", text)


def _check_ports(cluster: Cluster) -> Finding:
  """Says to which peers a TCP connection cannot be made."""
  unreached = []
  for index, worker in enumerate(cluster.workers):
    if index == cluster.index:
      continue
    try:
      socket.create_connection(split_address(worker), _CONNECT_SECONDS).close()
    except OSError as error:
      unreached.append(f"worker {index} at {worker} cannot be reached ({error})")
  if unreached:
    fix = "open its TCP port for the other workers"
    text = "; ".join(unreached)
    return Finding("ports", BAD, text, fix, errors.ExitCode.PEER_LOST)
  peers = cluster.num_workers - 1
  return checks.ok_finding("ports", f"TCP connects to all {peers} peers")


def _check_agreement(detector: FailureDetector, facts: Mapping[str, str]) -> Finding:
  """Returns whether all workers have come this far, so that all continue together."""
  detector.begin_training(lambda: 0)
  detector.finish()
  try:
    detector.synchronize()
  except errors.FacedistError as error:
    return checks.finding_of_error("peers", error)
  return checks.ok_finding("peers", f"the same on all workers: {', '.join(facts)}")
