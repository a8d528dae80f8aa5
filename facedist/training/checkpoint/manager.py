"""Manages a run's checkpoints: saves, restores and names them the same on all workers.

A workdir belongs to one config: `claim_workdir` writes config.json, and refuses a
start with other flags. `CheckpointManager` saves the state of a run and restores the
newest valid checkpoint.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging

from facedist import config, errors, storage
from facedist.data.shards import manifest
from facedist.distributed import collectives, strategies
from facedist.models.heads import class_weights
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.checkpoints import Checkpoint
from facedist.training.checkpoint.sharded import RowStore
from facedist.training.checkpoint.uploader import Uploader
from facedist.training.config import TrainConfig

CONFIG_NAME = "config.json"
_WRITE_ERRORS = (OSError, errors.FacedistError, tf.errors.OpError)


def claim_workdir(settings: TrainConfig, workdir: str, *, is_chief: bool) -> None:
  """Checks the flags against workdir/config.json; the chief writes it.

  Raises:
    errors.ConfigError: The workdir holds a run with another config.
    errors.UsageError: The folder cannot be made or written.
    errors.DataError: The bucket cannot be read or written.
  """
  path = storage.join(workdir, CONFIG_NAME)
  check_config(settings, workdir)
  if not is_chief:
    return
  storage.check_folder(workdir, flag="workdir")
  storage.write_bytes(path, config.to_json(settings).encode())


def check_config(settings: TrainConfig, workdir: str) -> bool:
  """Compares a run's flags with the config.json of its workdir.

  Returns:
    Whether there is a run in the workdir.

  Raises:
    errors.ConfigError: The run has another config; the message names the fields.
  """
  if not storage.exists(storage.join(workdir, CONFIG_NAME)):
    return False
  if differing := config.conflicts(checkpoints.load_config(workdir), settings):
    raise errors.ConfigError(
      f"--workdir={workdir} holds a run with another config ({'; '.join(differing)}); "
      "give the same flags or a new --workdir."
    )
  return True


def check_data(path: str, marker: Mapping[str, Any], data_fingerprint: str) -> None:
  """Raises DataError if a checkpoint was trained on other data.

  Args:
    path: The checkpoint's, for the message.
    marker: The content of its marker.
    data_fingerprint: Of the data of this run.
  """
  saved = marker.get("data_fingerprint")
  if saved != data_fingerprint:
    raise errors.DataError(
      f"{path} was trained on data {saved}, not on these "
      f"({data_fingerprint}); give the same --data_dir or a new --workdir."
    )


def data_facts(content: manifest.Manifest) -> dict[str, Any]:
  """Returns what a checkpoint's marker says of the data."""
  return {
    "image_size": content.image_size,
    "num_identities": content.num_identities,
    "data_fingerprint": content.fingerprint,
    "alignment": content.aligned_by,
  }


def fingerprint(settings: TrainConfig) -> str:
  """Returns eight hex digits that change with any field that may not change."""
  fixed = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
    if not field.metadata["may_change"]
  }
  text = json.dumps(fixed, sort_keys=True)
  return f"{storage.crc32c_of(text.encode()):08x}"


class Restored(NamedTuple):
  """The checkpoint that a run was restored from.

  Attributes:
    step: Number of finished steps.
    name: The checkpoint's name, such as step-00000100.
    marker: The content of its marker.
  """

  step: int
  name: str
  marker: dict[str, Any]


class _Choice(NamedTuple):
  """The chief's choice of a checkpoint, as numbers that a collective can carry.

  Attributes:
    is_any: Whether there is any checkpoint.
    is_valid: Whether the files of one are what was written.
    step: Of the newest one whose files are.
  """

  is_any: int = False
  is_valid: int = False
  step: int = 0


class CheckpointManager:
  """Saves and restores a run's state; all workers must make the same calls."""

  def __init__(
    self,
    state: tf.train.Checkpoint,
    strategy: tf.distribute.Strategy,
    *,
    uploader: Uploader,
    facts: Mapping[str, Any],
    rows: RowTable | None = None,
    piece_rows: int = class_weights.PIECE_ROWS,
  ) -> None:
    """Reads and writes nothing yet.

    Args:
      state: What is saved.
      strategy: Of the variables in `state`.
      uploader: Has the folder that the chief writes to, and copies it to the workdir.
      facts: Written to every marker.
      rows: The class-sharded head's rows, saved beside the state; None if the head is
        part of the state.
      piece_rows: Rows that are read or written at a time.
    """
    self._state = state
    self._strategy = strategy
    self.workdir = uploader.workdir
    self.is_chief = uploader.is_chief
    self._facts = dict(facts)
    self._uploader = uploader
    self._rows: RowStore | None = None
    if rows is not None:
      self._rows = RowStore(
        rows,
        strategy,
        workdir=uploader.workdir,
        is_chief=uploader.is_chief,
        piece_rows=piece_rows,
      )

  def save(self, step: int, **facts: Any) -> None:
    """Saves; if a worker cannot write, it logs the error and training continues.

    Args:
      step: Number of finished steps.
      facts: Written to this checkpoint's marker.
    """
    try:
      rows = {} if self._rows is None else self._rows.save(step)
      checkpoints.save(
        self._state,
        self._uploader.folder,
        step=step,
        is_chief=self.is_chief,
        facts=self._facts | facts | rows,
      )
      if self.is_chief:
        logging.info("step %d saved", step)
        self._uploader.publish(step)
    except strategies.PEER_ERRORS:  # of a collective, not of the disk
      raise
    except errors.SavingError as error:  # raised on all workers
      self._report_failed_save(step, error)
    except _WRITE_ERRORS as error:
      if self.is_chief:
        self._report_failed_save(step, error)
      else:
        logging.warning("this worker's temporary copy of step %d: %s", step, error)

  def annotate(self, restored: Restored, **facts: Any) -> None:
    """Has the chief add facts to a marker; if that fails, training continues."""
    if not self.is_chief:
      return
    path = checkpoints.at(self.workdir, restored.step).path
    try:
      checkpoints.write_marker(path, restored.marker | facts)
    except _WRITE_ERRORS as error:
      logging.warning(
        "%s.json stays as it is (%s); if the run restarts before the next "
        "checkpoint, it trains on the same batches again.",
        path,
        errors.first_line(error),
      )

  def drain(self) -> None:
    """Waits on all workers until no checkpoint is being uploaded."""
    self._uploader.drain()
    collectives.barrier(self._strategy)

  def is_done(self) -> bool:
    """Says, the same on all workers, whether the run is marked as done."""
    is_done = self.is_chief and checkpoints.is_done(self.workdir)
    return self._broadcast(is_done)

  def finish(self, step: int, *, is_done: bool) -> bool:
    """Waits for all uploads.

    Args:
      step: The last step of this process.
      is_done: Whether to mark the run as done, if that step is in the workdir.

    Returns:
      Whether that step is in the workdir, the same on all workers.
    """
    name = checkpoints.at(self.workdir, step).name
    is_saved = self._uploader.finish() and name not in self._uploader.missing
    if is_saved and is_done and self.is_chief:
      try:
        checkpoints.mark_done(self.workdir, step=step)
      except _WRITE_ERRORS as error:
        logging.error("done.json could not be written (%s)", errors.first_line(error))
        self._uploader.record_missing("done.json")
    return self._broadcast(is_saved)

  def _broadcast(self, is_so: bool) -> bool:
    """Returns the chief's `is_so` on all workers."""
    (answer,) = collectives.broadcast_from_chief(
      self._strategy, [is_so], is_chief=self.is_chief
    )
    return bool(answer)

  def restore(self, *, at_most: int | None = None) -> Restored | None:
    """Restores the newest valid checkpoint, the same on all workers.

    The chief verifies checkpoints, the newest first, and chooses; the name of a
    corrupt one is logged. Each worker downloads the files of a checkpoint in a bucket
    once: they are verified and restored from one local folder.

    Args:
      at_most: The newest step that may be restored; None for any.

    Returns:
      The restored checkpoint; None if there is none.

    Raises:
      errors.DataError: Every checkpoint is corrupt, or the newest valid one is of other
        data or of another network.
    """
    found = [
      checkpoint
      for checkpoint in checkpoints.list_checkpoints(self.workdir)
      if at_most is None or checkpoint.step <= at_most
    ]
    candidates = found
    while True:
      with self._stage_newest(candidates, is_any=bool(found)) as staged:
        if staged is None:
          return None
        step, name = staged.checkpoint.step, staged.checkpoint.name
        corruption = None if self._rows is None else self._rows.restore(staged)
        if corruption is None:
          staged.restore(self._state, is_whole=True)
          return Restored(step, name, staged.marker)
      logging.error("%s; trying the checkpoint before", corruption)
      candidates = [one for one in candidates if one.step < step]

  @contextlib.contextmanager
  def _stage_newest(
    self, candidates: Sequence[Checkpoint], *, is_any: bool
  ) -> Iterator[checkpoints.StagedCheckpoint | None]:
    """Yields the newest valid checkpoint, chosen by the chief, staged on each worker.

    Args:
      candidates: What may be chosen, by increasing step; only the chief's count.
      is_any: Whether there is any checkpoint, those known to be corrupt included.

    Raises:
      errors.DataError: All are corrupt, or the chosen one is not seen by this worker,
        or of other data.
    """
    with contextlib.ExitStack() as stack:
      choice, staged = _Choice(is_any=is_any), None
      for checkpoint in reversed(candidates) if self.is_chief else ():
        try:
          staged = stack.enter_context(checkpoints.stage(checkpoint))
        except errors.DataError as error:
          logging.error("%s; trying the checkpoint before", error)
          continue
        choice = _Choice(is_any=True, is_valid=True, step=checkpoint.step)
        break
      choice = _Choice(
        *collectives.broadcast_from_chief(
          self._strategy, choice, is_chief=self.is_chief
        )
      )
      if not choice.is_any:
        yield None
        return
      if not choice.is_valid:
        raise errors.DataError(
          f"every checkpoint of {checkpoints.folder(self.workdir)} is corrupt; move "
          "the folder away to start a new run."
        )
      if staged is None:  # this is not the chief
        chosen = wait_for_checkpoint(self.workdir, choice.step)
        staged = stack.enter_context(checkpoints.stage(chosen))
      check_data(staged.checkpoint.path, staged.marker, self._facts["data_fingerprint"])
      yield staged

  def _report_failed_save(self, step: int, error: Exception) -> None:
    """Logs that a step is not saved; the chief deletes what was written of it."""
    checkpoint = checkpoints.at(self._uploader.folder, step)
    self._uploader.record_missing(checkpoint.name)
    logging.error(
      "step %d could not be saved (%s); training continues, and the checkpoint before "
      "stays. Make room in %s or repair it.",
      step,
      errors.first_line(error),
      self._uploader.folder,
    )
    with contextlib.suppress(OSError):
      if self.is_chief and not storage.exists(checkpoint.path + ".json"):
        checkpoints.remove(checkpoint)


def wait_for_checkpoint(
  workdir: str,
  step: int,
  *,
  timeout_seconds: float = 60.0,
  sleep: Callable[[float], object] = time.sleep,
) -> Checkpoint:
  """Returns the checkpoint that the chief chose, once this worker sees it.

  Args:
    workdir: The run's folder.
    step: Of the checkpoint.
    timeout_seconds: How long to look for it; an NFS client may show an old listing for
      a minute.
    sleep: Waits that many seconds.

  Raises:
    errors.DataError: It was not seen within `timeout_seconds`.
  """
  wanted = checkpoints.at(workdir, step)
  waited = 0.0
  while wanted not in checkpoints.list_checkpoints(workdir):
    if waited >= timeout_seconds:
      raise errors.DataError(
        f"the chief continues from step {step}, which is not in "
        f"{checkpoints.folder(workdir)} here; give all workers the same folder."
      )
    sleep(1.0)
    waited += 1.0
  return wanted
