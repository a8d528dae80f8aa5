"""Walks through the exit codes: who ends with each, and what launchers do then."""

import ast
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from facedist import config, errors
from facedist.errors import ExitCode
from facedist.training.config import TrainConfig
from tests import noise_sets

ROOT = pathlib.Path(__file__).parents[1]
SURVIVAL = "tests/facedist/test_survival.py"

# Tests that provoke, with real processes, what takes a run.
ELSEWHERE = {
  ExitCode.PARTIAL: (
    SURVIVAL,
    "test_an_image_that_cannot_be_read_is_skipped_and_the_exit_code_says_so",
  ),
  ExitCode.DIVERGED: (
    SURVIVAL,
    "test_what_is_not_finite_stops_the_run_and_names_step_worker_and_records",
  ),
  ExitCode.SAVING: (
    SURVIVAL,
    "test_a_save_that_cannot_be_written_is_told_and_training_goes_on",
  ),
  ExitCode.PREEMPTED: (
    SURVIVAL,
    "test_a_signal_to_one_worker_stops_all_at_one_saved_step",
  ),
  ExitCode.STUCK: (SURVIVAL, "test_a_stuck_worker_shows_its_stacks_and_is_named"),
  ExitCode.DIFFERENT: (SURVIVAL, "test_a_flipped_bit_names_its_replica"),
}


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
  """Runs Python with these words."""
  return subprocess.run(
    [sys.executable, *words],
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
  """Two sets of noise."""
  folders = [str(tmp_path_factory.mktemp("shards")) for _ in range(2)]
  for seed, folder in enumerate(folders):
    noise_sets.write(folder, identities=2, images=2, size=32, seed=seed)
  return folders


def two_workers() -> dict[str, str]:
  """The variable that makes a process the chief of two, whose other never comes."""
  task = {"type": "worker", "index": 0}
  addresses = ["127.0.0.1:23456", "127.0.0.1:23457"]
  return {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}


def test_0_is_what_was_asked_for(shards: list[str]):
  assert run("-m", "tfrecords_tools.verify", "--help").returncode == ExitCode.DONE
  assert run("-m", "tfrecords_tools.verify", shards[0]).returncode == ExitCode.DONE


def test_1_is_a_bug_with_its_traceback(shards: list[str]):
  lines = "from tfrecords_tools import verify; verify.verify = len; verify.run()"
  result = run("-c", lines, shards[0])
  assert result.returncode == ExitCode.INTERNAL
  assert "Traceback" in result.stderr


def test_2_is_a_wrong_flag():
  result = run("-m", "tfrecords_tools.verify", "--no_such_flag")
  assert result.returncode == ExitCode.USAGE


@pytest.mark.slow
def test_3_is_a_run_with_another_config(shards: list[str], tmp_path: pathlib.Path):
  folders = {"data_dir": shards[0], "workdir": str(tmp_path)}
  (tmp_path / "config.json").write_text(config.to_json(TrainConfig(**folders)))
  flags = [f"--{name}={value}" for name, value in folders.items()]
  result = run("-m", "facedist.train", "--strategy=one", "--full_rate=0.123", *flags)
  assert result.returncode == ExitCode.CONFIG, result.stderr
  assert "full_rate" in result.stderr


def test_4_is_damaged_data(tmp_path: pathlib.Path):
  assert run("-m", "tfrecords_tools.verify", str(tmp_path)).returncode == ExitCode.DATA


def test_8_is_a_difference(shards: list[str]):
  result = run("-m", "tfrecords_tools.inspect", shards[0], f"--diff={shards[1]}")
  assert result.returncode == ExitCode.SETS_DIFFER, result.stderr


@pytest.mark.slow
def test_142_is_a_cluster_that_does_not_form():
  lines = """
from facedist.distributed import detect
from facedist.distributed import strategies
strategies.make_strategy("multiworker", detect.from_environment(), peer_timeout=1)
"""
  result = run("-c", lines, **two_workers())
  assert result.returncode == -signal.SIGALRM  # which a shell calls 142
  assert 128 + signal.SIGALRM == ExitCode.NOT_FORMED
  assert "make_strategy" in result.stderr


@pytest.mark.slow
def test_144_is_a_worker_that_is_missing(shards: list[str], tmp_path: pathlib.Path):
  flags = [f"--data_dir={shards[0]}", f"--workdir={tmp_path}", "--start_timeout=1"]
  result = run(
    "-m", "facedist.train", "--strategy=multiworker", *flags, **two_workers()
  )
  assert result.returncode == ExitCode.PEER_LOST, result.stderr
  assert "worker 1 at 127.0.0.1:23457" in result.stderr


def test_145_is_a_bucket_that_does_not_answer():
  flags = ("--storage_endpoint=http://127.0.0.1:1", "--storage_deadline_seconds=1")
  result = run("-m", "tfrecords_tools.verify", "gs://faces/shards", *flags)
  assert result.returncode == ExitCode.UNREACHABLE, result.stderr


def test_no_code_is_left_out():
  named = {
    int(name.split("_")[1])
    for name in globals()
    if name.startswith("test_") and name.split("_")[1].isdecimal()
  }
  assert named | set(ELSEWHERE) == set(ExitCode)
  for code, (path, test) in ELSEWHERE.items():
    functions = {
      node.name: ast.unparse(node)
      for node in ast.parse((ROOT / path).read_text()).body
      if isinstance(node, ast.FunctionDef)
    }
    assert (
      f"ExitCode.{code.name}" in functions[test] or str(int(code)) in (functions[test])
    )


def commands() -> Iterator[pathlib.Path]:
  """Yields every module that is run as a command."""
  for package in ("facedist", "tfrecords_tools", "launch", "benchmarks"):
    for path in sorted((ROOT / package).rglob("*.py")):
      if path.stem in ("index", "__main__"):
        continue  # former names, which call the command's module
      if '__name__ == "__main__"' in path.read_text():
        yield path


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: path.stem)
def test_every_command_ends_by_the_one_table(path: pathlib.Path):
  assert "config.run_command(" in path.read_text()


@pytest.mark.parametrize("code", ExitCode)
def test_the_local_launcher_restarts_by_the_table(code: int, tmp_path: pathlib.Path):
  (tmp_path / "toy.py").write_text(
    "import pathlib, sys\n"
    f"mark = pathlib.Path({str(tmp_path / 'started')!r})\n"
    "again = mark.exists()\n"
    "mark.touch()\n"
    f"sys.exit(0 if again else {int(code)})\n"
  )
  flags = ("--module=toy", "--workers=1", "--max_restarts=1", "--backoff_seconds=0")
  result = run(str(ROOT / "launch/local.py"), *flags, PYTHONPATH=_with(tmp_path))
  restarts = code >= 128
  assert ("starting again" in result.stderr) == restarts
  assert result.returncode == (ExitCode.DONE if restarts else code)


@pytest.mark.parametrize("code", ExitCode)
def test_the_slurm_scripts_requeue_by_the_table(code: int, tmp_path: pathlib.Path):
  """Slurm's own commands are a few lines here; tests/launch/test_slurm.py has Slurm."""
  programs = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=0 "$@"',
    "scontrol": f'echo "$*" >>{tmp_path}/asked; echo JobState=RUNNING; '
    "[[ $1 != requeue ]]",  # so that the script does not wait for its end
  }
  for name, line in programs.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
    (tmp_path / name).chmod(0o755)
  lines = f'source {ROOT}/launch/slurm/step.sh; run_step "$@"'
  result = subprocess.run(
    ["bash", "-c", lines, "job", "bash", "-c", f"exit {int(code)}"],
    env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
    check=False,
    timeout=60,
  )
  asked = tmp_path / "asked"
  lines = asked.read_text().splitlines() if asked.exists() else []
  assert result.returncode == code
  assert ("requeue 7" in lines) == (code >= 128)
  assert ("update jobid=7 Requeue=0" in lines) == (0 < code < 128)


def policies(content: Any) -> Iterator[dict]:
  """Yields every pod failure policy within a manifest."""
  if isinstance(content, list):
    for each in content:
      yield from policies(each)
  elif isinstance(content, dict):
    if "podFailurePolicy" in content:
      yield content["podFailurePolicy"]
    for each in content.values():
      yield from policies(each)


def test_the_manifests_give_up_on_permanent_codes_alone():
  found = [
    policy
    for path in sorted((ROOT / "launch/kubernetes").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    for policy in policies(document)
  ]
  assert found
  permanent = {int(code) for code in ExitCode if 0 < code < errors.FIRST_RESTART_CODE}
  for policy in found:
    final: set[int] = set()
    for rule in policy["rules"]:
      if rule["action"] != "Ignore":
        final |= set(rule["onExitCodes"]["values"])
    assert permanent <= final
    assert max(final) < errors.FIRST_RESTART_CODE


def _with(folder: pathlib.Path) -> str:
  """Returns a module path with a folder before the rest."""
  return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
