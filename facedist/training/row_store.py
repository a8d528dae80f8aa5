"""The rows of a run's checkpoints, which all workers save and restore together.

Every worker brings its own rows to the workdir, or reads those it needs; then all tell
each other how it went, so that the chief writes no marker of what is not whole and no
worker goes on from what another found damaged.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from facedist import errors, storage, strategies
from facedist.models.row_table import RowTable
from facedist.training import checkpoints, row_files
from facedist.training.checkpoints import Checkpoint

_FACTS = "rows"
"""What a marker calls them; its `files` are TensorFlow's, all that a reader of the
network alone needs."""

_WRITING_FAILED = (OSError, errors.FacedistError, tf.errors.OpError)


class RowStore:
  """A run's table of rows and where it is saved."""

  def __init__(
    self,
    table: RowTable,
    strategy: tf.distribute.Strategy,
    *,
    workdir: str,
    is_chief: bool,
    piece_rows: int,
  ) -> None:
    """Touches nothing yet.

    Args:
      table: This process's part of it.
      strategy: Of all workers that share it.
      workdir: The run's folder, local or gs://.
      is_chief: Whether this worker writes the markers.
      piece_rows: Rows that are read or written at a time.
    """
    self._table = table
    self._strategy = strategy
    self._workdir = workdir
    self._is_chief = is_chief
    self._piece_rows = piece_rows

  def save(self, step: int) -> dict[str, Any]:
    """Writes every worker's rows; every worker must call it.

    Returns:
      What the marker has to say of them.

    Raises:
      errors.SavingError: On all workers, if one of them could not.
    """
    checkpoint = checkpoints.at(self._workdir, step)
    planned = row_files.plan(self._table, checkpoint.name, piece_rows=self._piece_rows)

    def unmark() -> list[int]:
      if self._is_chief:
        storage.remove(checkpoint.path + ".json")
      return []

    def write() -> list[int]:
      return [
        row_files.write(self._table, file, checkpoints.folder(self._workdir))
        if row_files.is_here(self._table, file)
        else 0
        for file in planned
      ]

    # a step saved anew: nobody may take the new rows for those that the marker means
    self._together(unmark, 0)
    checksums = self._together(write, len(planned)).sum(axis=0)
    return {_FACTS: row_files.describe(self._table, planned, checksums)}

  def restore(self, checkpoint: Checkpoint) -> str | None:
    """Reads the rows that this worker holds; every worker must call it.

    Returns:
      What is damaged on this or another worker; none if nothing is.

    Raises:
      errors.DataError: The rows are of another head.
    """
    content: dict[str, Any] = checkpoint.marker().get(_FACTS, {})
    row_files.check_fits(self._table, content, checkpoint.path)
    folder = checkpoints.folder(self._workdir)

    def read() -> list[int]:
      row_files.read(self._table, content, folder, piece_rows=self._piece_rows)
      return []

    try:
      self._together(read, 0, catches=(errors.DataError,))
    except errors.SavingError as error:
      return str(error)
    return None

  def _together(
    self,
    action: Callable[[], list[int]],
    num_values: int,
    *,
    catches: tuple[type[Exception], ...] = _WRITING_FAILED,
  ) -> np.ndarray:
    """Runs this worker's part and waits for that of all others.

    Args:
      action: Returns `num_values` numbers.
      num_values: The same on every worker.
      catches: What the others are told of; all else ends this worker.

    Returns:
      int64[workers, num_values], the numbers of all.

    Raises:
      errors.SavingError: On all workers, if the action failed on one of them.
    """
    reason, values = None, [0] * num_values
    try:
      values = action()
    except catches as error:
      reason = str(error).strip().partition("\n")[0]
    told = strategies.from_workers(self._strategy, [reason is not None, *values])
    if reason is not None:
      raise errors.SavingError(reason)
    if told[:, 0].any():
      culprits = ", ".join(f"worker {one}" for one in np.flatnonzero(told[:, 0]))
      raise errors.SavingError(f"the rows of {culprits}: see its log")
    return told[:, 1:]


def find_damage(checkpoint: Checkpoint) -> str | None:
  """Reads all rows; returns what is wrong with the first file that is damaged."""
  content = checkpoint.marker().get(_FACTS)
  if content is None:
    return None
  return row_files.find_damage(content, os.path.dirname(checkpoint.path))
