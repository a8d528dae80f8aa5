"""Checkpoints of a class-sharded head: whole, and restored on any number of devices."""

import os
import pathlib
import resource
import tempfile
from collections.abc import Iterator

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import checkpoints, sharded
from facedist.training.checkpoint.manager import CheckpointManager
from facedist.training.checkpoint.uploader import (
  DiskUploader,
  Uploader,
  open_uploader,
)

NUM_ROWS = 9
PIECE_ROWS = 2


def one() -> tf.distribute.Strategy:
  return tf.distribute.OneDeviceStrategy("CPU:0")


def two() -> tf.distribute.Strategy:
  """Two replicas in this process, which reduce without collectives."""
  reduction = tf.distribute.ReductionToOneDevice()
  return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduction)


class Run:
  """A run's state and rows, and its checkpoint manager."""

  def __init__(
    self, uploader: Uploader, strategy: tf.distribute.Strategy | None = None
  ) -> None:
    strategy = strategy or one()
    replicas = strategy.num_replicas_in_sync
    self.table = RowTable(
      num_rows=NUM_ROWS,
      row_shape=(4,),
      slots=("momentum",),
      num_replicas=replicas,
      places=dict(enumerate(strategy.extended.worker_devices)),
    )
    with strategy.scope():
      self.weight = tf.Variable(0.0)
    self.store = sharded.RowStore(
      self.table,
      strategy,
      workdir=uploader.workdir,
      is_chief=True,
      piece_rows=PIECE_ROWS,
    )
    self.manager = CheckpointManager(
      tf.train.Checkpoint(weight=self.weight),
      strategy,
      uploader=uploader,
      facts={"data_fingerprint": "d"},
      rows=self.table,
      piece_rows=PIECE_ROWS,
    )

  def save(self, *steps: int) -> None:
    """Sets the state and the rows to values of each step, and saves."""
    for step in steps:
      self.weight.assign(step)
      for shard in self.table.shards:
        stop = shard.first + self.table.rows_each  # with the padding
        for number, variable in enumerate(shard.variables.values()):
          variable.assign(rows(step, number, shard.first, stop))
      self.manager.save(step)

  def check(self, step: int) -> None:
    assert self.weight.numpy() == step
    for shard in self.table.shards:
      for number, variable in enumerate(shard.variables.values()):
        np.testing.assert_array_equal(
          variable.numpy()[: shard.count], rows(step, number, shard.first, shard.stop)
        )


def rows(step: int, column: int, first: int, stop: int) -> np.ndarray:
  numbers = np.arange(first * 4, stop * 4, dtype=np.float32).reshape(-1, 4)
  return numbers + 1000 * step + 100 * column


def on_disk(workdir: pathlib.Path | str, **more) -> DiskUploader:
  return DiskUploader(str(workdir), is_chief=True, keep_last=more.pop("keep_last", 3))


def names(workdir: pathlib.Path | str) -> list[str]:
  return storage.list_names(checkpoints.folder(str(workdir)))


def steps(workdir: pathlib.Path | str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(str(workdir))]


@pytest.fixture
def own_temporary_folder(tmp_path: pathlib.Path, monkeypatch) -> Iterator[pathlib.Path]:
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  yield tmp_path / "tmp"
  assert not os.listdir(tmp_path / "tmp") or [*(tmp_path / "tmp").glob("*.lock")]


@pytest.mark.parametrize(("writers", "readers"), [(two, one), (one, two), (two, two)])
def test_a_run_continues_on_another_number_of_devices(
  writers, readers, tmp_path: pathlib.Path
):
  Run(on_disk(tmp_path), writers()).save(3, 7)
  resumed = Run(on_disk(tmp_path), readers())
  found = resumed.manager.restore()
  assert found is not None
  assert found.step == 7
  resumed.check(7)
  assert resumed.manager.restore(at_most=6).step == 3
  resumed.check(3)


def test_the_marker_names_every_file_with_size_and_checksum(tmp_path: pathlib.Path):
  Run(on_disk(tmp_path)).save(7)
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  marker = found.marker()
  files = marker["files"] | marker["rows"]["files"]
  assert sorted([*files, "step-00000007.json"]) == names(tmp_path)
  assert len(marker["rows"]["files"]) == 2 * 5  # columns, pieces
  for name, facts in files.items():
    content = (tmp_path / "checkpoints" / name).read_bytes()
    assert facts["bytes"] == len(content)
    assert facts["crc32c"] == google_crc32c.value(content)


def test_restoring_the_network_alone_reads_no_rows(tmp_path: pathlib.Path):
  Run(on_disk(tmp_path)).save(7)
  for path in (tmp_path / "checkpoints").glob("*.rows-*"):
    path.unlink()
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  weight = tf.Variable(0.0)
  checkpoints.restore(tf.train.Checkpoint(weight=weight), found, is_whole=False)
  assert weight.numpy() == 7.0
  with pytest.raises(errors.DataError, match="does not exist"):
    sharded.verify(found)


def test_a_corrupt_file_is_named_and_the_checkpoint_before_is_used(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  Run(on_disk(tmp_path)).save(3, 7)
  bad = tmp_path / "checkpoints" / "step-00000007.rows-momentum-00000004-00000006.npy"
  bad.write_bytes(bad.read_bytes()[::-1])
  resumed = Run(on_disk(tmp_path))
  assert resumed.manager.restore().step == 3
  resumed.check(3)
  assert f"{bad} is corrupt" in caplog.text
  assert "trying the checkpoint before" in caplog.text
  with pytest.raises(errors.DataError, match=bad.name):
    sharded.verify(checkpoints.at(str(tmp_path), 7))
  other = tmp_path / "checkpoints" / "step-00000003.rows-centres-00000000-00000002.npy"
  other.unlink()
  with pytest.raises(errors.DataError, match=r"every checkpoint of .* is corrupt"):
    Run(on_disk(tmp_path)).manager.restore()


def test_a_save_killed_between_rows_and_marker_is_never_seen(tmp_path: pathlib.Path):
  run = Run(on_disk(tmp_path))
  run.save(3, 7)
  before = names(tmp_path)
  run.store.save(9)  # all that a process does before it writes the marker
  assert any(name.startswith("step-00000009.rows-") for name in names(tmp_path))
  resumed = Run(on_disk(tmp_path))
  assert resumed.manager.restore().step == 7
  resumed.check(7)
  checkpoints.remove_unfinished(str(tmp_path))
  assert names(tmp_path) == before


def test_a_step_saved_again_does_not_exist_until_it_is_whole(tmp_path: pathlib.Path):
  run = Run(on_disk(tmp_path))
  run.save(3, 7)
  run.store.save(7)
  assert steps(tmp_path) == [3]
  assert Run(on_disk(tmp_path)).manager.restore().step == 3


def test_rows_are_deleted_with_their_checkpoint_and_kept_under_a_lease(
  tmp_path: pathlib.Path,
):
  checkpoints.hold(str(tmp_path), "reader", [1])
  Run(on_disk(tmp_path, keep_last=2)).save(0, 1, 2, 3)
  assert steps(tmp_path) == [1, 2, 3]
  with_rows = {name.split(".")[0] for name in names(tmp_path) if ".rows-" in name}
  assert with_rows == {f"step-0000000{step}" for step in (1, 2, 3)}


@pytest.mark.parametrize("limit", [100, 400], ids=["no rows", "no marker"])
def test_a_save_on_a_full_disk_is_reported_and_leaves_no_files(
  limit: int, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
  uploader = on_disk(tmp_path)
  run = Run(uploader)
  run.save(3)
  before = names(tmp_path)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    run.save(7)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "step 7 could not be saved" in caplog.text
  assert uploader.missing == ["step-00000007"]
  assert names(tmp_path) == before
  run.save(9)
  assert steps(tmp_path) == [3, 9]


def test_rows_of_another_head_end_the_run(tmp_path: pathlib.Path):
  run = Run(on_disk(tmp_path))
  checkpoints.save(
    tf.train.Checkpoint(weight=run.weight),
    str(tmp_path),
    step=1,
    is_chief=True,
    facts={"data_fingerprint": "d"},
  )
  with pytest.raises(errors.DataError, match="does not fit this head"):
    run.manager.restore()


@pytest.mark.usefixtures("own_temporary_folder")
def test_restoring_from_a_bucket_downloads_each_object_of_the_checkpoint_once(bucket):
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=2) as uploader:
    Run(uploader).save(3, 7)
  folder = checkpoints.folder(workdir)
  sizes = {name: storage.size(f"{folder}/{name}") for name in names(workdir)}
  resumed = Run(on_disk(workdir))
  bucket.traffic.clear()
  assert resumed.manager.restore().step == 7
  resumed.check(7)
  read = {name: bucket.traffic.bytes_read(f"{folder}/{name}") for name in sizes}
  assert len(sizes) == 2 * 13  # marker, index, data and ten files of rows
  assert read == {name: size * ("00000007" in name) for name, size in sizes.items()}


@pytest.mark.usefixtures("own_temporary_folder")
def test_rows_reach_a_bucket_before_the_marker_and_are_read_from_there(bucket):
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=2) as uploader:
    Run(uploader).save(1, 3, 7)
    assert not [name for name in names(uploader.folder) if ".rows-" in name]
  assert steps(workdir) == [3, 7]
  assert all(
    name.startswith(("step-00000003", "step-00000007")) for name in names(workdir)
  )
  sent = [one.path for one in bucket.traffic.exchanges if one.method == "POST"]
  newest = [pathlib.PurePath(path).name for path in sent if "step-00000007" in path]
  assert newest[-1] == "step-00000007.json"
  assert sum(".rows-" in name for name in newest) == 10
  resumed = Run(on_disk(workdir), two())
  assert resumed.manager.restore().step == 7
  resumed.check(7)
  bad = (
    f"{checkpoints.folder(workdir)}/step-00000007.rows-centres-00000000-00000002.npy"
  )
  storage.write_bytes(bad, storage.read_bytes(bad)[::-1])
  assert resumed.manager.restore().step == 3
  resumed.check(3)
