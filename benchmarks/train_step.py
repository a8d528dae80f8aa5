"""Measures the trainer against the least that a training step can cost.

  python -m benchmarks.train_step

Three ratios, each from alternating rounds in one process on this machine's CPU or GPU:

- the whole training loop (input from shards, augmentation, metrics, schedule, weight
  decay) against a bare compiled step of the same network on one constant batch, for
  float32 and bfloat16: rates, at least 0.95;
- a step of the frozen phase against forward passes of the network: at most 1.3.

And from alternating runs of launch/local.py: two workers pinned to a core each against
twice one worker pinned to a core: at least 0.9.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from benchmarks import timing
from facedist import config
from facedist.config import setting
from facedist.data import noise, pipeline
from facedist.data.readers import local_reader
from facedist.data.samplers import epoch_sampler
from facedist.models.heads import replicated
from facedist.training import (
  metric_writer,
  schedules,
  step_health,
  train_state,
  train_step,
)
from facedist.training.config import TrainConfig, resolve

LAUNCHER = pathlib.Path(__file__).parents[1] / "launch" / "local.py"
IMAGE_SIZE = 112
IDENTITIES = 64
MARGIN, SCALE, RATE = 0.35, 64.0, 0.01


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  backbone: str = setting("resnet50", help="Network to measure.")
  policies: str = setting(
    "float32,mixed_bfloat16", help="Precisions to measure, separated by commas."
  )
  batch: int = setting(32, help="Images per step.", at_least=1)
  steps: int = setting(3, help="Steps per round.", at_least=1)
  rounds: int = setting(5, help="Rounds of each side.", at_least=1)
  worker_batch: int = setting(
    128,
    help="Images per step of each of two workers; the gradient that they exchange has "
    "the same size for 1 as for 1,000.",
    at_least=1,
  )
  worker_rounds: int = setting(
    3, help="Runs of one worker and of two; 0 leaves them out.", at_least=0
  )


def run(settings: BenchmarkConfig) -> dict[str, float]:
  """Measures everything; returns the ratios by name."""
  ratios: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as scratch:
    noise.write_noise_shards(
      scratch,
      num_identities=IDENTITIES,
      images_per_identity=8,
      val_images_per_identity=0,
      image_size=IMAGE_SIZE,
      num_shards=4,
      seed=0,
    )
    for policy in _measurable(settings.policies.split(",")):
      ratios |= _measure_policy(settings, scratch, policy)
    if settings.worker_rounds:
      ratios["two workers / (2 x one worker)"] = _measure_workers(settings, scratch)
  return ratios


def _measurable(policies: Sequence[str]) -> list[str]:
  """Leaves out bfloat16 where it is only emulated, which takes many times as long."""
  if "mixed_bfloat16" not in policies or timing.has_bfloat16():
    return list(policies)
  logging.warning("mixed_bfloat16 is left out: this CPU only emulates bfloat16")
  return [policy for policy in policies if policy != "mixed_bfloat16"]


def _measure_policy(
  settings: BenchmarkConfig, folder: str, policy: str
) -> dict[str, float]:
  """Measures the full phase and the frozen phase under one policy."""
  run_config = TrainConfig(
    backbone=settings.backbone,
    backbone_weights="none",
    policy=policy,
    global_batch=settings.batch,
    augment_crop=0.1,
    augment_color=0.2,
    clip_norm=5.0,
  )
  full = schedules.Phase("full", 0, 10**6, 0, RATE, RATE, tf.ones_like)
  frozen = dataclasses.replace(full, name="head", backbone_learning_rate=0.0)
  sides = {
    "trainer": _trainer(run_config, full, folder, settings.steps),
    "bare": _bare_step(run_config, settings.steps),
    "frozen": _trainer(run_config, frozen, folder, settings.steps),
    "forward": _forward(run_config, settings.steps),
  }
  seconds = timing.interleaved(sides, rounds=settings.rounds, title=policy)
  return {
    f"{policy}: trainer's rate / bare step's": seconds["bare"] / seconds["trainer"],
    f"{policy}: frozen step / forward pass": seconds["frozen"] / seconds["forward"],
  }


def _build(run_config: TrainConfig) -> train_state.TrainState:
  return train_state.build(
    resolve(run_config), image_size=IMAGE_SIZE, num_identities=IDENTITIES
  )


def _trainer(
  run_config: TrainConfig, phase: schedules.Phase, folder: str, num_steps: int
) -> Callable[[], None]:
  """The loop that facedist.train runs, on shards."""
  device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
  strategy = tf.distribute.OneDeviceStrategy(device)
  with strategy.scope():
    train_state = _build(run_config)
  settings = train_step.settings_of(resolve(run_config))
  loop = train_step.train_loop(
    train_state, phase, settings, strategy, step_health.StepHealth()
  )
  dataset = shard_batches(folder, run_config.global_batch)
  iterator = iter(strategy.distribute_datasets_from_function(lambda _: dataset))
  return lambda: loop(iterator, tf.constant(num_steps))[0].numpy()


def shard_batches(
  folder: str, global_batch: int, *, local_replicas: int = 1
) -> tf.data.Dataset:
  """Returns the training batches of the replicas of one process, from shards."""
  shards = local_reader.open_reader(folder, "train")
  return pipeline.training_dataset(
    shards,
    epoch_sampler.EpochSampler(shards.num_records, global_batch, 0),
    seed=0,
    local_replicas=local_replicas,
    num_threads=os.cpu_count() or 1,
  )


def _constant_batch(run_config: TrainConfig) -> tuple[tf.Tensor, tf.Tensor]:
  """Random pixels and labels, in the device's memory."""
  rng = np.random.default_rng(0)
  size = (run_config.global_batch, IMAGE_SIZE, IMAGE_SIZE, 3)
  images = tf.constant(rng.uniform(0, 255, size), tf.float32)
  labels = tf.constant(rng.integers(0, IDENTITIES, run_config.global_batch), tf.int32)
  return images, labels


def _bare_step(run_config: TrainConfig, num_steps: int) -> Callable[[], None]:
  """Forward, CosFace, backward and SGD with momentum; nothing else."""
  train_state = _build(run_config)
  images, labels = _constant_batch(run_config)
  variables = [*train_state.head_variables, *train_state.backbone_variables]
  optimizer = tf.keras.optimizers.SGD(RATE, momentum=0.9, jit_compile=False)
  optimizer.build(variables)
  margins = MARGIN * tf.one_hot(labels, IDENTITIES)

  @tf.function
  def step() -> tf.Tensor:
    with tf.GradientTape() as tape:
      embeddings = train_state.network.embed(images, training=True)
      cosines = replicated.cosines(embeddings, train_state.head.class_weights)
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels, SCALE * (cosines - margins)
      )
      loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return loss

  return functools.partial(_repeat, step, num_steps)


def _forward(run_config: TrainConfig, num_steps: int) -> Callable[[], None]:
  """Forward passes in inference mode."""
  network = _build(run_config).network
  images, _ = _constant_batch(run_config)
  return functools.partial(
    _repeat, tf.function(lambda: network.embed(images)), num_steps
  )


def _repeat(step: Callable[[], tf.Tensor], count: int) -> None:
  """Runs a compiled step `count` times and waits for the last."""
  for _ in range(count):
    result = step()
  result.numpy()


def _measure_workers(settings: BenchmarkConfig, folder: str) -> float:
  """Returns the rate of two pinned workers over twice that of one."""
  rates: dict[int, list[float]] = {1: [], 2: []}
  for turn in range(settings.worker_rounds):
    for workers, measured in rates.items():
      measured.append(_worker_rate(settings, folder, workers))
    timing.report_round("workers", turn + 1, settings.worker_rounds)
  return float(np.median(rates[2]) / (2 * np.median(rates[1])))


def _worker_rate(settings: BenchmarkConfig, folder: str, workers: int) -> float:
  """Trains a few intervals with pinned workers; returns their images a second."""
  with tempfile.TemporaryDirectory() as workdir:
    flags = [
      f"--data_dir={folder}",
      f"--workdir={workdir}",
      f"--backbone={settings.backbone}",
      "--backbone_weights=none",
      f"--global_batch={settings.worker_batch * workers}",
      "--head_epochs=0",
      "--full_epochs=1000",
      "--stop_after_steps=6",
      "--log_every_steps=2",
      "--checkpoint_every_steps=1000000",
      "--input_threads=1",
    ]
    cores = sorted(os.sched_getaffinity(0))[:workers]
    launcher = [sys.executable, str(LAUNCHER), f"--workers={workers}", "--pin_cpus"]
    subprocess.run(
      ["taskset", "--cpu-list", ",".join(map(str, cores)), *launcher, "--", *flags],
      check=True,
      capture_output=True,
    )
    lines = pathlib.Path(workdir, metric_writer.LOG_NAME).read_text().splitlines()
  rates = [json.loads(line)["images_per_second"] for line in lines]
  return float(np.median(rates[1:]))  # the first interval holds the compilation


def main(settings: BenchmarkConfig) -> None:
  """Prints the ratios as a table."""
  tf.get_logger().setLevel("ERROR")
  ratios = run(settings)
  logging.info(
    "%s, %s, batch %d, %d rounds of %d steps, medians",
    timing.machine(),
    settings.backbone,
    settings.batch,
    settings.rounds,
    settings.steps,
  )
  for name, ratio in ratios.items():
    print(f"{name:45s} {ratio:.3f}")


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
