"""launch/soak.py: three kills here, fifty with `make soak`."""

import pathlib
import subprocess
import sys

import pytest

SOAK = pathlib.Path(__file__).parents[2] / "launch" / "soak.py"


@pytest.mark.slow
def test_workers_killed_at_random_lose_nothing():
  result = subprocess.run(
    [sys.executable, str(SOAK), "--kills=3"],
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  log = result.stdout + result.stderr
  assert result.returncode == 0, log
  assert "3 kills, 90 steps: all losses and the final weights are the same" in log
  assert "kill 3 of 3, in a save" in log
