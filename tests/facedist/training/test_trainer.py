"""The order in which a trainer saves, validates, stops, resumes and rewinds."""

import pathlib
from collections.abc import Callable
from unittest import mock

import pytest
import tensorflow as tf

from facedist import errors
from facedist.distributed.cluster import Cluster
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.training import schedules, step_health, train_step
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.manager import CheckpointManager
from facedist.training.checkpoint.uploader import DiskUploader
from facedist.training.config import resolve
from facedist.training.inputs import BadRecordLimit, Inputs
from facedist.training.trainer import Cadence, Trainer
from tests.facedist.training.steps import BATCH, SPECK, build, dataset, one

CADENCE = Cadence(
  log_every_steps=2,
  validate_every_steps=2,
  checkpoint_every_steps=4,
  divergence_check_steps=0,
  stop_after_steps=0,
  on_nan="rewind",
  max_rewinds=1,
)


class Run:
  """A run of a tiny network in one process, with everything a real run has."""

  def __init__(self, workdir: pathlib.Path) -> None:
    self.workdir = str(workdir)
    self.health = step_health.StepHealth()
    self.batches: list[int] = []

  def train(
    self,
    *,
    steps: int = 4,
    rate: float = 0.1,
    validate: Callable[[], None] = lambda: None,
  ) -> int:
    """Trains; calls `validate` at the start of each validation pass."""
    state = build(one(), SPECK)
    uploader = DiskUploader(self.workdir, is_chief=True, keep_last=9)
    cluster = Cluster(workers=("localhost:1",), index=0, origin="a test")
    detector = FailureDetector(cluster, facts={}, timeouts=Timeouts(1.0, 1.0, 1.0))

    def training(first_batch: int):
      self.batches.append(first_batch)
      return iter(dataset(1))

    def validation():
      validate()
      return iter(dataset(1))

    return Trainer(
      state=state,
      strategy=one(),
      phases=(schedules.Phase("full", 0, steps, 0, rate, rate, tf.ones_like),),
      settings=train_step.settings_of(resolve(SPECK)),
      inputs=Inputs(
        training=training,
        validation=validation,
        validation_batches=2,
        bad_records=BadRecordLimit(99, records_per_epoch=100, global_batch=BATCH),
        name_records=lambda batch, replicas: f"those of batch {batch}",
      ),
      cadence=CADENCE,
      checkpoint_manager=CheckpointManager(
        state.checkpoint(),
        one(),
        uploader=uploader,
        facts={"data_fingerprint": "d"},
      ),
      monitor=step_health.HealthMonitor(self.health, detector, 1),
      uploader=uploader,
    ).run()

  def saved(self) -> list[int]:
    return [found.step for found in checkpoints.list_checkpoints(self.workdir)]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
  return Run(tmp_path)


def no_marker(*_) -> None:
  """Fails as writing a marker to a full disk does."""
  raise OSError(28, "No space left on device")


@pytest.mark.parametrize("steps", [4, 8])
def test_a_step_is_saved_though_its_validation_fails(run: Run, steps: int):
  fail_at_step_4 = mock.Mock(side_effect=[None, errors.DataError("a bad record")])
  with pytest.raises(errors.DataError):
    run.train(steps=steps, validate=fail_at_step_4)
  assert run.saved() == [0, 4]


def test_a_run_asked_to_stop_while_it_validates_saves_once_and_stops(run: Run):
  says = r"^asked to stop: step 2 is saved in "
  with pytest.raises(errors.PreemptedError, match=says):
    run.train(validate=run.health.request_stop)
  assert run.saved() == [0, 2]


def test_a_run_asked_to_stop_says_where_it_could_not_save(
  run: Run, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(checkpoints, "write_marker", no_marker)
  says = r"^asked to stop, but step 2 could not be saved in "
  with pytest.raises(errors.PreemptedError, match=says):
    run.train(validate=run.health.request_stop)


def test_a_run_killed_in_its_last_validation_validates_when_it_is_started_again(
  run: Run,
):
  validate = mock.Mock()
  assert run.train(validate=validate) == 4
  assert validate.call_count == 2
  assert run.train(validate=validate) == 4
  assert validate.call_count == 2  # done.json says that all is done
  checkpoints.unmark_done(run.workdir)  # as if killed before it was written
  assert run.train(validate=validate) == 4
  assert validate.call_count == 3


def test_a_run_rewinds_though_the_marker_cannot_be_changed_and_at_last_gives_up(
  run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
  run.train()
  monkeypatch.setattr(checkpoints, "write_marker", no_marker)
  says = (
    r"^step 5: the loss or gradient is not finite on replica 0 \(worker 0\); its "
    r"records are those of batch 7\. That was after 1 rewinds and --max_rewinds=1; "
  )
  with pytest.raises(errors.DivergedError, match=says):
    run.train(steps=8, rate=1e38)
  assert "step-00000004.json stays as it is ([Errno 28] No space" in caplog.text
  assert run.batches == [0, 4, 6]  # batch 5 is the first that is not finite


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
  run: Run, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(checkpoints, "write_marker", no_marker)
  with pytest.raises(errors.DivergedError, match="There is no checkpoint to go back"):
    run.train(rate=1e38)
