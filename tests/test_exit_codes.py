"""Who ends with the exit codes that few commands have, and what launchers do then."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from facedist.errors import ExitCode
from tests import noise_sets

ROOT = pathlib.Path(__file__).parents[1]


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


def test_8_is_a_difference(tmp_path: pathlib.Path):
  for seed in (0, 1):
    noise_sets.write(tmp_path / str(seed), identities=2, images=2, size=32, seed=seed)
  sets = (str(tmp_path / "0"), f"--diff={tmp_path / '1'}")
  result = run("-m", "tfrecords_tools.inspect", *sets)
  assert result.returncode == ExitCode.SETS_DIFFER, result.stderr


@pytest.mark.slow
def test_142_is_a_cluster_that_does_not_form():
  lines = """
from facedist.distributed import detect
from facedist.distributed import strategies
strategies.make_strategy("multiworker", detect.from_environment(), peer_timeout=1)
"""
  addresses = ["127.0.0.1:23456", "127.0.0.1:23457"]  # the second one never comes
  task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  result = run("-c", lines, TF_CONFIG=json.dumps(task))
  assert result.returncode == -signal.SIGALRM  # which a shell calls 142
  assert "make_strategy" in result.stderr


# the lowest, the highest of those that are permanent, and both ends of the others
@pytest.mark.parametrize("code", [0, 1, 8, 142, 147])
def test_the_local_launcher_restarts_by_the_table(code: int, tmp_path: pathlib.Path):
  (tmp_path / "toy.py").write_text(
    "import pathlib, sys\n"
    f"mark = pathlib.Path({str(tmp_path / 'started')!r})\n"
    "again = mark.exists()\n"
    "mark.touch()\n"
    f"sys.exit(0 if again else {code})\n"
  )
  flags = ("--module=toy", "--workers=1", "--max_restarts=1", "--backoff_seconds=0")
  path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
  result = run(str(ROOT / "launch/local.py"), *flags, PYTHONPATH=path)
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
