"""Where a run stands: resumed, saved, or gone back to a checkpoint past bad batches."""

from absl import logging

from facedist import errors
from facedist.training import checkpoints
from facedist.training.damage_limit import DamageLimit
from facedist.training.saving import Saver
from facedist.training.watch import Watch


class Course:
  """Which batch a step trains on, and the checkpoints that remember it.

  Step k trains on batch k + offset; the offset is 0 until a rewind leaves batches out.
  Every marker holds it, and the damaged records counted so far, so a run that is
  resumed stays on its course.
  """

  def __init__(self, saver: Saver, watch: Watch, damage_limit: DamageLimit) -> None:
    self._saver = saver
    self._watch = watch
    self._damage_limit = damage_limit
    self._offset = 0
    self._rewinds = 0

  def batch_of(self, step: int) -> int:
    """Returns the number of the batch that `step` trains on."""
    return step + self._offset

  def save(self, step: int) -> None:
    """Saves on all workers."""
    self._watch.note("saving", step=step)
    self._saver.save(
      step,
      batch_offset=self._offset,
      rewinds=self._rewinds,
      damaged=self._damage_limit.marks(),
    )

  def is_done(self) -> bool:
    """Says on all workers whether the run is marked as done."""
    return self._saver.is_done()

  def finish(self, step: int, *, is_done: bool) -> bool:
    """Waits for all that is on its way; says on all workers whether `step` is saved.

    Args:
      step: That the run ends at.
      is_done: Whether these are all steps of the run.
    """
    self._watch.note("waiting for the last checkpoint", step=step)
    return self._saver.finish(step, is_done=is_done)

  def resume(self, *, total_steps: int) -> int:
    """Restores the newest whole checkpoint, or saves step 0.

    Args:
      total_steps: Of the run; one that has fewer is no longer done.

    Returns:
      The step to go on at.

    Raises:
      errors.DataError: Every checkpoint is damaged, or it is of other data.
    """
    self._watch.note("restoring", step=0)
    found = self._saver.restore()
    if found is None:
      self.save(0)
      return 0
    self._take_course_of(found)
    if self._saver.is_chief:
      checkpoints.remove_unfinished(self._saver.workdir)
      if found.step < total_steps:
        checkpoints.unmark_done(self._saver.workdir)
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
    self._watch.note("rewinding", step=past)
    self._saver.settle()
    found = self._saver.restore(at_most=past)
    if found is None:
      raise errors.DivergedError(f"{report}. There is no checkpoint to go back to.")
    self._offset = batch + 1 - found.step
    self._rewinds += 1
    self._damage_limit.go_on(found.marker().get("damaged", {}))
    self._saver.annotate(found, batch_offset=self._offset, rewinds=self._rewinds)
    logging.warning(
      "%s. Back to step %d and past batch %d (rewind %d of --max_rewinds=%d)",
      report,
      found.step,
      batch,
      self._rewinds,
      most,
    )
    return found.step

  def _take_course_of(self, found: checkpoints.Checkpoint) -> None:
    """Goes on with what a checkpoint says of the batches left out before it."""
    marker = found.marker()
    self._offset = marker.get("batch_offset", 0)
    self._rewinds = marker.get("rewinds", 0)
    self._damage_limit.go_on(marker.get("damaged", {}))
