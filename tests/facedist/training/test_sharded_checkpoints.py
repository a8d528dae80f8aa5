"""Checkpoints of a class-sharded head: whole, and restored on any number of devices."""

import pathlib
from collections.abc import Callable

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
from tests.facedist.training.steps import one

PIECE_ROWS = 2


class Run:
  """A run's state and rows, and its checkpoint manager."""

  def __init__(
    self,
    workdir: pathlib.Path | str,
    *,
    uploader: Uploader | None = None,
    strategy: tf.distribute.Strategy | None = None,
    **shape: object,
  ) -> None:
    """Builds both; `shape` replaces facts of the table."""
    self.strategy = strategy or one()
    self.uploader = uploader or DiskUploader(str(workdir), is_chief=True, keep_last=3)
    self.table = RowTable(
      num_replicas=self.strategy.num_replicas_in_sync,
      places=dict(enumerate(self.strategy.extended.worker_devices)),
      **{"num_rows": 9, "row_shape": (4,), "slots": ("momentum",)} | shape,
    )
    with self.strategy.scope():
      self.weight = tf.Variable(0.0)
    self.manager = CheckpointManager(
      tf.train.Checkpoint(weight=self.weight),
      self.strategy,
      uploader=self.uploader,
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

  def restores(self, step: int, *, at_most: int | None = None) -> None:
    """Restores the newest checkpoint; fails if that is not the one of `step`."""
    found = self.manager.restore(at_most=at_most)
    assert found is not None
    assert found.step == step
    self.check(step)


def rows(step: int, column: int, first: int, stop: int) -> np.ndarray:
  numbers = np.arange(first * 4, stop * 4, dtype=np.float32).reshape(-1, 4)
  return numbers + 1000 * step + 100 * column


def names(workdir: pathlib.Path | str) -> list[str]:
  return storage.list_names(checkpoints.folder(str(workdir)))


def steps(workdir: pathlib.Path | str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(str(workdir))]


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_continues_on_another_number_of_devices(
  writers: int,
  readers: int,
  tmp_path: pathlib.Path,
  two_halves: tf.distribute.Strategy,
):
  strategies = {1: one(), 2: two_halves}
  Run(tmp_path, strategy=strategies[writers]).save(3, 7)
  resumed = Run(tmp_path, strategy=strategies[readers])
  resumed.restores(7)
  resumed.restores(3, at_most=6)


def test_restoring_the_network_alone_reads_no_rows(tmp_path: pathlib.Path):
  Run(tmp_path).save(7)
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
  Run(tmp_path).save(3, 7)
  bad = tmp_path / "checkpoints" / "step-00000007.rows-momentum-00000004-00000006.npy"
  bad.write_bytes(bad.read_bytes()[::-1])
  Run(tmp_path).restores(3)
  assert f"{bad} is corrupt" in caplog.text
  assert "trying the checkpoint before" in caplog.text
  with pytest.raises(errors.DataError, match=bad.name):
    sharded.verify(checkpoints.at(str(tmp_path), 7))
  other = tmp_path / "checkpoints" / "step-00000003.rows-centres-00000000-00000002.npy"
  other.unlink()
  with pytest.raises(errors.DataError, match=r"every checkpoint of .* is corrupt"):
    Run(tmp_path).manager.restore()


@pytest.mark.parametrize(("step", "before"), [(9, [3, 7]), (7, [3])])
def test_a_save_killed_between_rows_and_marker_is_never_seen(
  step: int, before: list[int], tmp_path: pathlib.Path
):
  run = Run(tmp_path)
  run.save(3, 7)
  store = sharded.RowStore(
    run.table, run.strategy, workdir=str(tmp_path), is_chief=True, piece_rows=PIECE_ROWS
  )
  store.save(step)  # all that a process does before it writes the marker
  assert any(name.startswith(f"step-0000000{step}.rows-") for name in names(tmp_path))
  assert steps(tmp_path) == before
  Run(tmp_path).restores(before[-1])
  checkpoints.remove_unfinished(str(tmp_path))
  assert {name.split(".")[0] for name in names(tmp_path)} == {
    f"step-0000000{step}" for step in before
  }


@pytest.mark.parametrize("limit", [100, 400], ids=["no rows", "no marker"])
def test_a_save_on_a_full_disk_is_reported_and_leaves_no_files(
  limit: int,
  tmp_path: pathlib.Path,
  caplog: pytest.LogCaptureFixture,
  limit_files: Callable[[int], None],
):
  run = Run(tmp_path)
  run.save(3)
  before = names(tmp_path)
  limit_files(limit)
  run.save(7)
  limit_files(-1)
  assert "step 7 could not be saved" in caplog.text
  assert run.uploader.missing == ["step-00000007"]
  assert names(tmp_path) == before
  run.save(9)
  assert steps(tmp_path) == [3, 9]


@pytest.mark.parametrize(
  ("shape", "what"),
  [
    ({"num_rows": 12}, "num_rows is 9, not 12"),
    ({"row_shape": (5,)}, r"row_shape is \[4\], not \[5\]"),
    ({"slots": ("m", "v")}, r"columns is .*, not \['centres', 'm', 'v'\]"),
  ],
)
def test_rows_of_another_head_end_the_run(
  shape: dict[str, object], what: str, tmp_path: pathlib.Path
):
  Run(tmp_path).save(1)
  with pytest.raises(errors.DataError, match=rf"does not fit this head \(rows: {what}"):
    Run(tmp_path, **shape).manager.restore()


def test_a_checkpoint_without_rows_ends_the_run(tmp_path: pathlib.Path):
  run = Run(tmp_path)
  run.save(1)
  (found,) = checkpoints.list_checkpoints(str(tmp_path))
  marker = {key: fact for key, fact in found.marker().items() if key != "rows"}
  checkpoints.write_marker(found.path, marker)
  with pytest.raises(errors.DataError, match="num_rows is None, not 9"):
    run.manager.restore()


def test_rows_reach_a_bucket_before_the_marker_and_are_downloaded_once(
  bucket, temporary_folder: pathlib.Path, two_halves: tf.distribute.Strategy
):
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=2) as uploader:
    Run(workdir, uploader=uploader).save(1, 3, 7)
    assert not [name for name in names(uploader.folder) if ".rows-" in name]
  assert steps(workdir) == [3, 7]
  sent = [one.path for one in bucket.traffic.exchanges if one.method == "POST"]
  newest = [pathlib.PurePath(path).name for path in sent if "step-00000007" in path]
  assert newest[-1] == "step-00000007.json"
  assert sum(".rows-" in name for name in newest) == 10
  folder = checkpoints.folder(workdir)
  sizes = {name: storage.size(f"{folder}/{name}") for name in names(workdir)}
  assert len(sizes) == 2 * 13  # marker, index, data and ten files of rows
  resumed = Run(workdir, strategy=two_halves)
  bucket.traffic.clear()
  resumed.restores(7)
  read = {name: bucket.traffic.bytes_read(f"{folder}/{name}") for name in sizes}
  assert read == {name: size * ("00000007" in name) for name, size in sizes.items()}
  bad = f"{folder}/step-00000007.rows-centres-00000000-00000002.npy"
  storage.write_bytes(bad, storage.read_bytes(bad)[::-1])
  resumed.restores(3)
  assert {path.suffix for path in temporary_folder.iterdir()} == {".lock"}
