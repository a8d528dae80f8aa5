"""A run of one worker that goes back, its workdir in a bucket that is slow."""

import pathlib

import numpy as np
import pytest

from facedist import errors
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import buckets, processes
from tests.facedist.two_workers import FLAGS, LIMIT, SABOTAGE, bad_batch, last_error

pytestmark = pytest.mark.slow

ONE = (
  *(flag for flag in FLAGS if not flag.startswith(("--strategy", "--full_epochs"))),
  "--backbone=speck",
)
STEPS = 10  # 160 images, an epoch, batches of 16


def test_a_run_goes_back_until_it_may_not_and_goes_on_when_it_may_again(
  bucket: buckets.Bucket, noise_shards: str, tmp_path: pathlib.Path
):
  bucket.faults.always("delay", method="POST", delay_seconds=0.2)
  workdir = f"{bucket}/run"
  bad = ",".join(bad_batch(noise_shards, step, worker=0) for step in (7, 9))

  def train(most: int) -> tuple[int, str]:
    flags = ("--on_nan=rewind", f"--max_rewinds={most}", "--checkpoint_every_steps=4")
    kept = ("--keep_last=1", "--keep_every=4")
    folders = (f"--data_dir={noise_shards}", f"--workdir={workdir}")
    result = processes.run(
      *(SABOTAGE, "not finite", "0", "--", "--strategy=one", *ONE),
      *("--full_epochs=1", *flags, *kept, *folders),
      environment={"BAD_RECORDS": bad, "TMPDIR": str(tmp_path)},
      timeout=LIMIT,
    )
    return result.returncode, result.stderr

  code, log = train(most=1)
  assert code == errors.ExitCode.DIVERGED, log
  assert "Back to step 4 and past batch 7 (rewind 1 of --max_rewinds=1)" in log
  error = last_error(log)
  assert error.startswith("error: step 5: the loss or gradient is not finite")
  assert "That was after 1 rewinds and --max_rewinds=1" in error
  code, log = train(most=2)
  assert code == 0, log
  assert "resumed step-00000004" in log
  assert "Back to step 4 and past batch 9 (rewind 2 of --max_rewinds=2)" in log
  found = checkpoints.list_checkpoints(workdir)
  assert [one.step for one in found] == [0, 4, 8, STEPS]  # the newest, and milestones
  marker = found[-1].marker()
  assert (marker["batch_offset"], marker["rewinds"]) == (6, 2)
  assert checkpoints.is_done(workdir)
  losses = dict(metric_writer.step_losses(workdir))
  assert sorted(losses) == list(range(STEPS))
  assert np.isfinite(list(losses.values())).all()
