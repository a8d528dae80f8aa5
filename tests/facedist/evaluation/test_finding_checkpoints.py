"""Finding a run and its checkpoints from another process."""

import pathlib

import pytest

from facedist import errors
from facedist.evaluation import evaluator
from facedist.training.checkpoint import checkpoints


def _save(workdir: pathlib.Path, *steps: int) -> None:
  folder = workdir / "checkpoints"
  folder.mkdir(parents=True, exist_ok=True)
  for step in steps:
    (folder / f"step-{step:08d}.index").write_bytes(b"")
    (folder / f"step-{step:08d}.data-00000-of-00001").write_bytes(b"")
    (folder / f"step-{step:08d}.json").write_text("{}")


@pytest.mark.parametrize(
  "wanted",
  [
    *("900", "step-00000900", "FOLDER/step-00000900", "FOLDER/step-00000900.json"),
    *("FOLDER/step-00000900.index", "FOLDER/step-00000900.data-00000-of-00001"),
  ],
)
def test_a_checkpoint_is_found_by_step_name_or_path(tmp_path, wanted):
  _save(tmp_path, 900, 1000)
  folder = str(tmp_path / "checkpoints")
  found = evaluator.find_checkpoint(str(tmp_path), wanted.replace("FOLDER", folder))
  assert found == checkpoints.Checkpoint(900, folder + "/step-00000900")


def test_a_checkpoint_of_another_folder_is_found_by_its_path(tmp_path):
  _save(tmp_path / "run", 100)
  _save(tmp_path / "copy", 70)
  path = str(tmp_path / "copy" / "checkpoints" / "step-00000070")
  found = evaluator.find_checkpoint(str(tmp_path / "run"), path)
  assert found == checkpoints.Checkpoint(70, path)


def test_a_checkpoint_without_its_marker_does_not_exist(tmp_path):
  _save(tmp_path, 100, 200)
  (tmp_path / "checkpoints" / "step-00000200.json").unlink()
  assert evaluator.find_checkpoint(str(tmp_path), None).step == 100
  for wanted in ("200", str(tmp_path / "checkpoints" / "step-00000200")):
    with pytest.raises(errors.DataError, match=r"no complete checkpoint.*it has 100"):
      evaluator.find_checkpoint(str(tmp_path), wanted)


def test_waiting_for_a_run_that_has_started_returns_at_once(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  evaluator.wait_for_run(str(tmp_path), timeout_seconds=0.0, poll_seconds=60.0)
