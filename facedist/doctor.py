"""Checks, before GPUs are paid for, whether this cluster can train this config.

  python -m facedist.doctor --flagfile=configs/vggface2.flags \\
    --data_dir=gs://bucket/vggface2_112 --workdir=/runs/a --strategy=multiworker

Takes the flags of facedist.train and is started as it is: once in each process, with
the same TF_CONFIG, Slurm step or Kubernetes job. Each finding is one line, with what to
do about it. Ends with 0 if all is well, else with the exit code of the first finding
that is not. --quick leaves out what takes long; training does that by itself at its
start.
"""

import dataclasses
import platform

import numpy as np
import tensorflow as tf

from facedist import __version__, cluster, config, errors, strategies
from facedist.data import manifest
from facedist.preflight import (
  cluster_checks,
  device_checks,
  findings,
  roll_call,
  run_checks,
)
from facedist.preflight.findings import Finding
from facedist.training import run_folder
from facedist.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class DoctorConfig(TrainConfig):
  """The trainer's flags, and how to report."""

  quick: bool = config.setting(
    False,
    heading="The doctor",
    help="Only flags, names, data's sizes and workdir; no peer and no device.",
    may_change=True,
  )
  json: bool = config.setting(
    False, help="Print one JSON object instead of lines.", may_change=True
  )


def main(settings: DoctorConfig) -> int:
  """Runs the checks and prints what they find."""
  found = examine(settings)
  if settings.json:
    print(findings.to_json(found))
  return findings.exit_code(found)


def examine(settings: DoctorConfig) -> list[Finding]:
  """Returns all findings, in the order of the checks."""
  found: list[Finding] = []

  def note(finding: Finding) -> bool:
    """Keeps and shows a finding; says whether it lets the next checks run."""
    found.append(finding)
    if not settings.json:
      print(finding, flush=True)
    return finding.state != findings.BAD

  crew = cluster.from_environment()
  can_meet = note(cluster_checks.check_names(crew))
  is_sound = True
  for finding in run_checks.check_run(settings, is_quick=settings.quick):
    is_sound &= note(finding)
  if settings.quick:
    return found
  if crew.num_workers > 1:
    seconds = settings.start_timeout or settings.peer_timeout
    report = _report(settings, is_sound=is_sound)
    answers = roll_call.call(crew, report, seconds=seconds)
    for finding in cluster_checks.check_answers(crew, answers):
      can_meet &= note(finding)
    # A worker that stays away would leave the others waiting for it.
    others_sound = all(report.get("sound") for report in answers.reports.values())
    is_sound &= others_sound
  if not (can_meet and is_sound):
    note(
      Finding(
        "devices", findings.WARNING, "not tried, as long as something above is bad"
      )
    )
    return found
  for finding in _on_devices(settings, crew):
    note(finding)
  return found


def _on_devices(settings: DoctorConfig, crew: cluster.Cluster) -> list[Finding]:
  """Forms the strategy and tries collectives and a step."""
  strategy = strategies.make_strategy(
    settings.strategy,
    crew,
    communication=settings.communication,
    peer_timeout=settings.peer_timeout,
  )
  content = manifest.load(str(settings.data_dir))
  return [
    device_checks.report_strategy(strategy),
    *device_checks.check_collectives(strategy, settings),
    device_checks.check_batch(
      strategy,
      settings,
      image_size=content.image_size,
      num_identities=content.num_identities,
    ),
  ]


def _report(settings: DoctorConfig, *, is_sound: bool) -> dict[str, object]:
  """Returns what this worker tells its peers; `is_sound`: what its checks found."""
  try:
    data = manifest.load(str(settings.data_dir)).fingerprint
  except errors.FacedistError:
    data = "none"
  return {
    "config": run_folder.fingerprint(settings),
    "data": data,
    "facedist": __version__,
    "tensorflow": tf.__version__,
    "python": platform.python_version(),
    "numpy": np.__version__,
    "devices": device_checks.describe_devices(),
    "sound": is_sound,
  }


def run() -> None:
  """Runs the command line."""
  config.run_command(main, DoctorConfig)


if __name__ == "__main__":
  run()
