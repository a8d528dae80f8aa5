"""A run whose head is sharded, saved on two workers and gone on with elsewhere."""

import pathlib
import shutil

import numpy as np
import pytest

from facedist import errors
from facedist.training.checkpoint import checkpoints
from tests import noise_sets
from tests.facedist.two_workers import Start, final_files, losses

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
SAMPLED = (
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
FULL = ("file size limit of worker 1", 2)


@pytest.fixture(scope="module")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Noise of nine identities, for the runs of this file."""
  folder = tmp_path_factory.mktemp("shards")
  noise_sets.write(folder, identities=9, images=16, size=32, shards=2)
  return str(folder)


@pytest.mark.slow
def test_what_two_workers_saved_goes_on_on_one_device_and_on_four(
  start: Start, tmp_path: pathlib.Path
):
  """Nine identities: five and four, all nine, or three, three, three and none.

  Worker 1 finds no room in its second save, which must leave no trace.
  """
  folder = {name: tmp_path / name for name in ("two", "whole", "four")}
  two = start(folder["two"], *SHARDED, f"--stop_after_steps={STOP}", fault=FULL)
  whole = start(folder["whole"], *FLAGS, "--strategy=one", workers=1)
  assert two.codes() == [errors.ExitCode.SAVING] * 2, two.log(0)
  assert whole.codes() == [0], whole.log(0)
  assert "step 2 could not be saved (the rows of worker 1: see its log)" in two.log(0)
  assert "step 2 could not be saved" in two.log(1)
  assert "step-00000002.rows-" in two.log(1)
  saved = [one.step for one in checkpoints.list_checkpoints(str(folder["two"]))]
  assert saved == [0, 4, STOP]
  assert not list((folder["two"] / "checkpoints").glob("step-00000002*"))
  shutil.copytree(folder["two"], folder["four"])
  one = start(folder["two"], *SHARDED, "--strategy=one", workers=1)
  mirrored = (*SHARDED, "--strategy=mirrored")
  four = start(folder["four"], *mirrored, fault=("four devices", 0), workers=1)
  assert one.codes() + four.codes() == [0, 0], one.log(0) + four.log(0)
  assert f"resumed step-0000000{STOP}" in one.log(0)
  assert "4 replicas = 1 workers x 4 CPU" in four.log(0)
  expected = losses(folder["whole"])
  assert sorted(expected) == list(range(NUM_STEPS))
  for name in ("two", "four"):
    found = losses(folder[name])
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose(
      [found[step] for step in expected], list(expected.values()), rtol=1e-4
    )


@pytest.mark.slow
def test_two_workers_that_stop_a_sampled_run_and_go_on_end_with_the_same_bits(
  start: Start, tmp_path: pathlib.Path
):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  runs = [start(whole, *SAMPLED), start(cut, *SAMPLED, f"--stop_after_steps={STOP}")]
  assert [run.codes() for run in runs] == [[0, 0]] * 2
  resumed = start(cut, *SAMPLED)
  assert resumed.codes() == [0, 0], resumed.log(0)
  assert f"resumed step-0000000{STOP}" in resumed.log(0)
  assert losses(cut) == losses(whole)
  expected = final_files(whole, NUM_STEPS)
  assert len(expected) == 1 + 3 * 4  # two pieces of each block, of three columns
  assert final_files(cut, NUM_STEPS) == expected
