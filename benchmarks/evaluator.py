"""Measures how much of its time the evaluator spends in forward passes.

  python -m benchmarks.evaluator --verification_data=/data/shards/lfw

It saves a network with random weights as several checkpoints of a run, and lets
facedist.evaluate --once score them. What counts is the share of the time, from the
first to the last checkpoint, in which the network computes: at least 0.95. The rest is
loading of checkpoints, reading and decoding of images, the figures with their
intervals, the picture, and writing. A first checkpoint, which compiles the network, is
not counted. Without --verification_data the set is LFW, from the images of
$FACEDIST_REAL_DATA/lfw, or else random patterns.

  --device_rate=8000  instead of the network's forward passes, waits as long as a GPU
                      of that rate takes, which leaves the CPU free as a GPU does
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf
from absl import logging

from benchmarks import timing
from facedist import config, evaluate
from facedist.config import setting
from facedist.data import noise, verification_set
from facedist.evaluation.evaluator import Scorer, ScoreSettings
from facedist.training import train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig

REAL_DATA = "FACEDIST_REAL_DATA"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """What is scored, and how often."""

  verification_data: str | None = setting(
    None, help="Folder of a verification set, or several with commas.", paths=True
  )
  backbone: str = setting("mobilefacenet", help="Network to measure.")
  checkpoints: int = setting(3, help="Checkpoints that are timed.", at_least=1)
  batch_size: int = setting(128, help="Images per call of the network.", at_least=1)
  device_rate: float = setting(
    0.0,
    help="Images/s of a GPU that is waited for in place of the network's forward "
    "passes; 0: the network computes on this machine.",
    at_least=0.0,
  )
  pairs: int = setting(6000, help="Pairs of random patterns.", at_least=40)
  image_size: int = setting(112, help="Pixels of random patterns.", at_least=16)


def run(settings: BenchmarkConfig) -> dict[str, float]:
  """Returns images a second, seconds a checkpoint and the share of forward passes."""
  with tempfile.TemporaryDirectory() as folder:
    evaluating = evaluate.EvaluateConfig(
      workdir=os.path.join(folder, "run"),
      verification_data=settings.verification_data or _write_set(folder, settings),
      batch_size=settings.batch_size,
      once=True,
    )
    sets = verification_set.load_verification_sets(
      evaluating.verification_data, evaluating.cache_dir, cache_gb=0.0
    )
    _save_run(evaluating.workdir, settings.backbone)
    scorer = _Scorer(
      sets,
      config.subset(ScoreSettings, evaluating),
      device_rate=settings.device_rate,
    )
    _save_checkpoint(evaluating.workdir, 0, image_size=sets[0].image_size)
    evaluate.score_run(evaluating, scorer)
    for step in range(1, settings.checkpoints + 1):
      _save_checkpoint(evaluating.workdir, step, image_size=sets[0].image_size)
    forward_seconds = scorer.forward_seconds
    started = time.perf_counter()
    evaluate.score_run(evaluating, scorer)
    seconds = time.perf_counter() - started
  images = sum(each.num_images for each in sets) * settings.checkpoints
  return {
    "images/s": images / seconds,
    "s/checkpoint": seconds / settings.checkpoints,
    "forward / all": (scorer.forward_seconds - forward_seconds) / seconds,
  }


class _Scorer(Scorer):
  """A scorer whose network may be a device of a known rate."""

  def __init__(
    self,
    sets: tuple[verification_set.VerificationSet, ...],
    settings: ScoreSettings,
    *,
    device_rate: float,
  ) -> None:
    super().__init__(sets, settings)
    self._device_rate = device_rate

  def load(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Loads the weights, and puts the device in the network's place."""
    super().load(checkpoint)
    if self._device_rate and self._network is not None:
      size = self._network.embedding_size

      def wait(images: np.ndarray) -> np.ndarray:
        """Takes its time, and returns random numbers that depend on the images."""
        time.sleep(len(images) / self._device_rate)
        seed = int(images[:, 0, 0].sum(dtype=np.int64))
        generator = np.random.default_rng(seed)
        return generator.standard_normal((len(images), size), np.float32)

      self._network.embed = wait


def _write_set(folder: str, settings: BenchmarkConfig) -> str:
  """Writes LFW, or random patterns without it; returns the folder of the set."""
  target = os.path.join(folder, "set")
  if not os.environ.get(REAL_DATA):
    logging.info("random patterns, as $%s is not set", REAL_DATA)
    noise.write_noise_verification_set(
      target,
      num_pairs=settings.pairs,
      folds=10,
      image_size=settings.image_size,
      seed=0,
    )
    return target
  lfw = pathlib.Path(os.environ[REAL_DATA], "lfw")
  building = [sys.executable, "-m", "tfrecords_tools.build", "--dataset=lfw"]
  building += [f"--input_dir={lfw / 'aligned_112'}", f"--pairs={lfw / 'pairs.txt'}"]
  subprocess.run([*building, f"--output_dir={target}"], check=True)
  return target


def _save_run(workdir: str, backbone: str) -> None:
  """Writes the config of a run."""
  os.makedirs(checkpoints.folder(workdir))
  run_config = TrainConfig(backbone=backbone, backbone_weights="none")
  pathlib.Path(workdir, "config.json").write_text(config.to_json(run_config))


def _save_checkpoint(workdir: str, step: int, *, image_size: int) -> None:
  """Saves a network with random weights."""
  run_config = checkpoints.load_config(workdir)
  tf.keras.utils.set_random_seed(step)
  network = train_state.network_from_config(run_config, image_size)
  checkpoints.save(
    tf.train.Checkpoint(network=network),
    workdir,
    step=step,
    is_chief=True,
    facts={"image_size": image_size},
  )


def main(settings: BenchmarkConfig) -> None:
  """Prints the figures as a table."""
  results = run(settings)
  logging.info("%s; %s", timing.machine(), settings)
  for name, value in results.items():
    print(f"{name:20s} {value:9.3f}")


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
