"""Checkpoints on a disk and in a bucket: saved, found, verified, restored, deleted."""

import json
import os
import pathlib
import time
from collections.abc import Callable

import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.training.checkpoint import checkpoints, manager
from facedist.training.checkpoint.uploader import DiskUploader


def state(value: float) -> tf.train.Checkpoint:
  return tf.train.Checkpoint(weight=tf.Variable(tf.fill([64], value)))


def save(workdir: pathlib.Path, *saved: int, is_chief: bool = True) -> None:
  for step in saved:
    checkpoints.save(
      state(float(step)), str(workdir), step=step, is_chief=is_chief, facts={"a": 1}
    )


def steps(workdir: pathlib.Path | str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(str(workdir))]


@pytest.fixture
def checkpoint_manager(tmp_path: pathlib.Path) -> manager.CheckpointManager:
  return manager.CheckpointManager(
    state(1.0),
    tf.distribute.OneDeviceStrategy("CPU:0"),
    uploader=DiskUploader(str(tmp_path), is_chief=True, keep_last=9),
    facts={"data_fingerprint": "d"},
  )


@pytest.mark.parametrize("sign", ["", *"[]*?{}\\ %#'\"&;$:é", "[1]", "%s"])
def test_a_checkpoint_is_restored_from_a_folder_of_any_name(tmp_path, sign: str):
  workdir = tmp_path / f"run{sign}"
  save(workdir, 100)
  (found,) = checkpoints.list_checkpoints(str(workdir))
  assert (found.step, found.name, found.marker()["a"]) == (100, "step-00000100", 1)
  restored = state(0.0)
  checkpoints.restore(restored, found, is_whole=True)
  assert restored.weight.numpy()[0] == 100.0
  opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
  assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_checkpoints_are_listed_in_step_order_beyond_eight_digits(
  tmp_path: pathlib.Path,
):
  save(tmp_path, 99_999_999, 100_000_000, 5)
  assert steps(tmp_path) == [5, 99_999_999, 100_000_000]


def test_without_its_marker_a_checkpoint_does_not_exist_and_is_cleaned_up(
  tmp_path: pathlib.Path,
):
  save(tmp_path, 1, 2)
  folder = tmp_path / "checkpoints"
  (folder / "step-00000002.json").unlink()
  (folder / "step-00000003.index.tempstate123").touch()
  (folder / "step-00000004_temp").mkdir()
  assert steps(tmp_path) == [1]
  checkpoints.remove_unfinished(str(tmp_path))
  assert {name.split(".")[0] for name in os.listdir(folder)} == {"step-00000001"}


def test_files_that_are_not_named_as_checkpoints_are_left_alone(tmp_path: pathlib.Path):
  save(tmp_path, 1)
  strays = ("step-best.json", "step-best.index", "step-5.json", "step-0000000007.json")
  for name in strays:
    (tmp_path / "checkpoints" / name).write_text("{}")
  assert steps(tmp_path) == [1]
  checkpoints.remove_unfinished(str(tmp_path))
  assert set(strays) < set(os.listdir(tmp_path / "checkpoints"))


def test_a_run_whose_last_step_could_not_be_saved_is_not_done(
  tmp_path: pathlib.Path,
  checkpoint_manager: manager.CheckpointManager,
  limit_files: Callable[[int], None],
):
  checkpoint_manager.save(0)
  before = os.listdir(tmp_path / "checkpoints")
  limit_files(100)
  checkpoint_manager.save(8)
  limit_files(-1)
  assert os.listdir(tmp_path / "checkpoints") == before
  assert not checkpoint_manager.finish(8, is_done=True)
  assert not checkpoints.is_done(str(tmp_path))
  checkpoint_manager.save(8)  # as a run does that rewound
  assert checkpoint_manager.finish(8, is_done=True)
  assert json.loads((tmp_path / "done.json").read_text()) == {"step": 8}


def test_workers_other_than_the_chief_leave_nothing(tmp_path: pathlib.Path):
  save(tmp_path, 1, is_chief=False)
  assert list(tmp_path.iterdir()) == []


def test_a_worker_looks_for_the_chosen_checkpoint_until_it_sees_it_or_a_minute_is_over(
  tmp_path: pathlib.Path,
):
  found = manager.wait_for_checkpoint(
    str(tmp_path), 4, sleep=lambda seconds: save(tmp_path, 4)
  )
  assert found == checkpoints.at(str(tmp_path), 4)
  pauses: list[float] = []
  with pytest.raises(errors.DataError, match="give all workers the same folder"):
    manager.wait_for_checkpoint(str(tmp_path), 5, sleep=pauses.append)
  assert sum(pauses) == 60.0


def test_the_newest_and_those_under_a_lease_are_kept(
  workdir: str, tmp_path: pathlib.Path
):
  save(tmp_path, *range(6))
  for found in checkpoints.list_checkpoints(str(tmp_path)):
    checkpoints.upload(found, workdir)
  checkpoints.hold(workdir, "one", [0])
  checkpoints.hold(workdir, "two", [0, 2])
  checkpoints.prune(workdir, keep_last=2)
  assert steps(workdir) == [0, 2, 4, 5]
  checkpoints.hold(workdir, "two", [])
  checkpoints.prune(workdir, keep_last=2)
  assert steps(workdir) == [0, 4, 5]
  names = storage.list_names(checkpoints.folder(workdir))
  assert len([name for name in names if "data" in name]) == 3


def test_milestones_are_never_deleted(tmp_path: pathlib.Path):
  save(tmp_path, *range(0, 70, 10))
  checkpoints.prune(str(tmp_path), keep_last=1, keep_every=30)
  assert steps(tmp_path) == [0, 30, 60]


def test_a_checkpoint_that_comes_under_a_lease_during_a_prune_stays(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  save(tmp_path, 0, 1, 2)
  held_steps = checkpoints.held_steps

  def held_a_moment_later(folder: str) -> set[int]:
    held = held_steps(folder)
    checkpoints.hold(folder, "reader", [0])
    return held

  monkeypatch.setattr(checkpoints, "held_steps", held_a_moment_later)
  checkpoints.prune(str(tmp_path), keep_last=1)
  assert steps(tmp_path) == [0, 2]
  found = checkpoints.at(str(tmp_path), 0)
  checkpoints.restore(state(1.0), found, is_whole=True)


def test_a_lease_that_is_not_renewed_expires(workdir: str, monkeypatch):
  checkpoints.hold(workdir, "reader", [5])
  now = time.time()
  monkeypatch.setattr(time, "time", lambda: now + checkpoints.LEASE_SECONDS - 10)
  assert checkpoints.held_steps(workdir) == {5}
  monkeypatch.setattr(time, "time", lambda: now + checkpoints.LEASE_SECONDS + 10)
  assert checkpoints.held_steps(workdir) == set()
  checkpoints.hold(workdir, "reader", [5])
  assert checkpoints.held_steps(workdir) == {5}


@pytest.mark.parametrize("content", [b" ", b"[1, 2]", b'{"steps": [1]}'])
def test_what_is_no_lease_is_ignored(tmp_path: pathlib.Path, content: bytes):
  path = tmp_path / checkpoints.LEASES_FOLDER / "other.json"
  storage.write_bytes(str(path), content)
  checkpoints.hold(str(tmp_path), "reader", [7])
  assert checkpoints.held_steps(str(tmp_path)) == {7}


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
  checkpoint_manager: manager.CheckpointManager,
  caplog: pytest.LogCaptureFixture,
):
  checkpoint_manager.save(1)
  checkpoint_manager.save(2, batch_offset=4)
  marker = tmp_path / "checkpoints/step-00000002.json"
  if content is None:
    content = marker.read_bytes().replace(b'"batch_offset": 4', b'"batch_offset": 6')
  marker.write_bytes(content)
  assert checkpoint_manager.restore().step == 1
  assert f"{marker} is corrupt: {why}" in caplog.text
  assert "trying the checkpoint before" in caplog.text


def test_a_checkpoint_is_verified_before_it_is_restored(
  workdir: str, tmp_path: pathlib.Path, temporary_folder: pathlib.Path
):
  save(tmp_path, 7)
  checkpoints.upload(checkpoints.at(str(tmp_path), 7), workdir)
  (found,) = checkpoints.list_checkpoints(workdir)
  restored = state(0.0)
  checkpoints.restore(restored, found, is_whole=True)
  assert restored.weight.numpy()[0] == 7.0
  data = found.path + ".data-00000-of-00001"
  storage.write_bytes(data, storage.read_bytes(data)[::-1])
  with pytest.raises(errors.DataError, match=f"^{data} is corrupt"):
    checkpoints.restore(restored, found, is_whole=True)
  assert not [*temporary_folder.iterdir()]


def test_a_part_can_be_restored_by_itself(tmp_path: pathlib.Path):
  whole = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0))
  checkpoints.save(whole, str(tmp_path), step=1, is_chief=True, facts={})
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  part = tf.train.Checkpoint(b=tf.Variable(0.0))
  checkpoints.restore(part, found, is_whole=False)
  assert part.b.numpy() == 2.0
  with pytest.raises(errors.DataError, match="does not fit this network"):
    checkpoints.restore(part, found, is_whole=True)
