"""launch/soak.py: a kill of a sharded run; fifty with `make soak`."""

import importlib
import json
import pathlib
import runpy
import subprocess
import sys
import types

import pytest

from facedist import errors

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TOY = """
import json, os, pathlib, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
folder = pathlib.Path({folder!r}) / "checkpoints"
folder.mkdir(exist_ok=True)
(folder.parent / f"started-{{time.monotonic_ns()}}-{{index}}").touch()
time.sleep(0.3)  # what a start takes
while len(markers := list(folder.glob("*.json"))) < 30:
  stem = folder / f"step-{{len(markers):08d}}"
  if index == 0:
    stem.with_suffix(".index").touch()
    time.sleep(0.05)
    stem.with_suffix(".json").touch()
  time.sleep(0.1)
"""
# a launcher whose run has written its log, and is over before a kill
ENDED_AT_ONCE = """
import json, pathlib, sys
(workdir,) = (word[10:] for word in sys.argv if word.startswith("--workdir="))
pathlib.Path(workdir).mkdir()
rows = [json.dumps({"step": step, "time": step}) for step in (1, 2)]
pathlib.Path(workdir, "train_metrics.jsonl").write_text("\\n".join(rows))
"""


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
  """The module beside the script."""
  monkeypatch.syspath_prepend(str(LAUNCH))
  return importlib.import_module("killer")


def test_kills_fall_in_turn_in_a_save_at_a_start_and_in_training(
  killer: types.ModuleType, tmp_path: pathlib.Path, monkeypatch, caplog
):
  caplog.set_level("INFO", logger="absl")
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "toy.py").write_text(TOY.format(folder=str(tmp_path)))
  flags = ("--module=toy", "--workers=2", "--max_restarts=9", "--backoff_seconds=0")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  launcher = subprocess.Popen([sys.executable, str(LAUNCH / "local.py"), *flags])
  try:
    pace = killer.Pace(start_seconds=0.2, step_seconds=0.01)
    count = killer.kill(launcher, str(tmp_path), kills=3, seed=0, pace=pace)
    assert launcher.wait(60) == 0
  finally:
    launcher.kill()
    launcher.wait()
  assert count == 3
  assert [text.split(", ")[1] for text in caplog.messages] == list(killer.MOMENTS)
  steps = [int(text.split()[-1]) for text in caplog.messages]
  assert steps[0] <= steps[1] < steps[2]  # at the start nothing was saved yet
  # each kill is of an attempt of its own; one may fall before a worker has said so
  assert 6 <= len(list(tmp_path.glob("started-*"))) <= 8


def test_fewer_kills_than_asked_for_are_a_failure(
  killer: types.ModuleType, tmp_path: pathlib.Path, caplog
):
  (tmp_path / "local.py").write_text(ENDED_AT_ONCE)
  script = tmp_path / "soak.py"  # it starts the launcher that lies beside it
  script.write_text((LAUNCH / "soak.py").read_text())
  soak = runpy.run_path(str(script))
  settings = soak["SoakConfig"](kills=2, output_dir=str(tmp_path))
  assert soak["main"](settings) == errors.ExitCode.INTERNAL
  assert "ended after 0 of 2 kills" in caplog.text


def test_the_final_weights_are_compared_with_a_sharded_head_s_rows(
  killer: types.ModuleType, tmp_path: pathlib.Path
):
  soak = importlib.import_module("soak")
  (tmp_path / "checkpoints").mkdir()
  files = {"step-1.index": {"crc32c": 1}, "step-1.data-0": {"crc32c": 2}}
  marker = {"files": files, "rows": {"files": {"step-1.rows-a": {"crc32c": 3}}}}
  (tmp_path / "checkpoints/step-00000001.json").write_text(json.dumps(marker))
  assert soak._weights(str(tmp_path)) == {"step-1.data-0": 2, "step-1.rows-a": 3}


@pytest.mark.slow
def test_a_worker_killed_in_a_save_loses_nothing():
  # two rows a file, so that a save is many
  sharded = "--head_sharding=sharded --head_shard_rows=2"
  result = subprocess.run(
    [sys.executable, str(LAUNCH / "soak.py"), "--kills=1", f"--train_flags={sharded}"],
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  log = result.stdout + result.stderr
  assert result.returncode == 0, log
  assert "1 kills, 30 steps: all losses and the final weights are" in log
  assert "kill 1 of 1, in a save" in log
