"""launch/demo.py as a user runs it, on a few people."""

import json
import pathlib
import subprocess
import sys

import cv2
import pytest

from facedist import errors

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 500  # far more than it needs, however busy the machine
SMALL = (
  "--num_identities=12",
  "--images_per_identity=4",
  "--lfw_identities=20",
  "--lfw_pairs_per_fold=5",
  "--image_size=32",
)


def run_demo(output_dir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, str(ROOT / "launch" / "demo.py"), *flags]
  return subprocess.run(
    [*command, f"--output_dir={output_dir}"],
    capture_output=True,
    text=True,
    timeout=SECONDS,
    check=False,
  )


def content(folder: pathlib.Path) -> dict[str, bytes]:
  """All files but those that each start makes: the evaluator's events, the lock."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and "tfevents" not in path.name and path.parent.name != "lock"
  }


@pytest.mark.slow
def test_the_demo_goes_the_whole_way_and_a_second_start_changes_nothing(
  tmp_path: pathlib.Path,
):
  flags = tmp_path / "short.flags"
  flags.write_text(
    f"--flagfile={ROOT / 'configs' / 'demo.flags'}\n"
    "--global_batch=16\n--checkpoint_every_steps=3\n"
    "--full_epochs=2\n--full_warmup_epochs=0.5\n"
  )
  demo = tmp_path / "demo"
  first = run_demo(demo, *SMALL, f"--train_flags={flags}")
  assert first.returncode == errors.ExitCode.DONE, first.stdout + first.stderr
  scores = (demo / "run" / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in scores.splitlines()]
  assert [row["step"] for row in rows] == [0, 3, 6]
  for row in rows:
    mean, deviation = row["accuracy_mean"], row["accuracy_std"]
    assert f"{row['step']:6d}   {mean:.4f} ± {deviation:.4f}" in first.stdout
  embedded = json.loads((demo / "embeddings.json").read_text())["embeddings"]
  images = {path.name for path in (demo / "faces/lfw/images").glob("*/*.jpg")}
  assert {pathlib.Path(entry["path"]).name for entry in embedded} <= images
  assert cv2.imread(str(demo / "demo.png")).shape == (1060, 1200, 3)
  for path in ("run", "embeddings.json", "demo.png"):
    assert str(demo / path) in first.stdout

  before = content(demo)
  second = run_demo(demo, *SMALL, f"--train_flags={flags}")
  assert second.returncode == errors.ExitCode.DONE, second.stdout + second.stderr
  assert second.stdout.count("nothing to do") == 2
  assert content(demo) == before


@pytest.mark.slow
def test_a_command_that_fails_ends_the_demo_with_its_exit_code(tmp_path: pathlib.Path):
  (tmp_path / "faces").mkdir()
  (tmp_path / "faces" / "mine.txt").write_text("not drawn")
  result = run_demo(tmp_path, *SMALL)
  assert result.returncode == errors.ExitCode.USAGE
  assert "is not empty and holds no drawn faces" in result.stderr
  assert "step 1 ended with exit code 2" in result.stderr
  assert "2/7" not in result.stdout
