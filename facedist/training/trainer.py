"""The outer loop: runs the inner loop up to the next thing to do, then does it.

Where a run stands: resumed, saved, or gone back to a checkpoint past bad batches.

A validation pass over all records of a split, inside one graph.

The first lines of a log: what this run is.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import __version__, errors
from facedist.models.heads.base import HeadInput
from facedist.training import config as train_config
from facedist.training import (
  metric_writer,
  metrics,
  replica_consistency,
  schedules,
  step_health,
  train_step,
)
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.manager import CheckpointManager
from facedist.training.checkpoint.uploader import Uploader
from facedist.training.config import TrainConfig
from facedist.training.inputs import DamageLimit, Inputs
from facedist.training.step_health import HealthMonitor, StepHealth
from facedist.training.train_state import TrainState
from facedist.training.train_step import Batch, StepSettings


class Course:
  """Which batch a step trains on, and the checkpoints that remember it.

  Step k trains on batch k + offset; the offset is 0 until a rewind leaves batches out.
  Every marker holds it, and the damaged records counted so far, so a run that is
  resumed stays on its course.
  """

  def __init__(
    self,
    checkpoint_manager: CheckpointManager,
    monitor: HealthMonitor,
    damage_limit: DamageLimit,
  ) -> None:
    self._checkpoint_manager = checkpoint_manager
    self._monitor = monitor
    self._damage_limit = damage_limit
    self._offset = 0
    self._rewinds = 0

  def batch_of(self, step: int) -> int:
    """Returns the number of the batch that `step` trains on."""
    return step + self._offset

  def save(self, step: int) -> None:
    """Saves on all workers."""
    self._monitor.note("saving", step=step)
    self._checkpoint_manager.save(
      step,
      batch_offset=self._offset,
      rewinds=self._rewinds,
      damaged=self._damage_limit.marks(),
    )

  def is_done(self) -> bool:
    """Says on all workers whether the run is marked as done."""
    return self._checkpoint_manager.is_done()

  def finish(self, step: int, *, is_done: bool) -> bool:
    """Waits for all that is on its way; says on all workers whether `step` is saved.

    Args:
      step: That the run ends at.
      is_done: Whether these are all steps of the run.
    """
    self._monitor.note("waiting for the last checkpoint", step=step)
    return self._checkpoint_manager.finish(step, is_done=is_done)

  def resume(self, *, total_steps: int) -> int:
    """Restores the newest whole checkpoint, or saves step 0.

    Args:
      total_steps: Of the run; one that has fewer is no longer done.

    Returns:
      The step to go on at.

    Raises:
      errors.DataError: Every checkpoint is damaged, or it is of other data.
    """
    self._monitor.note("restoring", step=0)
    found = self._checkpoint_manager.restore()
    if found is None:
      self.save(0)
      return 0
    self._take_course_of(found.marker)
    if self._checkpoint_manager.is_chief:
      checkpoints.remove_unfinished(self._checkpoint_manager.workdir)
      if found.step < total_steps:
        checkpoints.unmark_done(self._checkpoint_manager.workdir)
    logging.info("resumed %s", found.name)
    return found.step

  def rewind(self, *, past: int, most: int, report: str) -> int:
    """Restores the newest checkpoint up to step `past` and leaves its batch behind.

    Args:
      past: The step that went wrong.
      most: Rewinds that a run may have.
      report: What went wrong.

    Returns:
      The step to go on at.

    Raises:
      errors.DivergedError: There have been as many rewinds, or there is no checkpoint.
    """
    if self._rewinds >= most:
      raise errors.DivergedError(
        f"{report}. That was after {self._rewinds} rewinds and --max_rewinds={most}; "
        "lower --full_rate or --head_rate, lengthen the warm-up, or set --clip_norm."
      )
    batch = self.batch_of(past)
    self._monitor.note("rewinding", step=past)
    self._checkpoint_manager.settle()
    found = self._checkpoint_manager.restore(at_most=past)
    if found is None:
      raise errors.DivergedError(f"{report}. There is no checkpoint to go back to.")
    self._offset = batch + 1 - found.step
    self._rewinds += 1
    self._damage_limit.go_on(found.marker.get("damaged", {}))
    self._checkpoint_manager.annotate(
      found, batch_offset=self._offset, rewinds=self._rewinds
    )
    logging.warning(
      "%s. Back to step %d and past batch %d (rewind %d of --max_rewinds=%d)",
      report,
      found.step,
      batch,
      self._rewinds,
      most,
    )
    return found.step

  def _take_course_of(self, marker: Mapping[str, Any]) -> None:
    """Goes on with what a marker says of the batches left out before it."""
    self._offset = marker.get("batch_offset", 0)
    self._rewinds = marker.get("rewinds", 0)
    self._damage_limit.go_on(marker.get("damaged", {}))


def validation_loop(
  state: TrainState,
  strategy: tf.distribute.Strategy,
  health: StepHealth,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles a validation pass.

  Returns:
    A function of (distributed iterator, int32[] batches) that returns
    float32[len(metrics.SUMS)] over all records, padding left out, and bool[], whether
    it got to the end: it stops short when a worker is asked to stop.
  """

  @tf.autograph.experimental.do_not_convert
  def replica_sums(batch: Batch) -> tf.Tensor:
    embeddings = state.network.embed(batch["image"])
    output = state.head.forward(HeadInput(embeddings, batch["label"]))
    with tf.control_dependencies([output.losses]):
      health.arrivals.assign_add(1)
    sums = metrics.sums(output, weights=batch["weight"], damaged=batch["damaged"])
    return tf.concat([sums, [health.stop.read_value()]], axis=0)

  @tf.function
  def loop(iterator: Any, num_batches: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    totals = tf.zeros(len(metrics.SUMS) + 1)
    done = tf.constant(0)
    while done < num_batches and totals[-1] == 0.0:
      sums = strategy.run(replica_sums, args=(next(iterator),))
      totals += strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
      done += 1
    return totals[:-1], tf.equal(done, num_batches)

  return loop


def log_run_header(
  settings: TrainConfig,
  strategy: tf.distribute.Strategy,
  facts: dict[str, Any],
  plan: tuple[schedules.Phase, ...],
  *,
  num_records: int,
) -> None:
  """Logs what this run is: versions, config, batch split, data and phases.

  Raises:
    errors.UsageError: A replica's batch does not divide into micro-batches.
  """
  replicas = strategy.num_replicas_in_sync
  logging.info(
    "facedist %s, TensorFlow %s, Python %s",
    __version__,
    tf.__version__,
    platform.python_version(),
  )
  fields = dataclasses.asdict(settings).items()
  logging.info("config: %s", " ".join(f"{name}={value}" for name, value in fields))
  at_once = train_step.micro_batch(settings, replicas)
  micros = settings.accumulate_steps
  logging.info(
    "batch: %d = %d replicas x %s%d; seed %d",
    settings.global_batch,
    replicas,
    f"{micros} micro-batches x " if micros > 1 else "",
    at_once,
    settings.seed,
  )
  logging.info(
    "data: %d images of %d identities, %d px, fingerprint %s",
    num_records,
    facts["num_identities"],
    facts["image_size"],
    facts["data_fingerprint"],
  )
  _introduce_updates(settings, plan)


def _introduce_updates(
  settings: TrainConfig, plan: tuple[schedules.Phase, ...]
) -> None:
  """Logs the optimizer, and the steps and rates of each phase."""
  logging.info("optimizer: %s", _optimizer(settings))
  for phase in plan:
    logging.info(
      "phase %s: steps %d to %d, peak rate %.4g, the backbone's %.4g",
      phase.name,
      phase.first_step,
      phase.end_step,
      phase.rate,
      phase.backbone_rate,
    )


def _optimizer(settings: TrainConfig) -> str:
  """Returns its name and numbers, and what the rates are multiplied with."""
  found = train_config.hyperparameters(settings)
  text = " ".join(f"{name}={value:g}" for name, value in found.items())
  scaled = ""
  if settings.rate_batch:
    factor = settings.global_batch / settings.rate_batch
    scaled = f"; both rates times {factor:g} for --rate_batch={settings.rate_batch}"
  return f"{settings.optimizer} {text}{scaled}"


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
    phases: tuple[schedules.Phase, ...],
    settings: StepSettings,
    inputs: Inputs,
    cadence: Cadence,
    course: Course,
    monitor: HealthMonitor,
    uploader: Uploader,
  ) -> None:
    self._state = state
    self._strategy = strategy
    self._phases = phases
    self._settings = settings
    self._inputs = inputs
    self._cadence = cadence
    self._course = course
    self._monitor = monitor
    self._uploader = uploader
    self._total_steps = phases[-1].end_step
    self._end = min(self._total_steps, cadence.stop_after_steps or self._total_steps)
    self._log = metric_writer.MetricWriter(
      uploader.folder, total_steps=self._total_steps, is_chief=uploader.is_chief
    )
    self._validation_loop = validation_loop(state, strategy, monitor.health)
    self._hashes = replica_consistency.hash_loop(state.mirrored_variables, strategy)

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
      self._uploader.miss("some of the logs")
    is_saved = self._course.finish(step, is_done=step == self._total_steps)
    if step < self._end:
      raise errors.PreemptedError(_last_words(step, self._uploader.workdir, is_saved))
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
    self, iterator: Iterator, phase: schedules.Phase, step: int, stop: int
  ) -> tuple[int, step_health.HealthProblem]:
    """Runs the inner loop from `step` towards `stop` and reports what was good of it.

    Returns:
      Number of steps done, and what their health say.
    """
    self._monitor.note(f"training, phase {phase.name}", step=step)
    started = time.perf_counter()
    outcome = self._loop(phase)(iterator, tf.constant(stop - step))
    rows, flags = (part.numpy() for part in outcome)
    seconds = time.perf_counter() - started
    finding = step_health.find_problem(flags, self._are_finite(rows))
    good = len(rows) if finding.bad_step is None else finding.bad_step
    self._inputs.damage_limit.add(rows[:good], first_step=step)
    if good:
      self._log.interval(
        step=step + good, phase=phase.name, rows=rows[:good], seconds=seconds
      )
    return len(rows), finding

  @functools.cache  # noqa: B019 - a trainer lives as long as its process
  def _loop(self, phase: schedules.Phase) -> Callable:
    """Returns the phase's inner loop, compiled when it is first called."""
    logging.info(
      "phase %s: steps %d to %d, %d trained variables",
      phase.name,
      phase.first_step,
      phase.end_step,
      len(train_step.trained_variables(self._state, phase)),
    )
    return train_step.train_loop(
      self._state, phase, self._settings, self._strategy, self._monitor.health
    )

  def _are_finite(self, rows: np.ndarray) -> np.ndarray:
    """Says, as bool[steps], whether sums are finite, but for what scaling mends."""
    column = dict(zip(train_step.COLUMNS, rows.T, strict=True))
    mended = (column["loss_scale"] > 1) & self._state.loss_scale.is_dynamic
    return np.isfinite(column["loss"]) & (np.isfinite(column["gradient_norm"]) | mended)

  def _next_stop(self, step: int, phase: schedules.Phase) -> int:
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
    self._monitor.note("validating", step=step)
    batches = tf.constant(self._inputs.validation_batches)
    totals, is_whole = self._validation_loop(self._inputs.validation(), batches)
    if is_whole:
      self._log.validation(step=step, summary=metrics.summarise(totals.numpy()))
    return bool(is_whole)

  def _compare_replicas(self, step: int) -> None:
    """Raises DifferentError if the weights of the replicas are not the same."""
    self._monitor.note("comparing the replicas' weights", step=step)
    if different := replica_consistency.outliers(self._hashes().numpy()):
      raise errors.DifferentError(
        f"at step {step} the weights of {self._monitor.name_replicas(different)} are "
        "not those of the others; its memory or its restore is at fault. All workers "
        "started again go on from the newest checkpoint."
      )

  def _go_back(self, step: int, replicas: tuple[int, ...]) -> int:
    """Returns the step to go on at after one that was not finite; or stops."""
    culprits = self._monitor.name_replicas(replicas) or "no replica alone (their sum)"
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
