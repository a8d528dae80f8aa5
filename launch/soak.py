"""Kills workers of a small run at random moments, and shows that nothing was lost.

  python launch/soak.py --kills=50

Trains two workers on random images with deterministic ops, once undisturbed and once
under launch/local.py with restarts while random workers are killed (SIGKILL): in turn
in the middle of a save, while they start, form the cluster, restore or compile, and at
a random moment of training. Then compares the losses of all steps and the bits of the
final weights. Ends with 0 if all kills were made and both runs are the same, else with
1. --train_flags="--head_sharding=sharded" does so with a head whose rows each worker
saves itself. It takes about twenty seconds a kill on two cores.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from absl import logging

from facedist import config, errors
from facedist.data import noise
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints

if TYPE_CHECKING:
  from launch import killer
else:
  import killer  # a script finds its own folder's modules, and they no package

_LAUNCHER = str(pathlib.Path(__file__).with_name("local.py"))
_SAVE_EVERY_STEPS = 5
_STEPS_A_KILL = 30  # of the run's length; a kill costs it at most 20
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
  seed: int = config.setting(
    0, help="Decides which worker is killed and when.", at_least=0
  )
  train_flags: str = config.setting(
    "", help="More flags of facedist.train, for both runs, as in a shell."
  )
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
    flags += shlex.split(settings.train_flags)
    started = time.time()
    undisturbed, disturbed = (
      os.path.join(folder, name) for name in ("undisturbed", "disturbed")
    )
    if code := subprocess.call(_command(undisturbed, flags, restarts=0)):
      return code
    pace = killer.pace_of(undisturbed, started=started)
    process = subprocess.Popen(_command(disturbed, flags, restarts=10 * settings.kills))
    try:
      kills = killer.kill(
        process, disturbed, kills=settings.kills, seed=settings.seed, pace=pace
      )
      code = process.wait()
    finally:
      process.terminate()
      process.wait()
    if code:
      return code
    if kills < settings.kills:
      logging.error(
        "the run ended after %d of %d kills, which proves less than was asked for",
        kills,
        settings.kills,
      )
      return errors.ExitCode.INTERNAL
    return _compare(undisturbed, disturbed, steps=steps, kills=kills)


def _command(workdir: str, flags: list[str], *, restarts: int) -> list[str]:
  """Returns the launcher's command."""
  launcher = [sys.executable, _LAUNCHER, "--workers=2", "--backoff_seconds=0"]
  launcher.append(f"--max_restarts={restarts}")
  return [*launcher, "--", f"--workdir={workdir}", *flags]


def _compare(undisturbed: str, disturbed: str, *, steps: int, kills: int) -> int:
  """Says whether both runs did the same; returns the exit code."""
  losses = [
    dict(metric_writer.step_losses(workdir)) for workdir in (undisturbed, disturbed)
  ]
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
  """Returns the CRCs of the newest checkpoint's data, a sharded head's rows too."""
  marker = checkpoints.list_checkpoints(workdir)[-1].marker()
  files = marker["files"] | marker.get("rows", {"files": {}})["files"]
  return {name: file["crc32c"] for name, file in files.items() if ".index" not in name}


def run() -> None:
  """Runs the command line."""
  config.run_command(main, SoakConfig)


if __name__ == "__main__":
  run()
