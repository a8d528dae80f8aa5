"""The outer loop: runs the inner loop up to the next thing to do, then does it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors, strategies
from facedist.training import checkpoints, logs, metrics, phases, steps
from facedist.training.damage_limit import DamageLimit
from facedist.training.outbox import Outbox
from facedist.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Cadence:
  """When the outer loop does what; named as the flags it comes from."""

  log_every_steps: int
  validate_every_steps: int
  checkpoint_every_steps: int
  stop_after_steps: int


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Where batches come from, already distributed over the strategy's replicas.

  Attributes:
    training: First step -> iterator over batches from that step on, without end.
    validation: -> iterator over a validation pass; none where there is no split.
    validation_batches: Batches of a validation pass.
    damage_limit: How many damaged records training may replace.
  """

  training: Callable[[int], Iterator]
  validation: Callable[[], Iterator] | None
  validation_batches: int
  damage_limit: DamageLimit


class Trainer:
  """Trains from the newest checkpoint, or from step 0, to the end of the last phase."""

  def __init__(
    self,
    *,
    state: TrainState,
    strategy: tf.distribute.Strategy,
    phases: tuple[phases.Phase, ...],
    settings: steps.StepSettings,
    inputs: Inputs,
    cadence: Cadence,
    workdir: str,
    outbox: Outbox,
    is_chief: bool,
    facts: Mapping[str, Any],
  ) -> None:
    self._state = state
    self._strategy = strategy
    self._phases = phases
    self._settings = settings
    self._inputs = inputs
    self._cadence = cadence
    self._workdir = workdir
    self._outbox = outbox
    self._is_chief = is_chief
    self._facts = facts
    self._checkpoint = state.checkpoint()
    self._total_steps = phases[-1].end_step
    self._end = min(self._total_steps, cadence.stop_after_steps or self._total_steps)
    self._log = logs.TrainLog(
      outbox.folder, total_steps=self._total_steps, is_chief=is_chief
    )
    self._validation_loop = steps.validation_loop(state, settings, strategy)

  def run(self) -> int:
    """Trains to the end and returns the number of finished steps.

    Raises:
      errors.DataError: A checkpoint is damaged or from other data.
      errors.DivergedError: A loss is not finite.
    """
    step = self._resume()
    if step < self._end:
      self._train_from(step)
    self._log.close()
    is_saved = self._outbox.finish()
    if is_saved and self._end == self._total_steps and self._is_chief:
      checkpoints.mark_done(self._workdir, step=self._total_steps)
    return self._end

  def validate(self, step: int) -> None:
    """Runs and reports a validation pass, if the data have the split."""
    if self._inputs.validation is None:
      return
    totals = self._validation_loop(
      self._inputs.validation(), tf.constant(self._inputs.validation_batches)
    )
    self._log.validation(step=step, summary=metrics.summarise(totals.numpy()))

  def _train_from(self, step: int) -> None:
    """Runs the phases from `step` on."""
    iterator = self._inputs.training(step)
    for phase in self._phases:
      if step >= phase.end_step or step >= self._end:
        continue
      logging.info(
        "phase %s: steps %d to %d, %d trained variables",
        phase.name,
        phase.first_step,
        phase.end_step,
        len(steps.trained_variables(self._state, phase)),
      )
      loop = steps.train_loop(self._state, phase, self._settings, self._strategy)
      while step < min(phase.end_step, self._end):
        stop = self._next_stop(step, phase)
        self._run_steps(loop, iterator, phase, step, stop)
        step = stop
        self._after(step)

  def _run_steps(
    self, loop: Callable, iterator: Iterator, phase: phases.Phase, step: int, stop: int
  ) -> None:
    """Runs the inner loop from `step` to `stop` and reports it."""
    started = time.perf_counter()
    rows = loop(iterator, tf.constant(stop - step)).numpy()
    seconds = time.perf_counter() - started
    self._check_finite(rows, first_step=step)
    self._inputs.damage_limit.add(rows, first_step=step)
    self._log.interval(step=stop, phase=phase.name, rows=rows, seconds=seconds)

  def _next_stop(self, step: int, phase: phases.Phase) -> int:
    """Returns the first step after `step` at which the outer loop has work."""
    cadence = self._cadence
    intervals = (
      cadence.log_every_steps,
      cadence.checkpoint_every_steps,
      cadence.validate_every_steps,
    )
    multiples = [step - step % every + every for every in intervals if every]
    return min(*multiples, phase.end_step, self._end)

  def _after(self, step: int) -> None:
    """Validates and saves, where `step` is a time for it."""
    is_end = step == self._end
    every = self._cadence.validate_every_steps
    if is_end or (every and step % every == 0):
      self.validate(step)
    if is_end or step % self._cadence.checkpoint_every_steps == 0:
      self._save(step)

  def _save(self, step: int) -> None:
    """Saves on all workers; the chief hands it over, and prunes."""
    checkpoints.save(
      self._checkpoint,
      self._outbox.folder,
      step=step,
      is_chief=self._is_chief,
      facts=self._facts,
    )
    if self._is_chief:
      logging.info("step %d saved", step)
      self._outbox.publish(step)

  def _resume(self) -> int:
    """Restores the newest checkpoint, or saves step 0; returns the step to go on at.

    All restore what the chief found: one may arrive while the workers look.
    """
    found = [each.step for each in checkpoints.list_checkpoints(self._workdir)]
    step = strategies.from_chief(
      self._strategy, max(found, default=-1), is_chief=self._is_chief
    )
    if step < 0:
      self._save(0)
      return 0
    newest = checkpoints.at(self._workdir, step)
    fingerprint = newest.marker().get("data_fingerprint")
    if fingerprint != self._facts["data_fingerprint"]:
      raise errors.DataError(
        f"{newest.path} was trained on data {fingerprint}, not on these "
        f"({self._facts['data_fingerprint']}); give the same --data_dir or a new "
        "--workdir."
      )
    checkpoints.restore(self._checkpoint, newest, is_whole=True)
    if self._is_chief:
      checkpoints.remove_unfinished(self._workdir)
      if newest.step < self._total_steps:
        checkpoints.unmark_done(self._workdir)
    logging.info("resumed %s", newest.name)
    return newest.step

  def _check_finite(self, rows: np.ndarray, *, first_step: int) -> None:
    """Stops on the first loss that is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows[:, metrics.SUMS.index("loss")]))
    if len(bad):
      raise errors.DivergedError(
        f"the loss of step {first_step + bad[0]} is not finite; the last good "
        "checkpoint stands. Lower --full_rate or --head_rate, lengthen the warm-up, "
        "or set --clip_norm."
      )
