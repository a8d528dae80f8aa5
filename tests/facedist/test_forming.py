"""Two workers of which one is stopped or lost before they train."""

import pathlib
import signal

import pytest

from facedist import errors
from facedist.data import noise
from facedist.training.checkpoint import checkpoints
from tests.facedist.two_workers import LIMIT, TOTAL_STEPS, Start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("victim", [0, 1])
def test_a_sigterm_that_tensorflow_takes_while_the_cluster_forms_stops_all(
  start: Start, tmp_path: pathlib.Path, victim: int
):
  # the other one comes later than --peer_timeout, so all have to wait for it before
  fault = f"asked to stop, in forming of worker {victim}"
  run = start(tmp_path / "run", fault=(fault, 0))
  assert run.codes() == [143, 143], run.log(0) + run.log(1)
  logs = run.log(0) + run.log(1)
  assert "SIGTERM: there is nothing to save yet; ending" in logs or (
    "SIGTERM: all workers save at the next step and end" in run.log(victim)
  )


@pytest.mark.parametrize(
  ("victim", "place"), [(1, "at the start"), (0, "with the data")]
)
def test_a_stop_before_there_is_anything_to_save_is_told_to_the_other(
  start: Start, tmp_path: pathlib.Path, victim: int, place: str
):
  run = start(tmp_path, fault=(f"asked to stop, {place} of worker {victim}", 0))
  assert run.codes() == [errors.ExitCode.PREEMPTED] * 2, run.log(0) + run.log(1)
  name = f"worker {victim} at {run.workers[victim]}"
  reason = "SIGTERM: there is nothing to save yet; ending"
  assert f"error: {name} left at step 0 with exit code 143: {reason}" in (
    run.log(1 - victim)
  )


@pytest.mark.parametrize(("deed", "victim"), [("killed", 0), ("stopped", 1)])
def test_a_worker_lost_before_the_cluster_forms_is_named(
  start: Start, tmp_path: pathlib.Path, deed: str, victim: int
):
  run = start(tmp_path, fault=(f"{deed}, at the start of worker {victim}", 0))
  assert run.processes[1 - victim].wait(LIMIT) == errors.ExitCode.PEER_LOST
  name = f"worker {victim} at {run.workers[victim]}"
  assert f"error: {name} has been silent for " in run.log(1 - victim)


def test_a_stop_while_a_phase_compiles_or_weights_are_validated_saves(
  start: Start, tmp_path: pathlib.Path
):
  noise.write_noise_shards(
    str(tmp_path / "shards"),
    num_identities=8,
    images_per_identity=20,
    val_images_per_identity=4,
    image_size=32,
    num_shards=2,
    seed=0,
  )
  flags = (
    f"--data_dir={tmp_path / 'shards'}",
    "--validate_every_steps=6",
    "--grace_seconds=150",
  )
  before = -1
  for place, victim in (("in compiling", 0), ("in validating", 1)):
    fault = f"asked to stop, {place} of worker {victim}"
    run = start(tmp_path / "run", *flags, fault=(fault, 0))
    assert run.codes() == [143, 143], run.log(0) + run.log(1)
    saved = checkpoints.list_checkpoints(str(tmp_path / "run"))[-1]
    assert before < saved.step < TOTAL_STEPS
    assert all(f"step {saved.step} is saved" in run.log(one) for one in (0, 1))
    before = saved.step


def test_a_worker_stuck_with_the_interpreter_s_lock_ends_too_and_is_named(
  start: Start, tmp_path: pathlib.Path
):
  faults = [(f"stuck with the lock of worker {victim}", 2) for victim in (0, 1)]
  runs = [start(tmp_path / fault[0], fault=fault) for fault in faults]
  for victim, run in enumerate(runs):
    codes = run.codes()
    assert codes[victim] == -signal.SIGALRM, run.log(victim)
    assert "in sleep_with_the_lock" in run.log(victim)  # the stacks, down to the line
    assert codes[1 - victim] == errors.ExitCode.PEER_LOST, run.log(1 - victim)
    name = f"worker {victim} at {run.workers[victim]}"
    assert f"error: {name} has been silent for " in run.log(1 - victim)
