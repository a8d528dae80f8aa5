"""A worker of `benchmarks.head`: trains on random images, a round for a line of input.

It says when it is ready, after each round how long that took and how many bytes passed
the loopback device meanwhile, and in the end its peak memory: a line of JSON each.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import memory
from facedist import config
from facedist.config import setting
from facedist.data import augment
from facedist.distributed import detect, strategies
from facedist.training import schedules, step_health, train_state, train_step
from facedist.training.config import TrainConfig, resolve

IMAGE_SIZE = 112
BATCHES = 4  # distinct ones, so that the labels differ from step to step
RATE = 0.01


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
  """One case."""

  sharding: str = setting("replicated", help="Value of --head_sharding.")
  identities: int = setting(10_000, help="Identities of all workers.", at_least=2)
  batch: int = setting(32, help="Images per step, of all workers.", at_least=1)
  steps: int = setting(1, help="Steps per round.", at_least=1)
  backbone: str = setting("resnet50", help="Network before the head.")
  embedding_size: int = setting(
    512, help="Number of floats in an embedding.", at_least=2
  )


def main(settings: WorkerConfig) -> None:
  """Gets ready, then runs a round for every line until there is no more."""
  with contextlib.suppress(OSError):  # where memory runs out, this goes before others
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
  cluster = detect.from_environment()
  if cluster.num_workers > 1:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[cluster.index % len(cores)]})
  strategy = strategies.make_strategy(
    "multiworker" if cluster.num_workers > 1 else "one", cluster
  )
  run = TrainConfig(
    backbone=settings.backbone,
    backbone_weights="none",
    embedding_size=settings.embedding_size,
    global_batch=settings.batch,
    head_sharding=settings.sharding,
  )
  built_state = train_state.build_train_state(
    strategy, resolve(run), image_size=IMAGE_SIZE, num_identities=settings.identities
  )
  loop = train_step.train_loop(
    built_state,
    schedules.Phase("full", 0, 10**6, 0, RATE, RATE, tf.ones_like),
    config.subset(train_step.StepSettings, run),
    strategy,
    step_health.StepHealth(),
  )
  batches = _batches(settings, strategy, seed=cluster.index)
  count = tf.constant(settings.steps)
  loop(batches, count)[0].numpy()  # compiles
  parts = [*built_state.head_variables, *built_state.backbone_variables]
  mirrored = sum(int(np.prod(variable.shape)) for variable in parts)
  _say(ready=True, mirrored_parameters=mirrored)
  for _ in sys.stdin:
    before, started = _loopback_bytes(), time.perf_counter()
    loop(batches, count)[0].numpy()
    seconds = time.perf_counter() - started
    _say(seconds=seconds, loopback_bytes=_loopback_bytes() - before)
  _say(peak_bytes=_peak_bytes())


def _batches(
  settings: WorkerConfig, strategy: tf.distribute.Strategy, *, seed: int
) -> Iterator:
  """Yields this worker's part of random batches, over and over."""
  each = settings.batch // strategy.num_replicas_in_sync
  rng = np.random.default_rng(seed)
  shape = (BATCHES, each)
  content = {
    "image": rng.integers(0, 256, (*shape, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
    "label": rng.integers(0, settings.identities, shape).astype(np.int32),
    "draws": rng.uniform(size=(*shape, augment.NUM_DRAWS)).astype(np.float32),
    "weight": np.ones(shape, np.float32),
    "damaged": np.zeros(shape, np.float32),
  }
  dataset = tf.data.Dataset.from_tensor_slices(content).repeat()
  return iter(strategy.distribute_datasets_from_function(lambda _: dataset))


def _loopback_bytes() -> int:
  """Returns how many bytes the loopback device of this network has carried."""
  for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
    name, _, numbers = line.partition(":")
    if name.strip() == "lo":
      return int(numbers.split()[0])
  return 0


def _peak_bytes() -> int:
  """Returns the most memory taken, of the GPU where there is one."""
  if tf.config.list_physical_devices("GPU"):
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
  return memory.peak_bytes()


def _say(**facts: Any) -> None:
  print(json.dumps(facts), flush=True)


if __name__ == "__main__":
  config.run_command(main, WorkerConfig)
