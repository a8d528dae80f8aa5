"""The training loop on the host: trains in intervals, and saves and validates between.

`Trainer` runs the compiled loop of train_step.py up to the next step at which there is
something to log, save, validate or compare. It resumes from the newest checkpoint, and
goes back to the one before a loss that is not finite. `log_run_header` writes the first
lines of a run's log.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterator
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
from facedist.training.inputs import Inputs
from facedist.training.step_health import HealthMonitor, StepHealth
from facedist.training.train_state import TrainState
from facedist.training.train_step import Batch, StepSettings


@dataclasses.dataclass(frozen=True)
class Cadence:
  """How often the trainer logs, saves, validates; the fields are named as the flags."""

  log_every_steps: int
  validate_every_steps: int
  checkpoint_every_steps: int
  divergence_check_steps: int
  stop_after_steps: int
  on_nan: str
  max_rewinds: int


class Trainer:
  """Trains from the newest checkpoint, or from step 0, to the end of the last phase.

  Step k trains on batch k + offset. The offset is 0 until a rewind skips batches; each
  checkpoint's marker holds it, so that a resumed run reads the same batches.
  """

  def __init__(
    self,
    *,
    state: TrainState,
    strategy: tf.distribute.Strategy,
    phases: tuple[schedules.Phase, ...],
    settings: StepSettings,
    inputs: Inputs,
    cadence: Cadence,
    checkpoint_manager: CheckpointManager,
    monitor: HealthMonitor,
    uploader: Uploader,
  ) -> None:
    self._state = state
    self._strategy = strategy
    self._phases = phases
    self._settings = settings
    self._inputs = inputs
    self._cadence = cadence
    self._checkpoint_manager = checkpoint_manager
    self._monitor = monitor
    self._uploader = uploader
    self._batch_offset = 0
    self._rewinds = 0
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
      errors.DataError: Every checkpoint is corrupt, or one is of other data.
      errors.DivergedError: A loss or gradient is not finite.
      errors.DifferentError: The replicas' weights are not the same.
      errors.PreemptedError: A worker was asked to stop, and the step is saved.
    """
    step = self._resume()
    try:
      if step < self._end:
        step = self._train_from(step)
      elif not self._checkpoint_manager.is_done():  # it ended while it validated
        self._validate(step)
      else:
        logging.info("this run is complete: step %d was its last", step)
    finally:
      self._log.close()
    if self._log.is_incomplete:
      self._uploader.record_missing("some of the logs")
    self._monitor.note("waiting for the last checkpoint", step=step)
    is_saved = self._checkpoint_manager.finish(step, is_done=step == self._total_steps)
    if step < self._end:
      raise errors.PreemptedError(
        _stop_message(step, self._uploader.workdir, is_saved=is_saved)
      )
    return step

  def _resume(self) -> int:
    """Restores the newest valid checkpoint, or saves step 0; returns the step."""
    self._monitor.note("restoring", step=0)
    found = self._checkpoint_manager.restore()
    if found is None:
      self._save(0)
      return 0
    marker = found.marker
    self._batch_offset = marker.get("batch_offset", 0)
    self._rewinds = marker.get("rewinds", 0)
    self._inputs.bad_records.restore(marker.get("damaged", {}))
    if self._checkpoint_manager.is_chief:
      checkpoints.remove_unfinished(self._checkpoint_manager.workdir)
      if found.step < self._total_steps:  # a config with more epochs than before
        checkpoints.unmark_done(self._checkpoint_manager.workdir)
    logging.info("resumed %s", found.name)
    return found.step

  def _train_from(self, step: int) -> int:
    """Trains from `step` to the end, one interval after the other.

    Returns:
      The number of finished steps; less than the end if a worker was asked to stop.
    """
    iterator = self._inputs.training(self._batch_of(step))
    is_asked_to_stop = False
    while step < self._end and not is_asked_to_stop:
      phase = next(phase for phase in self._phases if step < phase.end_step)
      done, problem = self._run_interval(
        iterator, phase, step, self._interval_end(step, phase)
      )
      if problem.bad_step is not None:
        step = self._rewind(step + problem.bad_step, problem.bad_replicas)
        iterator = self._inputs.training(self._batch_of(step))
        continue
      step += done
      is_asked_to_stop = self._end_interval(step, is_asked_to_stop=problem.stop)
    return step

  def _batch_of(self, step: int) -> int:
    """Returns the number of the batch that `step` trains on."""
    return step + self._batch_offset

  def _interval_end(self, step: int, phase: schedules.Phase) -> int:
    """Returns the first step after `step` at which there is work on the host."""
    cadence = self._cadence
    intervals = (
      cadence.log_every_steps,
      cadence.checkpoint_every_steps,
      cadence.validate_every_steps,
      cadence.divergence_check_steps,
    )
    multiples = [step - step % every + every for every in intervals if every]
    return min(*multiples, phase.end_step, self._end)

  def _run_interval(
    self, iterator: Iterator, phase: schedules.Phase, step: int, end: int
  ) -> tuple[int, step_health.HealthProblem]:
    """Runs the compiled loop from `step` to at most `end` and logs the finite steps.

    Returns:
      Number of steps done, and what was wrong with them.
    """
    self._monitor.note(f"training, phase {phase.name}", step=step)
    started = time.perf_counter()
    outcome = self._loop(phase)(iterator, tf.constant(end - step))
    rows, flags = (part.numpy() for part in outcome)
    seconds = time.perf_counter() - started
    problem = step_health.find_problem(flags, self._are_finite(rows))
    good = len(rows) if problem.bad_step is None else problem.bad_step
    self._inputs.bad_records.add(rows[:good], first_step=step)
    if good:
      self._log.interval(
        step=step + good, phase=phase.name, rows=rows[:good], seconds=seconds
      )
    return len(rows), problem

  @functools.cache  # noqa: B019 - a trainer lives as long as its process
  def _loop(self, phase: schedules.Phase) -> Callable:
    """Returns the phase's training loop, compiled when it is first called."""
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
    """Returns bool[steps]: are the sums finite, or does loss scaling handle them."""
    column = dict(zip(metrics.COLUMNS, rows.T, strict=True))
    is_skipped = (column["loss_scale"] > 1) & self._state.loss_scale.is_dynamic
    return np.isfinite(column["loss"]) & (
      np.isfinite(column["gradient_norm"]) | is_skipped
    )

  def _end_interval(self, step: int, *, is_asked_to_stop: bool) -> bool:
    """Compares weights, saves and validates where it is time for it.

    It saves before it validates, so that a failing validation costs no training.

    Returns:
      Whether a worker was asked to stop, before or during the validation.
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
      self._save(step)
    if not is_asked_to_stop and (is_end or is_due(self._cadence.validate_every_steps)):
      is_asked_to_stop = not self._validate(step)
    if is_asked_to_stop and not is_saved:
      self._save(step)
    return is_asked_to_stop

  def _save(self, step: int) -> None:
    """Saves a checkpoint on all workers."""
    self._monitor.note("saving", step=step)
    self._checkpoint_manager.save(
      step,
      batch_offset=self._batch_offset,
      rewinds=self._rewinds,
      damaged=self._inputs.bad_records.state(),
    )

  def _validate(self, step: int) -> bool:
    """Runs and logs a validation pass; False if a request to stop cut it short."""
    if self._inputs.validation is None:
      return True
    self._monitor.note("validating", step=step)
    batches = tf.constant(self._inputs.validation_batches)
    totals, is_complete = self._validation_loop(self._inputs.validation(), batches)
    if is_complete:
      self._log.validation(step=step, summary=metrics.summarise(totals.numpy()))
    return bool(is_complete)

  def _compare_replicas(self, step: int) -> None:
    """Raises DifferentError if the weights of the replicas are not the same."""
    self._monitor.note("comparing the replicas' weights", step=step)
    if different := replica_consistency.outliers(self._hashes().numpy()):
      raise errors.DifferentError(
        f"at step {step} the weights of {self._monitor.name_replicas(different)} are "
        "not those of the others; its memory or its restore is at fault. Start all "
        "workers again to continue from the newest checkpoint."
      )

  def _rewind(self, bad_step: int, replicas: tuple[int, ...]) -> int:
    """Restores the newest checkpoint up to a bad step and skips that step's batch.

    Args:
      bad_step: The step with a loss or gradient that is not finite.
      replicas: Those it came from; empty if it was only their sum.

    Returns:
      The step to continue at.

    Raises:
      errors.DivergedError: --on_nan=stop, --max_rewinds is reached, or there is no
        checkpoint.
    """
    names = self._monitor.name_replicas(replicas) or "no replica alone (their sum)"
    batch = self._batch_of(bad_step)
    report = (
      f"step {bad_step}: the loss or gradient is not finite on {names}; its records "
      f"are {self._inputs.name_records(batch, replicas)}"
    )
    if self._cadence.on_nan == "stop":
      raise errors.DivergedError(
        f"{report}. The newest checkpoint stays valid: lower --full_rate or "
        "--head_rate, lengthen the warm-up, set --clip_norm, or say --on_nan=rewind."
      )
    if self._rewinds >= self._cadence.max_rewinds:
      raise errors.DivergedError(
        f"{report}. That was after {self._rewinds} rewinds and "
        f"--max_rewinds={self._cadence.max_rewinds}; lower --full_rate or --head_rate, "
        "lengthen the warm-up, or set --clip_norm."
      )
    self._monitor.note("rewinding", step=bad_step)
    self._checkpoint_manager.drain()
    found = self._checkpoint_manager.restore(at_most=bad_step)
    if found is None:
      raise errors.DivergedError(f"{report}. There is no checkpoint to go back to.")
    self._batch_offset = batch + 1 - found.step
    self._rewinds += 1
    self._inputs.bad_records.restore(found.marker.get("damaged", {}))
    self._checkpoint_manager.annotate(
      found, batch_offset=self._batch_offset, rewinds=self._rewinds
    )
    logging.warning(
      "%s. Back to step %d and past batch %d (rewind %d of --max_rewinds=%d)",
      report,
      found.step,
      batch,
      self._rewinds,
      self._cadence.max_rewinds,
    )
    return found.step


def _stop_message(step: int, workdir: str, *, is_saved: bool) -> str:
  """Returns what a run that was asked to stop says at its end."""
  if is_saved:
    return (
      f"asked to stop: step {step} is saved in {workdir}; start the run again to "
      "continue from there."
    )
  return (
    f"asked to stop, but step {step} could not be saved in {workdir}, see the chief's "
    "log; start the run again to continue from the newest checkpoint there."
  )


def validation_loop(
  state: TrainState,
  strategy: tf.distribute.Strategy,
  health: StepHealth,
) -> Callable[[Any, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
  """Compiles a validation pass.

  Returns:
    A function of (distributed iterator, int32[] batches) that returns
    float32[len(metrics.SUMS)] over all records without the padding, and bool[]: is the
    pass complete. It is not where a worker was asked to stop.
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
  _log_updates(settings, plan)


def _log_updates(settings: TrainConfig, plan: tuple[schedules.Phase, ...]) -> None:
  """Logs the optimizer, and the steps and learning rates of each phase."""
  logging.info("optimizer: %s", _optimizer(settings))
  for phase in plan:
    logging.info(
      "phase %s: steps %d to %d, peak rate %.4g, the backbone's %.4g",
      phase.name,
      phase.first_step,
      phase.end_step,
      phase.learning_rate,
      phase.backbone_learning_rate,
    )


def _optimizer(settings: TrainConfig) -> str:
  """Returns its name and hyperparameters, and the factor of the learning rates."""
  found = train_config.hyperparameters(settings)
  text = " ".join(f"{name}={value:g}" for name, value in found.items())
  scaled = ""
  if settings.rate_batch:
    factor = settings.global_batch / settings.rate_batch
    scaled = f"; both rates times {factor:g} for --rate_batch={settings.rate_batch}"
  return f"{settings.optimizer} {text}{scaled}"
