"""The backlog of a fake training run that saves and deletes checkpoints."""

import pytest

from facedist.evaluation import evaluator


class FakeRun:
  """A folder of checkpoints; each sleep runs the next entry of a script."""

  def __init__(self, script: list[list[int]], *, keep_last: int = 100):
    self.steps: set[int] = set()
    self.held: list[set[int]] = []
    self.done = False
    self._script = list(script)
    self._keep_last = keep_last

  def list_steps(self) -> list[int]:
    return sorted(self.steps, reverse=True)

  def hold(self, steps) -> None:
    self.held.append(set(steps))

  def is_done(self) -> bool:
    return self.done

  def train(self, seconds: float = 0.0) -> None:
    """Saves the next checkpoints and deletes old ones that are not held."""
    if not self._script:
      self.done = True
      return
    self.steps.update(self._script.pop(0))
    held = self.held[-1] if self.held else set()
    self.steps.difference_update(set(sorted(self.steps)[: -self._keep_last]) - held)


def _backlog(run: FakeRun, **settings) -> evaluator.Backlog:
  settings = {"scored": (), "renew_seconds": 3600.0} | settings
  return evaluator.Backlog(list_steps=run.list_steps, hold=run.hold, **settings)


def _score_all(run: FakeRun, backlog: evaluator.Backlog, **settings) -> list[int]:
  scored = []
  settings = {
    "is_done": run.is_done,
    "poll_seconds": 1.0,
    "sleep": run.train,
  } | settings
  for step in evaluator.steps_to_score(backlog, **settings):
    scored.append(step)
    backlog.mark_scored(step)
  return scored


def test_every_checkpoint_is_scored_once_in_step_order():
  run = FakeRun([[], [200, 100], [], [300], [400, 600, 500], []])
  assert _score_all(run, _backlog(run)) == [100, 200, 300, 400, 500, 600]


def test_a_restart_continues_after_what_is_scored():
  run = FakeRun([[100, 200, 300]])
  assert _score_all(run, _backlog(run, scored={100, 200})) == [300]


def test_a_checkpoint_saved_just_before_done_is_scored():
  run = FakeRun([])

  def is_done() -> bool:
    if not run.done:  # saved between this answer and the next look
      run.steps.add(100)
      run.done = True
      return False
    return True

  assert _score_all(run, _backlog(run), is_done=is_done) == [100]


def test_checkpoints_are_held_until_they_are_scored():
  run = FakeRun([[1, 2, 3, 4, 5]], keep_last=1)
  backlog = _backlog(run)
  run.train()
  run.steps = {1, 2, 3, 4, 5}
  with backlog:
    assert backlog.refresh() == [1, 2, 3, 4, 5]
    assert run.held[-1] == {1, 2, 3, 4, 5}
    backlog.mark_scored(1)
    assert backlog.refresh() == [2, 3, 4, 5]
    assert run.held[-1] == {2, 3, 4, 5}
  assert run.held[-1] == set()


def test_a_slow_evaluator_loses_no_checkpoint_that_training_would_delete():
  run = FakeRun([[step] for step in range(1, 9)], keep_last=1)
  backlog = _backlog(run)
  run.train()
  scored = []
  for step in evaluator.steps_to_score(
    backlog, is_done=run.is_done, poll_seconds=1.0, sleep=run.train
  ):
    run.train()  # training saves a checkpoint while one is being scored...
    backlog.refresh()  # ...which the thread finds before the one after it
    scored.append(step)
    backlog.mark_scored(step)
  assert scored == list(range(1, 9))


def test_a_checkpoint_deleted_before_it_was_held_is_left_out():
  run = FakeRun([])
  run.steps = {1, 2}
  backlog = evaluator.Backlog(
    list_steps=run.list_steps, hold=lambda steps: run.steps.discard(1), scored=()
  )
  assert backlog.refresh() == [2]


def test_the_thread_renews_the_lease_and_finds_new_checkpoints():
  run = FakeRun([])
  run.steps = {1}
  seen = evaluator.threading.Event()

  def hold(steps) -> None:
    run.hold(steps)
    if len(run.held) == 1:
      raise OSError("the disk is away")
    if set(steps) == {1, 2}:
      seen.set()
    run.steps.add(2)

  with evaluator.Backlog(
    list_steps=run.list_steps, hold=hold, scored=(), renew_seconds=0.01
  ):
    assert seen.wait(10)


def test_an_error_keeps_the_lease_for_the_restart():
  run = FakeRun([])
  run.steps = {1}
  backlog = _backlog(run)

  def fail_while_scoring() -> None:
    with backlog:
      backlog.refresh()
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail_while_scoring()
  assert run.held[-1] == {1}


def test_waiting_ends_after_the_idle_time():
  run = FakeRun([[1], [], [2], [], [], [], [3]])
  with pytest.raises(TimeoutError):
    _score_all(run, _backlog(run), idle_timeout_seconds=2.0)
  assert run.steps == {1, 2}
