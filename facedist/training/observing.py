"""How another process looks at a run: waits for it, finds and holds its checkpoints."""

import re
import time
from collections.abc import Collection

from absl import logging

from facedist import errors, storage
from facedist.evaluation import following
from facedist.training import checkpoints, leases, run_folder
from facedist.training.checkpoints import Checkpoint

_ENDING = re.compile(r"\.(json|index|data-\d+-of-\d+)$")
_LINE_SECONDS = 30.0


def wait_for_run(workdir: str, *, timeout_seconds: float, poll_seconds: float) -> None:
  """Waits until training has written its config.json.

  Raises:
    errors.DataError: It did not within `timeout_seconds`.
  """
  path = storage.join(workdir, run_folder.CONFIG_NAME)
  started = time.monotonic()
  next_line = 0.0
  while not storage.exists(path):
    waited = time.monotonic() - started
    if waited >= timeout_seconds:
      raise errors.DataError(
        f"{path} did not appear within {timeout_seconds:g} s; start training with "
        f"--workdir={workdir}, or check its spelling."
      )
    if waited >= next_line:
      logging.info("waiting for training to start: there is no %s yet", path)
      next_line += _LINE_SECONDS
    time.sleep(min(poll_seconds, timeout_seconds))


def find(workdir: str, wanted: str | None) -> Checkpoint:
  """Returns the complete checkpoint that `--checkpoint` names.

  Args:
    workdir: The run's folder.
    wanted: A step, a checkpoint's name such as step-00000100, or its path with or
      without an ending; none means the newest.

  Raises:
    errors.DataError: There is no such checkpoint, or it is not complete.
  """
  folder = checkpoints.folder(workdir)
  known = checkpoints.list_checkpoints(workdir)
  if wanted is None:
    if not known:
      raise errors.DataError(
        f"{folder} has no complete checkpoint; train with --workdir={workdir} first, "
        "or check its spelling."
      )
    return known[-1]
  for checkpoint in known:
    if wanted in (str(checkpoint.step), checkpoint.name):
      return checkpoint
  path = _ENDING.sub("", wanted)
  step = re.search(r"step-(\d+)$", path)
  if step and storage.exists(path + ".json") and storage.exists(path + ".index"):
    return Checkpoint(int(step[1]), path)
  steps = ", ".join(str(checkpoint.step) for checkpoint in known) or "none"
  raise errors.DataError(
    f"--checkpoint={wanted} is no complete checkpoint; give a path or a step of "
    f"{folder} (it has {steps})."
  )


def prune_after(workdir: str) -> None:
  """Once training is done, deletes what the caller's lease kept beyond --keep_last."""
  if not checkpoints.is_done(workdir):
    return
  try:
    checkpoints.prune(workdir, keep_last=checkpoints.load_config(workdir).keep_last)
  except errors.FacedistError as error:
    logging.warning("checkpoints beyond --keep_last stay: %s", error)


def steps(workdir: str) -> list[int]:
  """Returns the steps of the complete checkpoints in order, from the disk."""
  return [checkpoint.step for checkpoint in checkpoints.list_checkpoints(workdir)]


def backlog(
  workdir: str, *, holder: str, scored: Collection[int], renew_seconds: float
) -> following.Backlog:
  """Returns the checkpoints that are not scored yet, held in the name of `holder`.

  Args:
    workdir: The run's folder.
    holder: The same after a restart, and no other process's.
    scored: Steps that need no score.
    renew_seconds: Longest time between two looks for new checkpoints.
  """
  return following.Backlog(
    list_steps=lambda: steps(workdir),
    hold=lambda wanted: leases.hold(workdir, holder, wanted),
    scored=scored,
    renew_seconds=min(renew_seconds, following.RENEW_SECONDS),
  )
