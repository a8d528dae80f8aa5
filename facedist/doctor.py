"""Checks whether this cluster can train this config, before GPUs are paid for.

  python -m facedist.doctor --flagfile=configs/vggface2.flags \\
    --data_dir=gs://bucket/vggface2_112 --workdir=/runs/a --strategy=multiworker

Takes the flags of facedist.train and is started in the same way: once in each process,
with the same TF_CONFIG, Slurm step or Kubernetes job. Each finding is one line and says
what to do. The exit code is 0, or that of the first bad finding. --json prints one
object at the end instead, even after an error. --quick leaves out what takes long;
training does the quick checks itself at its start.
"""

import collections
import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import __version__, config, errors
from facedist.data.shards import manifest
from facedist.distributed import detect, strategies
from facedist.distributed.cluster import Cluster as Cluster
from facedist.preflight import checks, devices
from facedist.preflight import cluster as cluster_checks
from facedist.preflight.checks import Finding
from facedist.training.checkpoint import manager
from facedist.training.config import TrainConfig, resolve


@dataclasses.dataclass(frozen=True)
class DoctorConfig(TrainConfig):
  """The trainer's flags, and how to report."""

  quick: bool = config.setting(
    False,
    heading="The doctor",
    help="Check only flags, names, the sizes of data and the workdir; no peers and no "
    "devices.",
    may_change=True,
  )
  json: bool = config.setting(
    False, help="Print one JSON object instead of lines.", may_change=True
  )


def main(settings: DoctorConfig) -> int:
  """Runs the checks and prints what they find."""
  found = examine(settings)
  if settings.json:
    print(checks.to_json(found))
  return checks.exit_code(found)


def examine(settings: DoctorConfig) -> list[Finding]:
  """Returns all findings, in the order of the checks."""
  found: list[Finding] = []

  def note(some: Iterable[Finding]) -> errors.ExitCode:
    """Records and prints findings as they come; returns the exit code so far."""
    for finding in some:
      found.append(finding)
      if not settings.json:
        print(finding, flush=True)
    return checks.exit_code(found)

  try:
    _run_checks(settings, note)
  except Exception as error:  # a bug; the JSON output must show it, too
    logging.exception("the doctor itself failed")
    text = f"{type(error).__name__}: {errors.first_line(error)}"
    fix = "read the traceback on stderr"
    note([Finding("doctor", checks.BAD, text, fix, errors.ExitCode.INTERNAL)])
  return found


def _run_checks(
  settings: DoctorConfig, note: Callable[[Iterable[Finding]], errors.ExitCode]
) -> None:
  """Runs the checks in order; `note` records findings, returns the code so far."""
  cluster, place = _find_cluster()
  note([place])
  if cluster is not None:
    note(cluster_checks.check_proxies(cluster))
  try:
    settings = resolve(settings)
  except errors.FacedistError as error:
    found = [checks.finding_of_error("flags", error), checks.check_workdir(settings)]
    code = note(found)
  else:
    more = "" if settings.quick else "; reading the CRC of all shards may take a while"
    logging.info("checking flags, data, workdir and checkpoint%s", more)
    code = note(checks.check_run(settings, cluster, is_quick=settings.quick))
  if settings.quick:
    return
  if cluster is not None and cluster.num_workers > 1:
    logging.info("checking the connections to the other workers")
    peers = cluster_checks.check_peers(
      cluster,
      _facts(settings),
      own_code=code,
      seconds=settings.start_timeout or settings.peer_timeout,
    )
    code = note(checks.caught("ports", peers))
  if cluster is not None and code == errors.ExitCode.DONE:
    logging.info("trying the devices: collectives, then training steps")
    note(checks.caught("strategy", _on_devices(settings, cluster)))
  else:  # the others do not try them either, so that none waits for this one
    text = "not tried until all of the above is fixed"
    note([Finding("devices", checks.WARNING, text)])


def _find_cluster() -> tuple[Cluster | None, Finding]:
  """Returns the cluster, or None if its description is wrong, and the finding."""
  try:
    cluster = detect.from_environment()
  except errors.FacedistError as error:
    return None, checks.finding_of_error("cluster", error)
  return cluster, cluster_checks.check_names(cluster)


def _on_devices(settings: DoctorConfig, cluster: Cluster) -> Iterator[Finding]:
  """Forms the strategy, tries collectives and a step; yields the findings."""
  try:
    yield from _try_devices(settings, cluster)
  except strategies.PEER_ERRORS as error:
    reason = errors.first_line(error)
    yield Finding(
      "devices",
      checks.BAD,
      f"another worker was lost meanwhile ({reason:.120})",
      "see what the others found",
      errors.ExitCode.PEER_LOST,
    )


def _try_devices(settings: DoctorConfig, cluster: Cluster) -> Iterator[Finding]:
  """Forms the strategy and tries collectives and a step."""
  yield from devices.check_machine_code()
  strategy = strategies.make_strategy(
    settings.strategy,
    cluster,
    communication=settings.communication,
    pack_mb=settings.all_reduce_mb,
    peer_timeout=settings.peer_timeout,
  )
  yield devices.report_strategy(strategy)
  yield from devices.check_collectives(strategy, settings)
  yield from devices.check_training(
    strategy,
    settings,
    content=manifest.load(str(settings.data_dir)),
    is_chief=cluster.is_chief,
  )


def _facts(settings: DoctorConfig) -> dict[str, str]:
  """Returns what must be the same on all workers."""
  try:
    data = manifest.load(str(settings.data_dir)).fingerprint
  except errors.FacedistError:
    data = "none"
  counts = collections.Counter(devices.describe_devices())
  return {
    "config": manager.fingerprint(settings),
    "data": data,
    "facedist": __version__,
    "tensorflow": tf.__version__,
    "python": platform.python_version(),
    "numpy": np.__version__,
    "devices": ", ".join(f"{count} x {name}" for name, count in counts.items())[:200],
  }


def run() -> None:
  """Runs the command line."""
  config.run_command(main, DoctorConfig)


if __name__ == "__main__":
  run()
