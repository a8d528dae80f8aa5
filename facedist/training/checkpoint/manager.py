"""Saves a run's state and finds it again, on all workers alike.

A run's workdir: claimed by one config, which a second start must not contradict.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import config, errors, storage
from facedist.data.shards import manifest
from facedist.distributed import strategies
from facedist.models.heads import class_weights
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.checkpoints import Checkpoint
from facedist.training.checkpoint.sharded import RowStore
from facedist.training.checkpoint.uploader import Uploader
from facedist.training.config import TrainConfig

CONFIG_NAME = "config.json"


def claim_workdir(settings: TrainConfig, workdir: str, *, is_chief: bool) -> None:
  """Writes workdir/config.json, or checks that it says the same.

  Raises:
    errors.ConfigError: A run with another config is there.
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
  """Compares a run's flags with those that its workdir was claimed with.

  Returns:
    Whether there is a run in the workdir.

  Raises:
    errors.ConfigError: One with another config; the text names the differing fields.
  """
  if not storage.exists(storage.join(workdir, CONFIG_NAME)):
    return False
  if differing := config.conflicts(checkpoints.load_config(workdir), settings):
    raise errors.ConfigError(
      f"--workdir={workdir} holds a run with another config ({'; '.join(differing)}); "
      "give the same flags or a new --workdir."
    )
  return True


def check_data(checkpoint: checkpoints.Checkpoint, data_fingerprint: str) -> None:
  """Raises DataError if the checkpoint was trained on other data."""
  saved = checkpoint.marker().get("data_fingerprint")
  if saved != data_fingerprint:
    raise errors.DataError(
      f"{checkpoint.path} was trained on data {saved}, not on these "
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


_LATE_SECONDS = 60.0  # a client of NFS may hold an old listing for as long
_LOOK_SECONDS = 1.0
_NOT_WRITTEN = (OSError, errors.FacedistError, tf.errors.OpError)


class CheckpointManager:
  """A run's checkpoints, as its workers write and read them."""

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
    """Touches nothing yet.

    Args:
      state: What is saved.
      strategy: Of the variables in it.
      uploader: Where the chief writes, and what brings that to the workdir.
      facts: Written to every marker.
      rows: The class-sharded head's, which are saved beside the state; none if the
        head is in it.
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
    """Saves on all workers; one that cannot write says so and training goes on.

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
    except errors.SavingError as error:  # on all workers alike
      self._give_up(step, error)
    except _NOT_WRITTEN as error:
      if self.is_chief:
        self._give_up(step, error)
      else:
        logging.warning("this worker's throw-away copy of step %d: %s", step, error)

  def annotate(self, checkpoint: Checkpoint, **facts: Any) -> None:
    """Has the chief add facts to a marker; where it cannot, training goes on."""
    if not self.is_chief:
      return
    try:
      checkpoints.annotate(checkpoint, facts)
    except _NOT_WRITTEN as error:
      logging.warning(
        "%s.json stays as it is (%s); started again before the next checkpoint, the "
        "run comes to the same batches again.",
        checkpoint.path,
        _line(error),
      )

  def settle(self) -> None:
    """Waits, on all workers, until no checkpoint is on its way to the workdir."""
    self._uploader.settle()
    strategies.barrier(self._strategy)

  def is_done(self) -> bool:
    """Says on all workers whether the run is marked as done."""
    is_done = self.is_chief and checkpoints.is_done(self.workdir)
    return bool(
      strategies.from_chief(self._strategy, int(is_done), is_chief=self.is_chief)
    )

  def finish(self, step: int, *, is_done: bool) -> bool:
    """Waits for all that is on its way; says on all workers whether `step` is there.

    Args:
      step: That the run ends at.
      is_done: Whether to mark the run as done, if that step is there.
    """
    name = checkpoints.at(self.workdir, step).name
    is_there = self._uploader.finish() and name not in self._uploader.missing
    if is_there and is_done and self.is_chief:
      try:
        checkpoints.mark_done(self.workdir, step=step)
      except _NOT_WRITTEN as error:
        logging.error("done.json could not be written (%s)", _line(error))
        self._uploader.miss("done.json")
    return bool(
      strategies.from_chief(self._strategy, int(is_there), is_chief=self.is_chief)
    )

  def restore(self, *, at_most: int | None = None) -> Checkpoint | None:
    """Restores the newest whole checkpoint, the same on all workers.

    The chief reads the files and decides; a damaged checkpoint is named and the one
    before is used.

    Args:
      at_most: Newest step that will do; none means any.

    Returns:
      The checkpoint; none if there is not one.

    Raises:
      errors.DataError: Every checkpoint is damaged, or it is of other data or of
        another network.
    """
    found = {
      checkpoint.step: checkpoint
      for checkpoint in checkpoints.list_checkpoints(self.workdir)
      if at_most is None or checkpoint.step <= at_most
    }
    step = self._choose(found)
    while self._rows is not None and step != _NONE:
      damage = self._rows.restore(found[step])
      if damage is None:
        break
      logging.error("%s; trying the checkpoint before", damage)
      step = self._choose(found, below=step)
    if step == _NONE:
      return None
    checkpoints.restore(self._state, found[step], is_whole=True)
    return found[step]

  def _choose(self, found: dict[int, Checkpoint], *, below: int | None = None) -> int:
    """Returns the chief's choice of a step on all workers; _NONE if there is nothing.

    Args:
      found: What this worker sees, by step; the choice is added where it is late.
      below: Steps from this one on are known to be damaged.

    Raises:
      errors.DataError: All are damaged, or the chosen is not here or of other data.
    """
    chosen = self._newest_whole(found, below) if self.is_chief else 0
    # Nothing found is -1 and all damaged is -2, so that all workers end alike.
    step = strategies.from_chief(self._strategy, chosen, is_chief=self.is_chief)
    if step == _NONE:
      return step
    if step == _ALL_DAMAGED:
      raise errors.DataError(
        f"every checkpoint of {checkpoints.folder(self.workdir)} is damaged; move the "
        "folder away to start anew."
      )
    if step not in found and not self._appears(step):
      raise errors.DataError(
        f"the chief goes on from step {step}, which is not in "
        f"{checkpoints.folder(self.workdir)} here; give all workers the same folder."
      )
    found[step] = checkpoints.at(self.workdir, step)
    check_data(found[step], self._facts["data_fingerprint"])
    return step

  def _appears(self, step: int) -> bool:
    """Says whether a checkpoint that the chief sees is seen here within a while."""
    deadline = time.monotonic() + _LATE_SECONDS
    while time.monotonic() < deadline:
      if step in {one.step for one in checkpoints.list_checkpoints(self.workdir)}:
        return True
      time.sleep(_LOOK_SECONDS)
    return False

  def _newest_whole(self, found: Mapping[int, Checkpoint], below: int | None) -> int:
    """Returns the newest step whose files are what they were; names the others."""
    for step in sorted(found, reverse=True):
      if below is not None and step >= below:
        continue
      damage = checkpoints.find_corruption(found[step])
      if damage is None:
        return step
      logging.error("%s; trying the checkpoint before", damage)
    return _ALL_DAMAGED if found else _NONE

  def _give_up(self, step: int, error: Exception) -> None:
    """Says that a step is not saved; the chief makes room for the next."""
    checkpoint = checkpoints.at(self._uploader.folder, step)
    self._uploader.miss(checkpoint.name)
    logging.error(
      "step %d could not be saved (%s); training goes on, and the checkpoint before "
      "stands. Make room or mend %s.",
      step,
      _line(error),
      self._uploader.folder,
    )
    with contextlib.suppress(OSError):
      if self.is_chief and not storage.exists(checkpoint.path + ".json"):
        checkpoints.remove(checkpoint)


def _line(error: Exception) -> str:
  """Returns the first line of what an error says."""
  return str(error).strip().partition("\n")[0]


_NONE, _ALL_DAMAGED = -1, -2
