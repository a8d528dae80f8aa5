"""Checkpoints on a disk and in a bucket: saved, found, verified, restored, deleted."""

import errno
import json
import os
import pathlib
import tempfile

import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.training.checkpoint import checkpoints, manager
from facedist.training.checkpoint.uploader import DiskUploader
from tests import files


def state(value: float) -> tf.train.Checkpoint:
  return tf.train.Checkpoint(weight=tf.Variable(value))


def save(workdir: pathlib.Path, step: int, *, is_chief: bool = True) -> None:
  checkpoints.save(
    state(float(step)), str(workdir), step=step, is_chief=is_chief, facts={"a": 1}
  )


def steps(workdir: pathlib.Path | str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(str(workdir))]


def test_a_checkpoint_is_found_and_restored(tmp_path: pathlib.Path):
  save(tmp_path, 100)
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  assert (found.step, found.name) == (100, "step-00000100")
  assert found.marker()["a"] == 1
  restored = state(0.0)
  checkpoints.restore(restored, found, is_whole=True)
  assert restored.weight.numpy() == 100.0


@pytest.mark.parametrize("sign", [*"[]*?{}\\ %#'\"&;$:é", "[1]", "%s"])
def test_a_checkpoint_is_restored_from_a_folder_of_any_name(tmp_path, sign: str):
  workdir = tmp_path / f"run{sign}"
  save(workdir, 100)
  (found,) = checkpoints.list_checkpoints(str(workdir))
  restored = state(0.0)
  checkpoints.restore(restored, found, is_whole=True)
  assert restored.weight.numpy() == 100.0
  opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
  assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_checkpoints_are_listed_in_step_order_beyond_eight_digits(
  tmp_path: pathlib.Path,
):
  for step in (99_999_999, 100_000_000, 5):
    save(tmp_path, step)
  assert steps(tmp_path) == [5, 99_999_999, 100_000_000]


def test_without_its_marker_a_checkpoint_does_not_exist_and_is_cleaned_up(
  tmp_path: pathlib.Path,
):
  save(tmp_path, 1)
  save(tmp_path, 2)
  folder = tmp_path / "checkpoints"
  (folder / "step-00000002.json").unlink()
  (folder / "step-00000003.index.tempstate123").touch()
  (folder / "step-00000004_temp").mkdir()
  assert steps(tmp_path) == [1]
  checkpoints.remove_unfinished(str(tmp_path))
  assert {name.split(".")[0] for name in os.listdir(folder)} == {"step-00000001"}


class FullDisk(tf.train.Checkpoint):
  """Fails as TensorFlow does on a full disk: what is written first stays."""

  def write(self, path: str) -> None:
    os.makedirs(f"{path}_temp")
    pathlib.Path(f"{path}_temp", "part-00000-of-00001.data").write_bytes(b"part")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_failed_leaves_no_files(tmp_path: pathlib.Path):
  uploader = DiskUploader(str(tmp_path), is_chief=True, keep_last=3)
  checkpoint_manager = manager.CheckpointManager(
    FullDisk(weight=tf.Variable(1.0)),
    tf.distribute.get_strategy(),
    uploader=uploader,
    facts={},
  )
  checkpoint_manager.save(7)
  assert uploader.missing == ["step-00000007"]
  assert os.listdir(tmp_path / "checkpoints") == []


def test_workers_other_than_the_chief_leave_nothing(tmp_path: pathlib.Path):
  save(tmp_path, 1, is_chief=False)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_in_bucket", [False, True])
def test_the_newest_and_those_under_a_lease_are_kept(
  is_in_bucket: bool, tmp_path: pathlib.Path, bucket: str
):
  for step in range(6):
    save(tmp_path, step)
  workdir = str(tmp_path)
  if is_in_bucket:
    workdir = f"{bucket}/run"
    for found in checkpoints.list_checkpoints(str(tmp_path)):
      checkpoints.upload(found, workdir)
  checkpoints.hold(workdir, "reader", [0, 2])
  checkpoints.prune(workdir, keep_last=2)
  assert steps(workdir) == [0, 2, 4, 5]
  checkpoints.hold(workdir, "reader", [])
  checkpoints.prune(workdir, keep_last=2)
  assert steps(workdir) == [4, 5]
  names = storage.list_names(checkpoints.folder(workdir))
  assert len([name for name in names if "data" in name]) == 2


def test_milestones_are_never_deleted(tmp_path: pathlib.Path):
  for step in range(0, 70, 10):
    save(tmp_path, step)
  checkpoints.prune(str(tmp_path), keep_last=1, keep_every=30)
  assert steps(tmp_path) == [0, 30, 60]


def test_a_checkpoint_that_comes_under_a_lease_during_a_prune_stays(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  for step in range(3):
    save(tmp_path, step)
  workdir = str(tmp_path)
  held_steps = checkpoints.held_steps

  def held_a_moment_later(folder: str) -> set[int]:
    held = held_steps(folder)
    checkpoints.hold(folder, "reader", [0])
    return held

  monkeypatch.setattr(checkpoints, "held_steps", held_a_moment_later)
  checkpoints.prune(workdir, keep_last=1)
  assert steps(tmp_path) == [0, 2]
  checkpoints.restore(
    state(1.0), checkpoints.list_checkpoints(workdir)[0], is_whole=True
  )


def test_a_corrupt_file_is_named(tmp_path: pathlib.Path):
  save(tmp_path, 1)
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  path = pathlib.Path(found.path + ".data-00000-of-00001")
  files.flip_byte(path, 0)
  with pytest.raises(errors.DataError, match=r"data-00000-of-00001 is corrupt"):
    checkpoints.restore(state(0.0), found, is_whole=True)


@pytest.mark.parametrize(
  ("content", "why"),
  [
    (b"", "it is not JSON"),
    (b"\xff\xfe", "it is not JSON"),
    (b"[1]", "it is no JSON object"),
    (b"{}", "it names no files"),
    (b'{"step": 2, "files": {"a": 1}}', "it names files without a CRC-32C"),
    (None, "its CRC-32C is not the one it names"),
  ],
)
def test_a_corrupt_marker_is_named_and_the_checkpoint_before_is_used(
  content: bytes | None,
  why: str,
  tmp_path: pathlib.Path,
  caplog: pytest.LogCaptureFixture,
):
  facts = {"data_fingerprint": "d"}
  strategy = tf.distribute.OneDeviceStrategy("CPU:0")
  uploader = DiskUploader(str(tmp_path), is_chief=True, keep_last=9)
  checkpoint_manager = manager.CheckpointManager(
    state(1.0), strategy, uploader=uploader, facts=facts
  )
  checkpoint_manager.save(1)
  checkpoint_manager.save(2, batch_offset=4)
  marker = tmp_path / "checkpoints/step-00000002.json"
  if content is None:
    content = marker.read_bytes().replace(b'"batch_offset": 4', b'"batch_offset": 6')
  marker.write_bytes(content)
  assert checkpoint_manager.restore().step == 1
  assert f"{marker} is corrupt: {why}" in caplog.text
  assert "trying the checkpoint before" in caplog.text


def test_files_that_are_not_named_as_checkpoints_are_left_alone(tmp_path: pathlib.Path):
  save(tmp_path, 1)
  strays = ("step-best.json", "step-best.index", "step-5.json", "step-0000000007.json")
  for name in strays:
    (tmp_path / "checkpoints" / name).write_text("{}")
  assert steps(tmp_path) == [1]
  checkpoints.remove_unfinished(str(tmp_path))
  assert set(strays) < set(os.listdir(tmp_path / "checkpoints"))


def test_a_checkpoint_in_a_bucket_is_downloaded_verified_and_restored(
  tmp_path: pathlib.Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  (tmp_path / "tmp").mkdir()
  save(tmp_path, 7)
  checkpoints.upload(checkpoints.at(str(tmp_path), 7), f"{bucket}/run")
  (found,) = checkpoints.list_checkpoints(f"{bucket}/run")
  restored = state(0.0)
  checkpoints.restore(restored, found, is_whole=True)
  assert restored.weight.numpy() == 7.0
  data = found.path + ".data-00000-of-00001"
  storage.write_bytes(data, storage.read_bytes(data)[::-1])
  with pytest.raises(errors.DataError, match=r"gs://.*data-00000-of-00001 is corrupt"):
    checkpoints.restore(state(0.0), found, is_whole=True)
  assert os.listdir(tmp_path / "tmp") == []


def test_another_network_is_refused(tmp_path: pathlib.Path):
  save(tmp_path, 1)
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  other = tf.train.Checkpoint(other=tf.Variable(0.0))
  with pytest.raises(errors.DataError, match="does not fit this network"):
    checkpoints.restore(other, found, is_whole=True)


def test_a_part_can_be_restored_by_itself(tmp_path: pathlib.Path):
  whole = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0))
  checkpoints.save(whole, str(tmp_path), step=1, is_chief=True, facts={})
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  part = tf.train.Checkpoint(b=tf.Variable(0.0))
  checkpoints.restore(part, found, is_whole=False)
  assert part.b.numpy() == 2.0
  with pytest.raises(errors.DataError, match="does not fit"):
    checkpoints.restore(part, found, is_whole=True)


def test_a_finished_run_is_marked_and_unmarked(tmp_path: pathlib.Path):
  workdir = str(tmp_path)
  assert not checkpoints.is_done(workdir)
  checkpoints.mark_done(workdir, step=7)
  assert checkpoints.is_done(workdir)
  assert json.loads((tmp_path / "done.json").read_text()) == {"step": 7}
  checkpoints.unmark_done(workdir)
  assert not checkpoints.is_done(workdir)
