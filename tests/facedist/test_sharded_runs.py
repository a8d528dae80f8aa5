"""A run whose head is sharded, saved on two workers and gone on with elsewhere."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from facedist import errors
from facedist.distributed.detect import free_addresses
from facedist.training.checkpoint import checkpoints
from tests import noise_sets
from tests.facedist.two_workers import LIMIT, launch, losses

NUM_STEPS = 9  # 144 images, batches of 16
STOP = 5
FLAGS = (
  "--backbone=speck",
  "--full_epochs=1",
  "--checkpoint_every_steps=2",
  "--embedding_size=2048",  # so that a worker's rows are larger than its log
  "--head_shard_rows=3",
)
SHARDED = (*FLAGS, "--head_sharding=sharded")


def write_shards(folder: pathlib.Path) -> pathlib.Path:
  """Writes noise of nine identities; returns its folder."""
  data = folder / "shards"
  noise_sets.write(data, identities=9, images=16, size=32, shards=2)
  return data


@pytest.mark.slow
def test_what_two_workers_saved_goes_on_on_one_device_and_on_four(
  tmp_path: pathlib.Path,
):
  """Nine identities: five and four, all nine, or three, three, three and none.

  Worker 1 finds no room in its second save, which must leave no trace.
  """
  data = write_shards(tmp_path)
  processes: list[subprocess.Popen] = []

  def start(name: str, *flags: str, workers: int = 1, fault: str = "none") -> None:
    """Starts the workers of a run, whose folder and logs have its name."""
    addresses = free_addresses(workers)
    folders = (f"--data_dir={data}", f"--workdir={tmp_path / name}")
    for index in range(workers):
      log = tmp_path / f"{name}-{index}.log"
      processes.append(
        launch(addresses, index, *folders, *flags, log=log, fault=(fault, 2))
      )

  def log(name: str, index: int = 0) -> str:
    return (tmp_path / f"{name}-{index}.log").read_text()

  try:
    start("two", *SHARDED, f"--stop_after_steps={STOP}", workers=2, fault=_FULL)
    start("whole", *FLAGS, "--strategy=one")
    codes = [process.wait(LIMIT) for process in processes]
    assert codes == [errors.ExitCode.SAVING] * 2 + [0], log("two") + log("whole")
    assert "step 2 could not be saved (the rows of worker 1: see its log)" in log("two")
    assert "step 2 could not be saved" in log("two", 1)
    assert "step-00000002.rows-" in log("two", 1)
    saved = [one.step for one in checkpoints.list_checkpoints(str(tmp_path / "two"))]
    assert saved == [0, 4, STOP]
    assert not list((tmp_path / "two" / "checkpoints").glob("step-00000002*"))
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    start("two", *SHARDED, "--strategy=one")
    start("four", *SHARDED, "--strategy=mirrored", fault="four devices")
    codes = [process.wait(LIMIT) for process in processes[3:]]
    assert codes == [0, 0], log("two") + log("four")
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert f"resumed step-0000000{STOP}" in log("two")
  assert "4 replicas = 1 workers x 4 CPU" in log("four")
  expected = losses(tmp_path / "whole")
  assert sorted(expected) == list(range(NUM_STEPS))
  for name in ("two", "four"):
    found = losses(tmp_path / name)
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose(
      [found[step] for step in expected], list(expected.values()), rtol=1e-4
    )


@pytest.mark.slow
def test_two_workers_that_stop_a_sampled_run_and_go_on_end_with_the_same_bits(
  tmp_path: pathlib.Path,
):
  flags = (
    f"--data_dir={write_shards(tmp_path)}",
    "--backbone=speck",
    "--full_epochs=1",
    "--embedding_size=8",
    "--head=adaface",
    "--head_sharding=sampled",
    "--head_sample_rate=0.4",
    "--head_shard_rows=3",
    "--optimizer=adamw",
    "--ema_decay=0.9",
  )

  def start(name: str, *more: str) -> list[subprocess.Popen]:
    workers, folder = free_addresses(2), f"--workdir={tmp_path / name}"
    return [
      launch(workers, index, *flags, folder, *more, log=tmp_path / f"{name}-{index}")
      for index in range(2)
    ]

  processes: list[subprocess.Popen] = []
  try:
    processes += start("whole") + start("cut", f"--stop_after_steps={STOP}")
    assert [process.wait(LIMIT) for process in processes] == [0] * 4
    processes += start("cut")
    codes = [process.wait(LIMIT) for process in processes[4:]]
    assert codes == [0, 0], (tmp_path / "cut-0").read_text()
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert f"resumed step-0000000{STOP}" in (tmp_path / "cut-0").read_text()
  assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
  whole, cut = (final_checksums(tmp_path / name) for name in ("whole", "cut"))
  assert len(whole) == 1 + 3 * 4  # two pieces of each block, of three columns
  assert cut == whole


def final_checksums(workdir: pathlib.Path) -> dict[str, int]:
  """CRCs of all that the last checkpoint holds: weights, average, slots and rows."""
  last = checkpoints.list_checkpoints(str(workdir))[-1]
  assert last.step == NUM_STEPS
  marker = last.marker()
  files = marker["files"] | marker["rows"]["files"]
  return {
    name: facts["crc32c"]
    for name, facts in files.items()
    if ".data" in name or ".rows" in name
  }


_FULL = "file size limit of worker 1"
