"""Claims on checkpoints: evaluators that share a run score no checkpoint twice.

Evaluators of one workdir with the same sets and the same way of embedding divide its
checkpoints among them. Before an evaluator scores one, it takes the claim on it: a file
`checkpoints/claims/PLAN-step-00000100-N.json`, where creating the next number N fails
if another process was faster, on a disk and in a bucket. The holder rewrites the file
every few seconds, and removes it once the score is written. A claim is free again if
its holder was a process of this machine that no longer exists, or if the file has not
changed for SILENT_SECONDS; no clocks are compared (see `training.workdir_lock`).
"""

import json
import re
import threading
import time
from collections.abc import Callable

from absl import logging

from facedist import errors, storage
from facedist.training import workdir_lock

CLAIMS_FOLDER = "checkpoints/claims"
SILENT_SECONDS = 120.0  # four times the longest time between two renewals


class Claims:
  """The claims of one evaluator; two threads may use it."""

  def __init__(
    self,
    workdir: str,
    plan: str,
    *,
    silent_seconds: float = SILENT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Takes none yet.

    Args:
      workdir: The run's folder, on a disk or in a bucket.
      plan: `ScorePlan.fingerprint`: evaluators with another one are not affected.
      silent_seconds: Time without a renewal after which a claim is free.
      clock: Returns seconds.
    """
    self._folder = storage.join(workdir, CLAIMS_FOLDER)
    self._plan = plan
    self._silent_seconds = silent_seconds
    self._clock = clock
    self._record = workdir_lock.process_record()
    self._lock = threading.Lock()
    self._held: dict[int, int] = {}  # number of this evaluator's file, by step
    self._watched: dict[int, tuple[int, bytes, float]] = {}  # and since when it is so

  def take(self, step: int) -> bool:
    """Takes the claim on a step; returns False while this or another evaluator has it.

    The one who held it before may have scored the step: look at the scores afterwards.
    """
    with self._lock:
      if step in self._held:
        return False
      number = self._newest().get(step, 0)
      if number and not self._is_free(step, number):
        return False
      content = json.dumps(self._record).encode()
      path = self._path(step, number + 1)
      if not storage.write_bytes(path, content, if_absent=True):
        return False
      self._held[step] = number + 1
      if number:
        logging.info("step %d is taken over from an evaluator that is gone", step)
        storage.remove(self._path(step, number))
      return True

  def renew(self) -> None:
    """Rewrites the files, so that other evaluators see that this one is alive."""
    with self._lock:
      newest = self._newest() if self._held else {}
      self._record["refreshed"] += 1
      for step, number in list(self._held.items()):
        if newest.get(step) == number:
          content = json.dumps(self._record).encode()
          storage.write_bytes(self._path(step, number), content)
          continue
        del self._held[step]
        logging.warning(
          "another evaluator scores step %d too, since this one was halted for a while",
          step,
        )

  def release(self, step: int) -> None:
    """Ends the claim on a step, if this evaluator holds it."""
    with self._lock:
      if step in self._held:
        storage.remove(self._path(step, self._held.pop(step)))

  def release_all(self) -> None:
    """Ends all claims of this evaluator."""
    for step in list(self._held):
      self.release(step)

  def others(self) -> set[int]:
    """Returns the steps that other evaluators of the same plan are scoring."""
    with self._lock:
      return {
        step
        for step, number in self._newest().items()
        if step not in self._held and not self._is_free(step, number)
      }

  def _newest(self) -> dict[int, int]:
    """Returns the highest number of each claimed step."""
    pattern = re.compile(rf"{re.escape(self._plan)}-step-([0-9]+)-([0-9]+)\.json")
    newest: dict[int, int] = {}
    for name in map(pattern.fullmatch, storage.list_names(self._folder)):
      if name:
        step, number = int(name[1]), int(name[2])
        newest[step] = max(number, newest.get(step, 0))
    return newest

  def _is_free(self, step: int, number: int) -> bool:
    """Returns whether the holder of a file is gone."""
    try:
      content = storage.read_bytes(self._path(step, number))
    except errors.DataError:
      return False  # removed at this moment; the next try finds none
    if workdir_lock.is_over(content):
      return True
    watched_number, watched_content, since = self._watched.get(step, (0, b"", 0.0))
    if (watched_number, watched_content) != (number, content):
      self._watched[step] = (number, content, self._clock())
      return False
    return self._clock() - since > self._silent_seconds

  def _path(self, step: int, number: int) -> str:
    name = f"{self._plan}-step-{step:08d}-{number}.json"
    return storage.join(self._folder, name)
