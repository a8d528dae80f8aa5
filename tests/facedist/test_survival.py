"""A run of two workers in which one is stopped, killed, stuck or wrong."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import pytest

from facedist import errors
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import files
from tests.facedist.two_workers import (
  ENDLESS,
  LIMIT,
  TOTAL_STEPS,
  Run,
  Start,
  bad_batch,
  final_files,
  last_error,
  losses,
)

pytestmark = pytest.mark.slow

# Seconds, with --peer_timeout=5 and a heartbeat every 0.5 s. The worker that measures
# does not count its own pauses.
MAX_SILENCE = 8


def check_that_it_ends_as(
  undisturbed: pathlib.Path, run: Run, workdir: pathlib.Path
) -> None:
  """Waits for a run's end; compares losses and weights with the undisturbed run."""
  assert run.codes() == [0, 0], run.log(0) + run.log(1)
  assert losses(workdir) == losses(undisturbed)
  assert final_files(workdir) == final_files(undisturbed)


def test_a_signal_to_one_worker_stops_all_at_one_saved_step(
  start: Start, undisturbed: pathlib.Path, tmp_path: pathlib.Path
):
  run = start(tmp_path / "run")
  run.wait_for(" images/s")  # the first line of training
  run.processes[1].send_signal(signal.SIGUSR1)
  assert run.codes() == [143, 143], run.log(0) + run.log(1)
  saved = checkpoints.list_checkpoints(str(tmp_path / "run"))[-1]
  assert 0 < saved.step < TOTAL_STEPS
  assert "ok      data: 160 images" in run.log(0)  # the doctor's quick form
  assert all(f"step {saved.step} is saved" in run.log(one) for one in (0, 1))
  check_that_it_ends_as(undisturbed, start(tmp_path / "run"), tmp_path / "run")


def test_a_second_signal_ends_at_once_and_the_checkpoint_stays(
  start: Start, tmp_path: pathlib.Path
):
  run = start(tmp_path / "run", "--backbone=speck", fault=("stuck in a save", 1))
  run.wait_for("step 10/40")
  run.processes[0].send_signal(signal.SIGTERM)
  run.wait_for("all workers save at the next step")
  run.processes[0].send_signal(signal.SIGTERM)
  assert run.processes[0].wait(LIMIT) == 143
  (whole,) = checkpoints.list_checkpoints(str(tmp_path / "run"))
  assert whole.step == 0
  with checkpoints.stage(whole):  # raises DataError unless all files are whole
    pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_is_named_by_the_other(
  start: Start, tmp_path: pathlib.Path, number: signal.Signals
):
  files = [tmp_path / f"alive-{lost}" for lost in (0, 1)]
  runs = [  # both at once, because they mostly wait
    start(
      tmp_path / f"run-{lost}",
      *ENDLESS,
      own_flags={1 - lost: (f"--heartbeat_file={files[lost]}",)},
    )
    for lost in (0, 1)
  ]
  for lost, run in enumerate(runs):
    run.wait_for("step 6/")
    wait_until_touched(files[lost])
    run.processes[lost].send_signal(number)
  for lost, run in enumerate(runs):
    assert run.processes[1 - lost].wait(LIMIT) == errors.ExitCode.PEER_LOST
    name = f"worker {lost} at {run.workers[lost]}"
    silence = re.search(
      rf"error: {name} has been silent for (\d+) s; last heard of at step \d+ \(",
      run.log(1 - lost),
    )
    assert silence, run.log(1 - lost)
    assert int(silence[1]) <= MAX_SILENCE


def wait_until_touched(path: pathlib.Path) -> None:
  """Waits until a worker touches its heartbeat file again."""
  os.utime(path, (0, 0))
  deadline = time.monotonic() + LIMIT
  while path.stat().st_mtime == 0:
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_worker_that_never_starts_is_named(start: Start, tmp_path: pathlib.Path):
  runs = [
    start(tmp_path / f"run-{missing}", "--start_timeout=3", only=(1 - missing,))
    for missing in (0, 1)
  ]
  for missing, run in enumerate(runs):
    assert run.processes[0].wait(LIMIT) == errors.ExitCode.PEER_LOST
    assert f"worker {missing} at {run.workers[missing]} did not start" in run.log(0)


def test_a_stuck_worker_shows_its_stacks_and_is_named(
  start: Start, tmp_path: pathlib.Path
):
  faults = (
    (("stuck in Python of worker 0", 3), 0),
    (("stuck in a read of worker 1", 40), 1),
    (("stuck in a save of worker 0", 1), 0),
  )
  runs = [  # all at once, because they mostly wait
    start(tmp_path / fault[0], *ENDLESS, "--step_timeout=20", fault=fault)
    for fault, _ in faults
  ]
  for run, (_, stuck) in zip(runs, faults, strict=True):
    codes = run.codes()
    assert codes[stuck] == errors.ExitCode.STUCK, run.log(stuck)
    assert codes[1 - stuck] == errors.ExitCode.PEER_LOST, run.log(1 - stuck)
    assert "in sleep" in run.log(stuck)  # the stacks, down to the line
    assert f"worker {stuck} at {run.workers[stuck]}" in run.log(1 - stuck)


def test_what_is_not_finite_stops_the_run_and_names_step_worker_and_records(
  start: Start, noise_shards: str, tmp_path: pathlib.Path
):
  bad = bad_batch(noise_shards, 7, 1)
  run = start(
    tmp_path / "run",
    "--backbone=speck",
    fault=("not finite", 0),
    environment={"BAD_RECORDS": bad},
  )
  assert run.codes() == [errors.ExitCode.DIVERGED] * 2, run.log(0)
  assert "step 7: the loss or gradient is not finite on replica 1 (worker 1)" in (
    run.log(0)
  )
  assert "its records are train-0000" in run.log(0)
  assert max(losses(tmp_path / "run")) == 6  # what was good is logged
  saved = checkpoints.list_checkpoints(str(tmp_path / "run"))
  assert [checkpoint.step for checkpoint in saved] == [0]


def test_a_flipped_bit_names_its_replica(start: Start, tmp_path: pathlib.Path):
  flags = ("--backbone=speck", "--divergence_check_steps=4")
  run = start(tmp_path / "run", *flags, fault=("flipped bit", 3))
  assert run.codes() == [errors.ExitCode.DIFFERENT] * 2, run.log(0)
  assert "the weights of replica 1 (worker 1) are not those of the others" in (
    run.log(0)
  )


@pytest.mark.parametrize("small_disk", ["64m"], indirect=True)
def test_a_save_that_cannot_be_written_is_told_and_training_goes_on(
  start: Start, undisturbed: pathlib.Path, small_disk: pathlib.Path
):
  # the workdir's disk is full to its last byte from step 10 to 20
  often = "--log_every_steps=1"  # more than a last block of the disk takes
  run = start(small_disk, often, fault=("full disk", 2))
  assert run.codes() == [errors.ExitCode.SAVING, 0], run.log(0)
  assert "step 10 could not be saved" in run.log(0)
  assert "No space left on device" in run.log(0)
  assert run.log(0).count("the logs could not be written") == 1
  last = last_error(run.log(0))
  assert last.startswith("error: step-00000010, some of the logs did not reach")
  saved = [one.step for one in checkpoints.list_checkpoints(str(small_disk))]
  assert saved == [0, 20, 30, 40]
  assert losses(small_disk) == losses(undisturbed)
  assert final_files(small_disk) == final_files(undisturbed)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(
  start: Start, undisturbed: pathlib.Path, tmp_path: pathlib.Path
):
  run_until_step_30(undisturbed, tmp_path / "run")
  newest = checkpoints.list_checkpoints(str(tmp_path / "run"))[-1]
  (data,) = pathlib.Path(newest.path).parent.glob(f"{newest.name}.data-*")
  files.flip_byte(data, data.stat().st_size // 2)
  run = start(tmp_path / "run")
  check_that_it_ends_as(undisturbed, run, tmp_path / "run")
  assert f"{data} is corrupt" in run.log(0)
  assert "resumed step-00000020" in run.log(0)
  assert "resumed step-00000020" in run.log(1)


def run_until_step_30(undisturbed: pathlib.Path, workdir: pathlib.Path) -> None:
  """Makes the folder of a run that was killed after its checkpoint of step 30."""
  shutil.copytree(undisturbed, workdir)
  (workdir / "done.json").unlink()
  for path in (workdir / "checkpoints").glob(f"step-{TOTAL_STEPS:08d}*"):
    path.unlink()
  log = workdir / metric_writer.LOG_NAME
  rows = [
    line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 30
  ]
  log.write_text("".join(f"{row}\n" for row in rows))
