"""How many damaged records a run may replace: a count that all workers share."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from facedist import errors
from facedist.training import steps

_DAMAGED = steps.COLUMNS.index("damaged")


@dataclasses.dataclass
class DamageLimit:
  """Counts the damaged records of an epoch and ends the run past a limit.

  The counts come out of the all-reduce that sums the metrics, so all workers see the
  same ones and end at the same step. Each checkpoint's marker holds the count, so that
  a run that is resumed, or goes back, counts on as if nothing had been.

  Attributes:
    most: Damaged records that an epoch may have; --max_bad_records.
    records_an_epoch: Records of the training split.
    global_batch: Samples of a step.
  """

  most: int
  records_an_epoch: int
  global_batch: int
  _epoch: int = dataclasses.field(default=0, init=False)
  _count: int = dataclasses.field(default=0, init=False)

  def marks(self) -> dict[str, int]:
    """Returns what a marker holds: an epoch, and its damaged records so far."""
    return {"epoch": self._epoch, "records": self._count}

  def go_on(self, marks: Mapping[str, int]) -> None:
    """Counts on from what a marker holds; from none where it holds nothing."""
    self._epoch, self._count = marks.get("epoch", 0), marks.get("records", 0)

  def add(self, rows: np.ndarray, *, first_step: int) -> None:
    """Counts the damaged records of some steps.

    A step that holds the end of an epoch counts to the epoch that it begins in.

    Args:
      rows: float32[steps, len(steps.COLUMNS)].
      first_step: Number of the first of these steps.

    Raises:
      errors.DataError: An epoch has more damaged records than it may have.
    """
    for place in np.flatnonzero(rows[:, _DAMAGED]):
      step = first_step + int(place)
      epoch = step * self.global_batch // self.records_an_epoch
      if epoch != self._epoch:
        self._epoch, self._count = epoch, 0
      self._count += round(float(rows[place, _DAMAGED]))
      if self._count > self.most:
        raise errors.DataError(
          f"{self._count} damaged records by step {step} of epoch {epoch} are more "
          f"than --max_bad_records={self.most}; the log of each worker names those it "
          "read. Rebuild their shards, or raise the limit."
        )
