"""Saves a run's state and finds it again, on all workers alike."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import errors, strategies
from facedist.training import checkpoints, restoring, run_folder
from facedist.training.checkpoints import Checkpoint
from facedist.training.outbox import Outbox


class Saver:
  """A run's checkpoints, as its workers write and read them."""

  def __init__(
    self,
    state: tf.train.Checkpoint,
    strategy: tf.distribute.Strategy,
    *,
    outbox: Outbox,
    facts: Mapping[str, Any],
  ) -> None:
    """Touches nothing yet.

    Args:
      state: What is saved.
      strategy: Of the variables in it.
      outbox: Where the chief writes, and what brings that to the workdir.
      facts: Written to every marker.
    """
    self._state = state
    self._strategy = strategy
    self.workdir = outbox.workdir
    self.is_chief = outbox.is_chief
    self._facts = dict(facts)
    self._outbox = outbox
    self.failed_steps: list[int] = []

  def save(self, step: int, **facts: Any) -> None:
    """Saves on all workers; one that cannot write says so and training goes on.

    Args:
      step: Number of finished steps.
      facts: Written to this checkpoint's marker.
    """
    try:
      checkpoints.save(
        self._state,
        self._outbox.folder,
        step=step,
        is_chief=self.is_chief,
        facts=self._facts | facts,
      )
      if self.is_chief:
        logging.info("step %d saved", step)
        self._outbox.publish(step)
    except strategies.PEER_ERRORS:  # of a collective, not of the disk
      raise
    except (OSError, errors.FacedistError, tf.errors.OpError) as error:
      if not self.is_chief:
        logging.warning("this worker's throw-away copy of step %d: %s", step, error)
        return
      self.failed_steps.append(step)
      reason = str(error).strip().partition("\n")[0]
      logging.error(
        "step %d could not be saved (%s); training goes on, and the checkpoint before "
        "stands. Make room or mend %s.",
        step,
        reason,
        self._outbox.folder,
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
    chosen = self._newest_whole(found) if self.is_chief else 0
    # Nothing found is -1 and all damaged is -2, so that all workers end alike.
    step = strategies.from_chief(self._strategy, chosen, is_chief=self.is_chief)
    if step == _NONE:
      return None
    if step == _ALL_DAMAGED:
      raise errors.DataError(
        f"every checkpoint of {checkpoints.folder(self.workdir)} is damaged; move the "
        "folder away to start anew."
      )
    if step not in found:
      raise errors.DataError(
        f"the chief goes on from step {step}, which is not in "
        f"{checkpoints.folder(self.workdir)} here; give all workers the same folder."
      )
    run_folder.check_data(found[step], self._facts["data_fingerprint"])
    restoring.restore(self._state, found[step], is_whole=True)
    return found[step]

  def _newest_whole(self, found: Mapping[int, Checkpoint]) -> int:
    """Returns the newest step whose files are what they were; names the others."""
    for step in sorted(found, reverse=True):
      damage = restoring.find_damage(found[step])
      if damage is None:
        return step
      logging.error("%s; trying the checkpoint before", damage)
    return _ALL_DAMAGED if found else _NONE


_NONE, _ALL_DAMAGED = -1, -2
