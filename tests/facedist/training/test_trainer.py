"""The outer loop's order of things, with nothing of a run around it."""

import types

import pytest

from facedist import errors
from facedist.training.trainer import Cadence, Trainer

CADENCE = Cadence(
  log_every_steps=2,
  validate_every_steps=2,
  checkpoint_every_steps=4,
  divergence_check_steps=0,
  stop_after_steps=0,
  on_nan="stop",
  max_rewinds=3,
)


def trainer(*, validate, saved: list[int] | None = None, **course) -> Trainer:
  """A trainer of eight steps without network or data."""
  made = Trainer.__new__(Trainer)
  save = [] if saved is None else saved
  made._course = types.SimpleNamespace(save=save.append, **course)
  made._cadence = CADENCE
  made._end = made._total_steps = 8
  made.validate = validate
  made._log = types.SimpleNamespace(close=lambda: None, is_incomplete=False)
  made._uploader = types.SimpleNamespace(workdir="/run")
  return made


@pytest.mark.parametrize("step", [4, 8])
def test_a_step_is_saved_though_its_validation_fails(step: int):
  def fails(step: int) -> bool:
    raise errors.DataError("a record is damaged")

  saved: list[int] = []
  with pytest.raises(errors.DataError):
    trainer(validate=fails, saved=saved)._after(step, is_asked_to_stop=False)
  assert saved == [step]


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_asked_to_stop_while_it_validates_saves_once_and_stops(step: int):
  saved: list[int] = []
  made = trainer(validate=lambda step: False, saved=saved)
  assert made._after(step, is_asked_to_stop=False)
  assert saved == [step]


@pytest.mark.parametrize(
  ("is_saved", "says"),
  [
    (True, r"^asked to stop: step 3 is saved in /run; "),
    (False, r"^asked to stop, but step 3 could not be saved in /run, "),
  ],
)
def test_a_run_asked_to_stop_says_what_is_saved_once_all_has_arrived(
  is_saved: bool, says: str
):
  ended = []

  def finish(step: int, *, is_done: bool) -> bool:
    ended.append((step, is_done))
    return is_saved

  made = trainer(validate=None, resume=lambda *, total_steps: 0, finish=finish)
  made._train_from = lambda step: 3
  with pytest.raises(errors.PreemptedError, match=says):
    made.run()
  assert ended == [(3, False)]


@pytest.mark.parametrize("is_done", [True, False])
def test_a_run_killed_in_its_last_validation_validates_when_it_is_started_again(
  is_done: bool,
):
  validated = []
  made = trainer(
    validate=validated.append,
    resume=lambda *, total_steps: 8,
    is_done=lambda: is_done,
    finish=lambda step, *, is_done: True,
  )
  assert made.run() == 8
  assert validated == ([] if is_done else [8])
