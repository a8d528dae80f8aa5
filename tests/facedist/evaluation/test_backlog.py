"""The backlog of a fake training run that saves and deletes checkpoints."""

import threading

import pytest

from facedist.evaluation import claims, evaluator


class FakeRun:
  """A folder of checkpoints; each sleep runs the next entry of a script."""

  def __init__(
    self, *script: list[int], steps: tuple[int, ...] = (), keep_last: int = 100
  ):
    self.steps = set(steps)
    self.held: list[set[int]] = []
    self.scored: set[int] = set()  # the scores' file
    self.records: list[tuple[int, str]] = []  # of steps without a score
    self.done = False
    self._script = list(script)
    self._keep_last = keep_last

  def hold(self, steps) -> None:
    self.held.append(set(steps))

  def train(self, seconds: float = 0.0) -> None:
    """Saves the next checkpoints and deletes old ones that are not held."""
    if not self._script:
      self.done = True
      return
    self.steps.update(self._script.pop(0))
    held = self.held[-1] if self.held else set()
    self.steps.difference_update(set(sorted(self.steps)[: -self._keep_last]) - held)


@pytest.fixture
def make(tmp_path):
  """Returns a function that makes a backlog of a run, as a process of its own would."""

  def make_backlog(run: FakeRun, *, hold=None, **settings) -> evaluator.Backlog:
    return evaluator.Backlog(
      list_steps=lambda: run.steps,
      hold=hold or run.hold,
      claims=claims.Claims(str(tmp_path), "plan"),
      finished=lambda: run.scored,
      record=lambda step, reason: run.records.append((step, reason)),
      **settings,
    )

  return make_backlog


def _score_all(run: FakeRun, backlog: evaluator.Backlog, **settings) -> list[int]:
  """Scores each step as soon as it is yielded; returns them."""
  settings = {"is_done": lambda: run.done, "sleep": run.train} | settings
  scored = []
  for step in evaluator.steps_to_score(backlog, poll_seconds=1.0, **settings):
    scored.append(step)
    run.scored.add(step)
    backlog.mark_scored(step)
  return scored


def test_every_checkpoint_is_scored_once_in_step_order(make):
  run = FakeRun([], [200, 100], [], [300], [400, 600, 500], [])
  assert _score_all(run, make(run)) == [100, 200, 300, 400, 500, 600]


def test_a_scored_checkpoint_leaves_the_lease(make):
  run = FakeRun(steps=(1, 2, 3))
  with make(run) as backlog:
    backlog.refresh()
    backlog.mark_scored(1)
    assert backlog.refresh() == [2, 3]
    assert run.held[-1] == {2, 3}
  assert run.held[-1] == set()


def test_a_checkpoint_saved_just_before_done_is_scored(make):
  run = FakeRun()

  def is_done() -> bool:
    if not run.done:  # saved between this answer and the next look
      run.steps.add(100)
      run.done = True
      return False
    return True

  assert _score_all(run, make(run), is_done=is_done) == [100]


def test_a_slow_evaluator_loses_no_checkpoint_that_training_would_delete(make):
  run = FakeRun(*([step] for step in range(1, 9)), keep_last=1)
  backlog = make(run)
  run.train()
  scored = []
  for step in evaluator.steps_to_score(
    backlog, is_done=lambda: run.done, poll_seconds=1.0, sleep=run.train
  ):
    run.train()  # training saves a checkpoint while one is being scored...
    backlog.refresh()  # ...which the thread finds before the one after it
    scored.append(step)
    backlog.mark_scored(step)
  assert scored == list(range(1, 9))


def test_a_checkpoint_deleted_before_it_was_held_is_left_out(make):
  run = FakeRun(steps=(1, 2))
  backlog = make(run, hold=lambda steps: run.steps.discard(1))
  assert backlog.refresh() == [2]


def test_the_thread_renews_the_lease_and_finds_new_checkpoints(make):
  run = FakeRun(steps=(1,))
  seen = threading.Event()

  def hold(steps) -> None:
    run.hold(steps)
    if len(run.held) == 1:
      raise OSError("the disk is away")
    if set(steps) == {1, 2}:
      seen.set()
    run.steps.add(2)

  with make(run, hold=hold, renew_seconds=0.01):
    assert seen.wait(10)


def test_an_error_keeps_the_lease_for_the_restart(make):
  run = FakeRun(steps=(1,))
  backlog = make(run)

  def fail_while_scoring() -> None:
    with backlog:
      backlog.refresh()
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail_while_scoring()
  assert run.held[-1] == {1}


def test_waiting_ends_after_the_idle_time(make):
  run = FakeRun([1], [], [2], [], [], [], [3])
  with pytest.raises(TimeoutError):
    _score_all(run, make(run), idle_timeout_seconds=2.0)
  assert run.steps == {1, 2}


def test_latest_scores_the_newest_and_records_the_others_as_skipped(make):
  run = FakeRun([100, 200, 300], [400], [], [500, 600])
  assert _score_all(run, make(run), policy="latest") == [300, 400, 600]
  assert run.records == [(100, "skipped"), (200, "skipped"), (500, "skipped")]


def test_a_checkpoint_that_is_gone_in_two_looks_is_recorded_as_missed(make):
  run = FakeRun(steps=(1, 2, 3))
  backlog = make(run)
  backlog.refresh()
  run.steps = {3}
  assert backlog.refresh() == [3]
  assert (run.records, backlog.is_certain) == ([], False)
  run.steps = {2, 3}  # pruning had removed its marker for a moment
  assert backlog.refresh() == [2, 3]
  assert (run.records, backlog.is_certain) == ([(1, "missed")], True)
  run.steps = {1, 2, 3}  # saved again after a rewind
  assert backlog.refresh() == [1, 2, 3]


def test_what_was_deleted_while_no_evaluator_ran_is_missed_unless_it_was_scored(make):
  run = FakeRun()
  run.steps, run.scored, run.done = {3}, {1}, True
  assert _score_all(run, make(run, waiting={1, 2, 3})) == [3]
  assert run.records == [(2, "missed")]


def test_two_evaluators_divide_the_checkpoints(make):
  run = FakeRun()
  run.steps, run.done = {1, 2, 3}, True
  first, second = make(run), make(run)
  assert first.claim(first.refresh()) == 1
  assert second.claim(second.refresh()) == 2
  assert first.claim(first.refresh()) == 3  # while 1 is still being scored
  assert second.claim(second.refresh()) is None
  run.scored.add(1)
  first.mark_scored(1)
  run.scored.add(2)
  second.mark_scored(2)
  assert second.claim(second.refresh()) is None
  first.release(3)  # it was deleted while it was loaded, and is there again
  assert _score_all(run, second) == [3]
  assert _score_all(run, first) == []


def test_latest_skips_no_checkpoint_that_another_evaluator_is_scoring(make):
  run = FakeRun(steps=(1, 2))
  first, second = make(run), make(run)
  assert first.claim(first.refresh(), policy="latest") == 2
  run.steps |= {3, 4}
  assert second.claim(second.refresh(), policy="latest") == 4
  assert run.records == [(1, "skipped"), (1, "skipped"), (3, "skipped")]


def test_the_lease_stays_while_another_evaluator_shares_it(make):
  run = FakeRun(steps=(1, 2))
  first, second = make(run), make(run)
  with first:
    assert second.claim(second.refresh()) == 1
  assert run.held[-1] == {1, 2}
  with second:
    pass
  assert run.held[-1] == set()


def test_steps_that_are_still_being_scored_are_finished_before_waiting(make):
  run = FakeRun([1, 2], [3])
  run.train()
  backlog, pending = make(run), []

  def finish() -> bool:
    was_any = bool(pending)
    while pending:
      run.scored.add(pending[0])
      backlog.mark_scored(pending.pop(0))
    return was_any

  yielded = []
  for step in evaluator.steps_to_score(
    backlog, is_done=lambda: run.done, poll_seconds=1.0, finish=finish, sleep=run.train
  ):
    yielded.append((step, list(pending)))
    pending.append(step)
  assert yielded == [(1, []), (2, [1]), (3, [])]
  assert run.scored == {1, 2, 3}
