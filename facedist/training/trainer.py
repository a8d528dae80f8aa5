"""The outer loop: runs the inner loop up to the next thing to do, then does it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors
from facedist.training import (
  agreement,
  logs,
  metrics,
  micro_batches,
  phases,
  steps,
  validation,
  vitals,
)
from facedist.training.course import Course
from facedist.training.inputs import Inputs
from facedist.training.outbox import Outbox
from facedist.training.state import TrainState
from facedist.training.step_settings import StepSettings
from facedist.training.watch import Watch


@dataclasses.dataclass(frozen=True)
class Cadence:
  """When the outer loop does what; named as the flags it comes from."""

  log_every_steps: int
  validate_every_steps: int
  checkpoint_every_steps: int
  divergence_check_steps: int
  stop_after_steps: int
  on_nan: str
  max_rewinds: int


class Trainer:
  """Trains from the newest checkpoint, or from step 0, to the end of the last phase."""

  def __init__(
    self,
    *,
    state: TrainState,
    strategy: tf.distribute.Strategy,
    phases: tuple[phases.Phase, ...],
    settings: StepSettings,
    inputs: Inputs,
    cadence: Cadence,
    course: Course,
    watch: Watch,
    outbox: Outbox,
  ) -> None:
    self._state = state
    self._strategy = strategy
    self._phases = phases
    self._settings = settings
    self._inputs = inputs
    self._cadence = cadence
    self._course = course
    self._watch = watch
    self._outbox = outbox
    self._total_steps = phases[-1].end_step
    self._end = min(self._total_steps, cadence.stop_after_steps or self._total_steps)
    self._log = logs.TrainLog(
      outbox.folder, total_steps=self._total_steps, is_chief=outbox.is_chief
    )
    self._validation_loop = validation.validation_loop(state, strategy, watch.vitals)
    self._hashes = agreement.hash_loop(state.mirrored_variables, strategy)

  def run(self) -> int:
    """Trains to the end and returns the number of finished steps.

    Raises:
      errors.DataError: Every checkpoint is damaged, or from other data.
      errors.DivergedError: A loss or gradient is not finite.
      errors.DifferentError: The replicas' weights are not the same.
      errors.PreemptedError: A worker was asked to stop, and the step is saved.
    """
    step = self._course.resume(total_steps=self._total_steps)
    try:
      if step < self._end:
        step = self._train_from(step)
      elif not self._course.is_done():  # ended while it validated
        self.validate(step)
    finally:
      self._log.close()
    if self._log.is_incomplete:
      self._outbox.miss("some of the logs")
    is_saved = self._course.finish(step, is_done=step == self._total_steps)
    if step < self._end:
      raise errors.PreemptedError(_last_words(step, self._outbox.workdir, is_saved))
    return step

  def _train_from(self, step: int) -> int:
    """Trains from `step` to the end, in stretches between which there is work.

    Returns:
      The number of finished steps; less than the end if asked to stop.
    """
    iterator = self._inputs.training(self._course.batch_of(step))
    is_asked_to_stop = False
    while step < self._end and not is_asked_to_stop:
      phase = next(phase for phase in self._phases if step < phase.end_step)
      stop = self._next_stop(step, phase)
      done, finding = self._run_steps(iterator, phase, step, stop)
      if finding.bad_step is not None:
        step = self._go_back(step + finding.bad_step, finding.bad_replicas)
        iterator = self._inputs.training(self._course.batch_of(step))
        continue
      step += done
      is_asked_to_stop = self._after(step, is_asked_to_stop=finding.stop)
    return step

  def _run_steps(
    self, iterator: Iterator, phase: phases.Phase, step: int, stop: int
  ) -> tuple[int, vitals.Finding]:
    """Runs the inner loop from `step` towards `stop` and reports what was good of it.

    Returns:
      Number of steps done, and what their vitals say.
    """
    self._watch.note(f"training, phase {phase.name}", step=step)
    started = time.perf_counter()
    outcome = self._loop(phase)(iterator, tf.constant(stop - step))
    rows, signs = (part.numpy() for part in outcome)
    seconds = time.perf_counter() - started
    finding = vitals.find(signs, self._are_finite(rows))
    good = len(rows) if finding.bad_step is None else finding.bad_step
    self._inputs.damage_limit.add(rows[:good], first_step=step)
    if good:
      self._log.interval(
        step=step + good, phase=phase.name, rows=rows[:good], seconds=seconds
      )
    return len(rows), finding

  @functools.cache  # noqa: B019 - a trainer lives as long as its process
  def _loop(self, phase: phases.Phase) -> Callable:
    """Returns the phase's inner loop, compiled when it is first called."""
    logging.info(
      "phase %s: steps %d to %d, %d trained variables",
      phase.name,
      phase.first_step,
      phase.end_step,
      len(micro_batches.trained_variables(self._state, phase)),
    )
    return steps.train_loop(
      self._state, phase, self._settings, self._strategy, self._watch.vitals
    )

  def _are_finite(self, rows: np.ndarray) -> np.ndarray:
    """Says, as bool[steps], whether sums are finite, but for what scaling mends."""
    column = dict(zip(steps.COLUMNS, rows.T, strict=True))
    mended = (column["loss_scale"] > 1) & self._state.loss_scale.is_dynamic
    return np.isfinite(column["loss"]) & (np.isfinite(column["gradient_norm"]) | mended)

  def _next_stop(self, step: int, phase: phases.Phase) -> int:
    """Returns the first step after `step` at which the outer loop has work."""
    cadence = self._cadence
    intervals = (
      cadence.log_every_steps,
      cadence.checkpoint_every_steps,
      cadence.validate_every_steps,
      cadence.divergence_check_steps,
    )
    multiples = [step - step % every + every for every in intervals if every]
    return min(*multiples, phase.end_step, self._end)

  def _after(self, step: int, *, is_asked_to_stop: bool) -> bool:
    """Compares weights, saves and validates, where `step` is a time for it.

    Saves first: a validation that fails must not cost what was learnt.

    Returns:
      Whether to stop, as asked before or while validating.
    """

    def is_due(every: int) -> bool:
      return bool(every) and step % every == 0

    is_end = step == self._end
    if is_due(self._cadence.divergence_check_steps):
      self._compare_replicas(step)
    is_saved = (
      is_asked_to_stop or is_end or is_due(self._cadence.checkpoint_every_steps)
    )
    if is_saved:
      self._course.save(step)
    if not is_asked_to_stop and (is_end or is_due(self._cadence.validate_every_steps)):
      is_asked_to_stop = not self.validate(step)
    if is_asked_to_stop and not is_saved:
      self._course.save(step)
    return is_asked_to_stop

  def validate(self, step: int) -> bool:
    """Runs and reports a validation pass; False if a request to stop cut it short."""
    if self._inputs.validation is None:
      return True
    self._watch.note("validating", step=step)
    batches = tf.constant(self._inputs.validation_batches)
    totals, is_whole = self._validation_loop(self._inputs.validation(), batches)
    if is_whole:
      self._log.validation(step=step, summary=metrics.summarise(totals.numpy()))
    return bool(is_whole)

  def _compare_replicas(self, step: int) -> None:
    """Raises DifferentError if the weights of the replicas are not the same."""
    self._watch.note("comparing the replicas' weights", step=step)
    if different := agreement.outliers(self._hashes().numpy()):
      raise errors.DifferentError(
        f"at step {step} the weights of {self._watch.name_replicas(different)} are not "
        "those of the others; its memory or its restore is at fault. All workers "
        "started again go on from the newest checkpoint."
      )

  def _go_back(self, step: int, replicas: tuple[int, ...]) -> int:
    """Returns the step to go on at after one that was not finite; or stops."""
    culprits = self._watch.name_replicas(replicas) or "no replica alone (their sum)"
    records = self._inputs.name_records(self._course.batch_of(step), replicas)
    report = (
      f"step {step}: the loss or gradient is not finite on {culprits}; its records are "
      f"{records}"
    )
    if self._cadence.on_nan == "stop":
      raise errors.DivergedError(
        f"{report}. The newest checkpoint stands: lower --full_rate or --head_rate, "
        "lengthen the warm-up, set --clip_norm, or say --on_nan=rewind."
      )
    return self._course.rewind(past=step, most=self._cadence.max_rewinds, report=report)


def _last_words(step: int, workdir: str, is_saved: bool) -> str:
  """Returns what a run says that was asked to stop."""
  if is_saved:
    return (
      f"asked to stop: step {step} is saved in {workdir}; started again, training goes "
      "on from there."
    )
  return (
    f"asked to stop, but step {step} could not be saved in {workdir}, the chief's log "
    "says why; started again, training goes on from the newest checkpoint there."
  )
