"""Kills workers of a small run at random moments, and shows that nothing was lost.

  python launch/soak.py --kills=50

Trains two workers on random images with deterministic ops, once undisturbed and once
under launch/local.py with restarts while random workers are killed (SIGKILL): every
third time in the middle of a save, else at a random moment. Then compares the losses of
all steps and the bits of the final weights. Ends with 0 if both are the same, else with
1. It takes about twenty seconds a kill on two cores.
"""

import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import logging

from facedist import config, errors
from facedist.data import noise
from facedist.training import checkpoints, logs

_LAUNCHER = str(pathlib.Path(__file__).with_name("local.py"))
_POLL_SECONDS = 0.002
_SAVE_EVERY_STEPS = 5
_STEPS_A_KILL = 30  # of the run's length; a kill costs it at most 20
_WINDOW_STEPS = 15  # a random kill falls so many steps after a checkpoint at most
_FLAGS = (
  "--backbone=tinynet",
  "--backbone_weights=none",
  "--embedding_size=64",
  "--noembedding_batch_norm",
  "--global_batch=32",
  "--scale=16",
  "--head_epochs=0",
  "--full_epochs=100000",
  "--full_warmup_epochs=0",
  "--full_schedule=step",
  "--full_rate=0.01",
  "--clip_norm=5",
  "--augment_crop=0.1",
  "--augment_color=0.2",
  "--log_every_steps=5",
  f"--checkpoint_every_steps={_SAVE_EVERY_STEPS}",
  "--deterministic",
  "--peer_timeout=20",
)


@dataclasses.dataclass(frozen=True)
class SoakConfig:
  """The flags of this command."""

  kills: int = config.setting(50, help="Workers to kill.", at_least=1)
  seed: int = config.setting(0, help="Decides who is killed and when.")
  output_dir: str | None = config.setting(
    None, help="Folder for both runs; a temporary one if not given.", on_disk=True
  )


def main(settings: SoakConfig) -> int:
  """Runs both and compares them."""
  with tempfile.TemporaryDirectory(prefix="facedist-soak-") as scratch:
    folder = settings.output_dir or scratch
    shards = os.path.join(folder, "shards")
    noise.write_noise_shards(
      shards,
      num_identities=10,
      images_per_identity=40,
      val_images_per_identity=0,
      image_size=32,
      num_shards=4,
      seed=settings.seed,
    )
    steps = _STEPS_A_KILL * settings.kills
    flags = [*_FLAGS, f"--data_dir={shards}", f"--stop_after_steps={steps}"]
    undisturbed, disturbed = (
      os.path.join(folder, name) for name in ("undisturbed", "disturbed")
    )
    if code := subprocess.call(_command(undisturbed, flags, restarts=0)):
      return code
    seconds_a_step = _seconds_a_step(undisturbed)
    process = subprocess.Popen(_command(disturbed, flags, restarts=10 * settings.kills))
    try:
      kills = _kill(process, disturbed, settings, seconds_a_step=seconds_a_step)
      code = process.wait()
    finally:
      process.terminate()
      process.wait()
    if code:
      return code
    return _compare(undisturbed, disturbed, steps=steps, kills=kills)


def _command(workdir: str, flags: list[str], *, restarts: int) -> list[str]:
  """Returns the launcher's command."""
  launcher = [sys.executable, _LAUNCHER, "--workers=2", "--backoff_seconds=0.1"]
  launcher.append(f"--max_restarts={restarts}")
  return [*launcher, "--", f"--workdir={workdir}", *flags]


def _kill(
  launcher: subprocess.Popen,
  workdir: str,
  settings: SoakConfig,
  *,
  seconds_a_step: float,
) -> int:
  """Kills workers until there were enough or the run has ended; returns how many."""
  chance = random.Random(settings.seed)
  kills = 0
  while kills < settings.kills and launcher.poll() is None:
    newest = _newest(workdir)
    if not _wait(launcher, functools.partial(_is_newer, workdir, newest)):
      break
    in_save = kills % 3 == 2
    if in_save:
      _wait(launcher, lambda: _is_saving(workdir))
    else:
      time.sleep(chance.uniform(0, _WINDOW_STEPS * seconds_a_step))
    workers = _children(launcher.pid)
    victim = chance.choice(workers) if workers else None
    if victim is None:
      continue
    try:
      os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
      continue
    kills += 1
    moment = "in a save" if in_save else "at random"
    logging.info(
      "kill %d of %d, %s, after step %d",
      kills,
      settings.kills,
      moment,
      _newest(workdir),
    )
  return kills


def _seconds_a_step(workdir: str) -> float:
  """Returns how long a finished run took for a step, start-up left out."""
  lines = pathlib.Path(workdir, logs.LOG_NAME).read_text().splitlines()
  first, last = (json.loads(line) for line in (lines[0], lines[-1]))
  return float(last["time"] - first["time"]) / (last["step"] - first["step"])


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


def _is_newer(workdir: str, step: int) -> bool:
  """Says whether there is a checkpoint after `step`."""
  return _newest(workdir) > step


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


def _compare(undisturbed: str, disturbed: str, *, steps: int, kills: int) -> int:
  """Says whether both runs did the same; returns the exit code."""
  losses = [dict(logs.step_losses(workdir)) for workdir in (undisturbed, disturbed)]
  different = [
    step for step in range(steps) if losses[0].get(step) != losses[1].get(step)
  ]
  weights = [_weights(workdir) for workdir in (undisturbed, disturbed)]
  if different or weights[0] != weights[1]:
    logging.error(
      "after %d kills, %d losses differ (first at step %s) and the final weights are "
      "%s",
      kills,
      len(different),
      different[:1],
      "the same" if weights[0] == weights[1] else "others",
    )
    return errors.ExitCode.INTERNAL
  logging.info(
    "%d kills, %d steps: all losses and the final weights are the same to the bit",
    kills,
    steps,
  )
  return errors.ExitCode.DONE


def _weights(workdir: str) -> dict[str, int]:
  """Returns the CRCs of the newest checkpoint's data."""
  files = checkpoints.list_checkpoints(workdir)[-1].marker()["files"]
  return {name: file["crc32c"] for name, file in files.items() if ".data-" in name}


def run() -> None:
  """Runs the command line."""
  config.run_command(main, SoakConfig)


if __name__ == "__main__":
  run()
