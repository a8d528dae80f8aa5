"""Kills workers of launch/local.py in turn in a save, at a start, and in training."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable

from absl import logging

from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints

_POLL_SECONDS = 0.002
_WINDOW_STEPS = 15  # a random kill falls so many steps after a checkpoint at most
_SAVING, _STARTING, _TRAINING = "in a save", "at a start", "at random"
MOMENTS = (_SAVING, _STARTING, _TRAINING)


@dataclasses.dataclass(frozen=True)
class Pace:
  """How long the undisturbed run took from its start to a step, and a step, in s."""

  start_seconds: float
  step_seconds: float

  def window(self, moment: str) -> float:
    """Returns the seconds in which a kill may fall, from where its moment begins."""
    windows = {
      _SAVING: 0.0,
      _STARTING: self.start_seconds,
      _TRAINING: _WINDOW_STEPS * self.step_seconds,
    }
    return windows[moment]


def pace_of(workdir: str, *, started: float) -> Pace:
  """Returns how long a finished run took; `started` is when, by time.time()."""
  lines = pathlib.Path(workdir, metric_writer.LOG_NAME).read_text().splitlines()
  first, last = (json.loads(line) for line in (lines[0], lines[-1]))
  seconds = float(last["time"] - first["time"]) / (last["step"] - first["step"])
  return Pace(start_seconds=first["time"] - started, step_seconds=seconds)


def kill(
  launcher: subprocess.Popen, workdir: str, *, kills: int, seed: int, pace: Pace
) -> int:
  """Kills workers until there were enough or the run has ended; returns how many."""
  chance = random.Random(seed)
  count = 0
  struck: set[int] = set()  # the workers of the attempt that was killed last
  while count < kills and launcher.poll() is None:
    moment = MOMENTS[count % len(MOMENTS)]
    if not _wait_for(moment, launcher, workdir, struck=struck):
      break
    time.sleep(chance.uniform(0, pace.window(moment)))
    workers = _children(launcher.pid)
    if not workers or struck.intersection(workers):  # not yet started again
      continue
    try:
      os.kill(chance.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
      continue
    struck, count = set(workers), count + 1
    newest = _newest(workdir)
    logging.info("kill %d of %d, %s, after step %d", count, kills, moment, newest)
  return count


def _wait_for(
  moment: str, launcher: subprocess.Popen, workdir: str, *, struck: set[int]
) -> bool:
  """Waits for where a moment begins; False if the run ended before."""

  def has_started() -> bool:
    workers = _children(launcher.pid)
    return bool(workers) and not struck.intersection(workers)

  if moment == _STARTING:
    return _wait(launcher, has_started)
  newest = _newest(workdir)
  if not _wait(launcher, lambda: _newest(workdir) > newest):
    return False
  return moment != _SAVING or _wait(launcher, lambda: _is_saving(workdir))


def _wait(launcher: subprocess.Popen, condition: Callable[[], bool]) -> bool:
  """Waits for a condition; False if the run ended before."""
  while launcher.poll() is None:
    if condition():
      return True
    time.sleep(_POLL_SECONDS)
  return False


def _newest(workdir: str) -> int:
  """Returns the step of the newest complete checkpoint, -1 where there is none."""
  found = checkpoints.list_checkpoints(workdir)
  return found[-1].step if found else -1


def _is_saving(workdir: str) -> bool:
  """Says whether a checkpoint is half written: data without a marker."""
  names = os.listdir(checkpoints.folder(workdir))
  markers = {name.removesuffix(".json") for name in names if name.endswith(".json")}
  return any(
    name.startswith("step-") and name.split(".")[0] not in markers for name in names
  )


def _children(pid: int) -> list[int]:
  """Returns the ids of a process's children."""
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [int(word) for word in path.read_text().split()]
