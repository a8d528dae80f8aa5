"""Two workers of which one is stopped or lost before they train.

Runs that mostly wait are started at once.
"""

import pathlib
import signal

import pytest

from facedist import errors
from facedist.training.checkpoint import checkpoints
from tests import noise_sets
from tests.facedist.two_workers import ENDLESS, LIMIT, TOTAL_STEPS, Start

pytestmark = pytest.mark.slow


def test_a_sigterm_that_tensorflow_takes_while_the_cluster_forms_stops_all(
  start: Start, tmp_path: pathlib.Path
):
  # the other one comes later than --peer_timeout, so all have to wait for it before
  faults = [(f"asked to stop, in forming of worker {asked}", 0) for asked in (0, 1)]
  runs = [start(tmp_path / fault[0], fault=fault) for fault in faults]
  for asked, run in enumerate(runs):
    assert run.codes() == [143, 143], run.log(0) + run.log(1)
    logs = run.log(0) + run.log(1)
    assert "SIGTERM: there is nothing to save yet; ending" in logs or (
      "SIGTERM: all workers save at the next step and end" in run.log(asked)
    )


def test_a_stop_or_a_loss_before_the_cluster_forms_is_told_to_the_other(
  start: Start, tmp_path: pathlib.Path
):
  faults = (
    ("asked to stop, at the start of worker 1", 1),
    ("asked to stop, with the data of worker 0", 0),
    ("killed, at the start of worker 0", 0),
    ("stopped, at the start of worker 1", 1),
  )
  runs = [start(tmp_path / fault, fault=(fault, 0)) for fault, _ in faults]
  for run, (fault, index) in zip(runs, faults, strict=True):
    code = run.processes[1 - index].wait(LIMIT)
    log = run.log(1 - index)
    name = f"worker {index} at {run.workers[index]}"
    if fault.startswith("asked to stop"):
      assert run.codes() == [errors.ExitCode.PREEMPTED] * 2, log
      reason = "SIGTERM: there is nothing to save yet; ending"
      assert f"error: {name} left at step 0 with exit code 143: {reason}" in log
    else:
      assert code == errors.ExitCode.PEER_LOST, log
      assert f"error: {name} has been silent for " in log


def test_a_stop_while_a_phase_compiles_or_weights_are_validated_saves(
  start: Start, tmp_path: pathlib.Path
):
  noise_sets.write(
    tmp_path / "shards", identities=8, images=20, val_images=4, size=32, shards=2
  )
  flags = (
    "--backbone=speck",
    f"--data_dir={tmp_path / 'shards'}",
    "--validate_every_steps=6",
    "--grace_seconds=150",
  )
  before = -1
  for place, index in (("in compiling", 0), ("in validating", 1)):
    fault = f"asked to stop, {place} of worker {index}"
    run = start(tmp_path / "run", *flags, fault=(fault, 0))
    assert run.codes() == [143, 143], run.log(0) + run.log(1)
    saved = checkpoints.list_checkpoints(str(tmp_path / "run"))[-1]
    assert before < saved.step < TOTAL_STEPS
    assert all(f"step {saved.step} is saved" in run.log(one) for one in (0, 1))
    before = saved.step


def test_a_worker_stuck_while_it_holds_the_interpreter_s_lock_ends_and_is_named(
  start: Start, tmp_path: pathlib.Path
):
  faults = [(f"stuck with the lock of worker {index}", 2) for index in (0, 1)]
  runs = [start(tmp_path / fault[0], *ENDLESS, fault=fault) for fault in faults]
  for index, run in enumerate(runs):
    codes = run.codes()
    assert codes[index] == -signal.SIGALRM, run.log(index)
    assert "in sleep_with_the_lock" in run.log(index)  # the stacks, down to the line
    assert codes[1 - index] == errors.ExitCode.PEER_LOST, run.log(1 - index)
    name = f"worker {index} at {run.workers[index]}"
    assert f"error: {name} has been silent for " in run.log(1 - index)
