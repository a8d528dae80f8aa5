"""The checkpoint manager after saves that fail and with late listings."""

import pathlib

import pytest
import tensorflow as tf

from facedist import errors
from facedist.training.checkpoint import checkpoints, manager
from facedist.training.checkpoint.manager import CheckpointManager
from facedist.training.checkpoint.uploader import DiskUploader


def checkpoint_manager(uploader: DiskUploader) -> CheckpointManager:
  return CheckpointManager(
    tf.train.Checkpoint(weight=tf.Variable(1.0)),
    tf.distribute.OneDeviceStrategy("CPU:0"),
    uploader=uploader,
    facts={"data_fingerprint": "d"},
  )


@pytest.fixture
def uploader(tmp_path: pathlib.Path) -> DiskUploader:
  return DiskUploader(str(tmp_path), is_chief=True, keep_last=9)


def no_marker(*_) -> None:
  """Fails as writing a marker on a full disk does."""
  raise OSError(28, "No space left on device")


def test_a_run_is_not_done_whose_last_step_could_not_be_saved(
  tmp_path: pathlib.Path, uploader: DiskUploader, monkeypatch: pytest.MonkeyPatch
):
  saves = checkpoint_manager(uploader)
  saves.save(0)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "write_marker", no_marker)
    saves.save(8)
  assert not saves.finish(8, is_done=True)
  assert not checkpoints.is_done(str(tmp_path))
  with pytest.raises(errors.SavingError, match=r"^step-00000008 did not reach"):
    uploader.check()
  saves.save(8)  # as a run does that rewound
  assert saves.finish(8, is_done=True)
  assert checkpoints.is_done(str(tmp_path))
  uploader.check()


def test_a_worker_that_does_not_see_the_chosen_checkpoint_looks_again(
  tmp_path: pathlib.Path, uploader: DiskUploader
):
  saves = checkpoint_manager(uploader)
  found = manager.wait_for_checkpoint(
    str(tmp_path), 4, sleep=lambda seconds: saves.save(4)
  )
  assert found == checkpoints.at(str(tmp_path), 4)


def test_a_worker_that_never_sees_the_chosen_checkpoint_ends(tmp_path: pathlib.Path):
  pauses: list[float] = []
  with pytest.raises(errors.DataError, match="give all workers the same folder"):
    manager.wait_for_checkpoint(str(tmp_path), 4, sleep=pauses.append)
  assert sum(pauses) == 60.0
