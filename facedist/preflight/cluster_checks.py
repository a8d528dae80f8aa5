"""Checks of the cluster: names, ports, clocks, and that all workers are alike."""

import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from facedist import errors, strategies
from facedist.cluster import Cluster, split_address
from facedist.peers import muster
from facedist.peers.lookout import Lookout
from facedist.preflight import findings
from facedist.preflight.findings import BAD, WARNING, Finding
from facedist.preflight.roll_call import Answers

_MOST_CLOCK_SECONDS = 2.0
_ALIKE = ("config", "data", "facedist", "tensorflow", "python", "numpy", "devices")
_RESTART = errors.ExitCode.PEER_LOST


def check_names(crew: Cluster) -> Finding:
  """Says whether every worker's name resolves."""
  if crew.num_workers == 1:
    text = f"one worker ({crew.origin})" if crew.workers else "a process by itself"
    return findings.good("cluster", text)
  unknown = []
  for worker in crew.workers:
    host, _ = split_address(worker)
    try:
      socket.getaddrinfo(host, None)
    except OSError:
      unknown.append(host)
  if unknown:
    return Finding(
      "names",
      BAD,
      f"{', '.join(unknown)} of {crew.origin} cannot be resolved",
      "correct the names, or wait until the workers are there",
      _RESTART,
    )
  return findings.good(
    "names",
    f"this is worker {crew.index} of {crew.num_workers} ({crew.origin}); all names "
    "resolve",
  )


def check_proxies(
  crew: Cluster, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
  """Yields what becomes of a proxy that the environment names, if it does."""
  names = strategies.proxies(environment)
  if names and crew.num_workers > 1:
    yield findings.good(
      "proxies",
      f"{', '.join(names)} set: the workers talk past the proxy, buckets are reached "
      "through it",
    )


def check_answers(crew: Cluster, answers: Answers) -> Iterator[Finding]:
  """Yields what the roll call shows: ports both ways, clocks, and what differs."""
  yield _check_ports(crew, answers)
  yield _check_clocks(crew, answers)
  yield _check_description(crew, answers)
  for name in _ALIKE:
    yield _check_alike(crew, answers, name)
  yield from _check_others(crew, answers)


def _check_ports(crew: Cluster, answers: Answers) -> Finding:
  """Says which peers could not be called, and which did not call."""
  peers = set(range(crew.num_workers)) - {crew.index}
  deaf = [
    f"worker {index} at {crew.workers[index]} cannot be reached ({reason})"
    for index, reason in sorted(answers.unreached.items())
  ]
  deaf += [
    f"worker {index} at {crew.workers[index]} does not reach this worker at "
    f"{crew.workers[crew.index]}"
    for index in sorted(peers - answers.callers - set(answers.unreached))
  ]
  if deaf:
    mend = "start it, or open its TCP and UDP port for the other workers"
    return Finding("ports", BAD, "; ".join(deaf), mend, _RESTART)
  return findings.good("ports", f"open both ways to all {len(peers)} peers")


def _check_clocks(crew: Cluster, answers: Answers) -> Finding:
  """Says how far the clocks are apart; only logs and leases depend on them."""
  offsets = answers.clock_offsets
  if not offsets:
    return Finding("clocks", WARNING, "no peer's clock was seen", "see ports")
  worst = max(offsets, key=lambda index: abs(offsets[index]))
  text = f"worker {worst}'s is {offsets[worst]:+.2f} s from this one's, the farthest"
  if abs(offsets[worst]) > _MOST_CLOCK_SECONDS:
    return Finding("clocks", WARNING, text, "run NTP on all machines")
  return findings.good("clocks", text)


def check_heartbeats(lookout: Lookout) -> Finding:
  """Says whether heartbeats, which go by UDP, pass both ways between all workers."""
  try:
    lookout.wait_for_peers()
  except errors.FacedistError as error:
    text = str(error).replace(muster.ADVICE, "").removesuffix(".")
    mend = "open the UDP port of the same number as the TCP port"
    return Finding("heartbeats", BAD, f"UDP: {text}", mend, _RESTART)
  return findings.good("heartbeats", "UDP passes both ways between all workers")


def _check_description(crew: Cluster, answers: Answers) -> Finding:
  """Says whether all workers were told of the same workers, in the same order."""
  for index, report in sorted(answers.reports.items()):
    told = report.get("workers", [])
    if told == list(crew.workers):
      continue
    pairs = itertools.zip_longest(told, crew.workers, fillvalue="nobody")
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
  return findings.good("cluster", f"{crew.num_workers} workers, the same to all")


def _check_alike(crew: Cluster, answers: Answers, name: str) -> Finding:
  """Says whether all reports have the same value of that name."""
  own = answers.reports[crew.index].get(name)
  others = {
    index: report.get(name)
    for index, report in sorted(answers.reports.items())
    if report.get(name) != own
  }
  if not others:
    return findings.good(name, f"{_brief(own)}, on all that answered")
  texts = [f"worker {index} has {_brief(value)}" for index, value in others.items()]
  return Finding(
    name,
    BAD,
    f"{'; '.join(texts)}; this worker {crew.index} has {_brief(own)}",
    _MENDS[name],
    errors.ExitCode.CONFIG,
  )


def _check_others(crew: Cluster, answers: Answers) -> Iterator[Finding]:
  """Yields a finding for each peer whose own checks keep it from training."""
  for index, report in sorted(answers.reports.items()):
    code = errors.ExitCode(report.get("exit_code", errors.ExitCode.DONE))
    if index != crew.index and code != errors.ExitCode.DONE:
      text = (
        f"worker {index} at {crew.workers[index]} found what keeps it from training"
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
