"""A run of two workers that goes back, its workdir in a bucket that is slow."""

import pathlib

import numpy as np
import pytest

from facedist import errors
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import buckets
from tests.facedist.two_workers import Run, Start, bad_batch, last_error

pytestmark = pytest.mark.slow

STEPS = 10  # 160 images, an epoch, batches of 16


def test_a_run_goes_back_until_it_may_not_and_goes_on_when_it_may_again(
  bucket: buckets.Bucket, noise_shards: str, start: Start, tmp_path: pathlib.Path
):
  bucket.faults.always("delay", method="POST", delay_seconds=0.2)
  workdir = f"{bucket}/run"
  bad = ",".join(
    bad_batch(noise_shards, step, worker) for step, worker in ((7, 1), (9, 0))
  )

  def train(most: int) -> Run:
    flags = ("--on_nan=rewind", f"--max_rewinds={most}", "--checkpoint_every_steps=4")
    return start(
      workdir,
      *(
        "--backbone=speck",
        "--full_epochs=1",
        *flags,
        "--keep_last=1",
        "--keep_every=4",
      ),
      fault=("not finite", 0),
      environment={"BAD_RECORDS": bad, "TMPDIR": str(tmp_path)},
    )

  run = train(most=1)
  assert run.codes() == [errors.ExitCode.DIVERGED] * 2, run.log(0)
  back = "Back to step 4 and past batch"
  assert f"{back} 7 (rewind 1 of --max_rewinds=1)" in run.log(0)
  assert "on replica 1 (worker 1)" in run.log(1)
  error = last_error(run.log(0))
  assert error.startswith("error: step 5: the loss or gradient is not finite")
  assert "That was after 1 rewinds and --max_rewinds=1" in error
  run = train(most=2)
  assert run.codes() == [0, 0], run.log(0)
  assert "resumed step-00000004" in run.log(0)
  assert f"{back} 9 (rewind 2 of --max_rewinds=2)" in run.log(0)
  found = checkpoints.list_checkpoints(workdir)
  assert [one.step for one in found] == [0, 4, 8, STEPS]  # the newest, and milestones
  marker = found[-1].marker()
  assert (marker["batch_offset"], marker["rewinds"]) == (6, 2)
  assert checkpoints.is_done(workdir)
  losses = dict(metric_writer.step_losses(workdir))
  assert sorted(losses) == list(range(STEPS))
  assert np.isfinite(list(losses.values())).all()
