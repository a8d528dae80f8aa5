"""Measures the training loop on GPUs, most important cases first, in a given time.

  python -m benchmarks.gpu --minutes=6 --output=gpu.json

A case is a network, a batch, a precision, with XLA or without, an input (shards, or one
batch that is repeated), and a framework. Every case trains on all GPUs in a process of
its own, so that its peak memory is its own; its time holds the start and the
compilation. Cases that did not run are listed with the reason.

TensorFlow's cases run `train_step.train_loop`. PyTorch's, where it is installed, run
the same network, loss and optimizer of `torch_step`, channels-last, with torch.compile
where TensorFlow's have XLA.

TFLOP/s count two operations for each multiply-add of convolutions and linear layers,
three times per image: forward pass, gradients by input, gradients by weights. The share
is that of the published dense peak; a chip that is not in `PEAKS` has none.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from benchmarks import cost, timing
from benchmarks.train_step import shard_batches
from facedist import config, errors
from facedist.config import setting
from facedist.data import noise
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.models.backbones import registry
from facedist.training import metrics, schedules, step_health, train_state, train_step
from facedist.training.config import TrainConfig, resolve

IDENTITIES = 64
RATE = 0.01
WARM_UP_STEPS = 3
LEAST_SECONDS = 5.0  # no case starts with less time left
FRAMEWORKS = ("tensorflow", "torch")

PEAKS = {
  "H200": (494.5, 989.0),
  "H100 80GB HBM3": (494.5, 989.0),
  "H100 PCIe": (378.0, 756.0),
  "A100": (156.0, 312.0),
  "L40S": (183.0, 362.0),
}
"""Dense TFLOP/s in TF32 and in 16 bits by a part of the GPU's name, from NVIDIA's data
sheets of these products; half of the figure where a sheet gives it with sparsity."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Which cases are measured, and for how long."""

  backbones: str = setting(
    "resnet50,iresnet50,iresnet100,mobilefacenet",
    help="Networks, separated by commas, the most important first.",
  )
  batches: str = setting(
    "256,128,512,1024,64", help="Images per step of each GPU, likewise."
  )
  policies: str = setting(
    "mixed_float16,mixed_bfloat16,float32", help="Precisions, likewise."
  )
  jit_compile: str = setting(
    "off,on", help="Values of --jit_compile, likewise; for PyTorch, of torch.compile."
  )
  inputs: str = setting("shards,constant", help="Where images come from, likewise.")
  frameworks: str = setting(
    "tensorflow,torch",
    help="Frameworks, likewise; torch is left out where it is not installed.",
  )
  image_size: int = setting(112, help="Height and width in pixels.", at_least=16)
  steps: int = setting(30, help="Measured steps of a case.", at_least=1)
  minutes: float = setting(6.0, help="Time for all cases.")
  case_seconds: float = setting(120.0, help="Time for a case, with its compilation.")
  output: str | None = setting(None, help="JSON file to write.", path=True)


@dataclasses.dataclass(frozen=True)
class Case:
  """One measurement; `batch` is that of each GPU."""

  backbone: str
  batch: int
  policy: str
  jit_compile: str
  input: str
  framework: str


def has_torch() -> bool:
  """Says whether PyTorch is installed, without importing it beside TensorFlow."""
  return importlib.util.find_spec("torch") is not None


def _torch_version() -> str:
  """Returns PyTorch's version as it was installed."""
  try:
    return importlib.metadata.version("torch")
  except importlib.metadata.PackageNotFoundError:
    return "of unknown version"


def cases(settings: BenchmarkConfig) -> list[Case]:
  """Returns all cases, ordered by how far they are from the most important one.

  The frameworks' cases that are compared follow each other.

  Raises:
    errors.UsageError: There is no such framework, or none is installed.
  """
  frameworks = settings.frameworks.split(",")
  for name in frameworks:
    config.lookup(dict.fromkeys(FRAMEWORKS, True), name, "frameworks")
  if not has_torch():
    frameworks = [name for name in frameworks if name != "torch"]
  if not frameworks:
    raise errors.UsageError(
      f"--frameworks={settings.frameworks}: PyTorch is not installed; pip install "
      "torch, or give --frameworks=tensorflow."
    )
  names = ("backbones", "batches", "policies", "jit_compile", "inputs")
  lists = [getattr(settings, name).split(",") for name in names]
  places = itertools.product(*(range(len(values)) for values in lists))
  found = []
  for place in sorted(places, key=lambda place: (sum(place), place)):
    backbone, batch, policy, jit_compile, source = (
      values[number] for values, number in zip(lists, place, strict=True)
    )
    found += [
      Case(backbone, int(batch), policy, jit_compile, source, framework)
      for framework in frameworks
    ]
  return found


def run(settings: BenchmarkConfig) -> dict[str, Any]:
  """Measures the cases that fit in the time; returns what the JSON file holds."""
  end = time.monotonic() + 60 * settings.minutes
  wanted = cases(settings)
  torch_version = _torch_version() if has_torch() else None
  gpus = timing.gpu_names()
  if gpus:  # this process must not take the memory that the cases need
    tf.config.set_visible_devices([], "GPU")
  results: list[dict[str, Any]] = []
  left_out: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as folder:
    noise.write_noise_shards(
      folder,
      num_identities=IDENTITIES,
      images_per_identity=max(
        8, 2 * max(case.batch for case in wanted) * max(len(gpus), 1) // IDENTITIES
      ),
      val_images_per_identity=0,
      image_size=settings.image_size,
      num_shards=4,
      seed=0,
    )
    for case in wanted:
      left = min(end - time.monotonic(), settings.case_seconds)
      if left < LEAST_SECONDS:
        left_out.append(dataclasses.asdict(case) | {"reason": "no time left"})
        continue
      found = _measure_apart(case, settings, folder, gpus, left)
      (left_out if "reason" in found else results).append(found)
      logging.info("%s", found)
  return {
    "machine": timing.machine(),
    "tensorflow": tf.__version__,
    "torch": torch_version,
    "gpus": len(gpus),
    "image_size": settings.image_size,
    "steps": settings.steps,
    "results": results,
    "ratios": ratios(results),
    "best": best_ratios(results),
    "left_out": left_out,
  }


def _measure_apart(
  case: Case, settings: BenchmarkConfig, folder: str, gpus: list[str], seconds: float
) -> dict[str, Any]:
  """Runs a case in a process of its own; has a `reason` where it has no result."""
  fields = dataclasses.asdict(case)
  if case.framework == "torch":
    try:
      job: Any = torch_job(
        case,
        _run_config(case, max(len(gpus), 1)),
        image_size=settings.image_size,
        steps=settings.steps,
        folder=folder,
        gpus=gpus,
      )
    except errors.UsageError as error:
      return fields | {"reason": errors.first_line(error)}
    program = "from benchmarks import torch_step; torch_step.run_worker()"
  else:
    job = [fields, settings.image_size, settings.steps, folder]
    program = "from benchmarks import gpu; gpu.run_worker()"
  command = [sys.executable, "-c", program, json.dumps(job)]
  try:
    code, output, messages = run_group(command, seconds)
  except subprocess.TimeoutExpired:
    return fields | {"reason": f"took longer than {seconds:.0f} s"}
  if code:
    lines = messages.strip().splitlines() or ["no message"]
    return fields | {"reason": f"exit code {code}: {lines[-1][:300]}"}
  return fields | json.loads(output.splitlines()[-1])


def run_group(command: list[str], seconds: float) -> tuple[int, str, str]:
  """Returns a command's exit code and output.

  If it takes too long, all its processes are killed: PyTorch starts one for each GPU,
  and others to compile.

  Raises:
    subprocess.TimeoutExpired: It took longer.
  """
  with subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      output, messages = process.communicate(timeout=seconds)
    except BaseException:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      raise
    return process.returncode, output, messages


def run_worker() -> None:
  """Measures the case in the last argument; prints the result as one line of JSON."""
  fields, image_size, steps, folder = json.loads(sys.argv[-1])
  print(json.dumps(measure(Case(**fields), image_size, steps, folder)))


def torch_job(
  case: Case,
  run_config: TrainConfig,
  *,
  image_size: int,
  steps: int,
  folder: str,
  gpus: list[str],
) -> dict[str, Any]:
  """Returns the fields of `torch_step.Job` for a case.

  Args:
    case: What to train with.
    run_config: Its resolved config, which has the hyperparameters.
    image_size: Height and width in pixels.
    steps: How many steps are measured.
    folder: The shards.
    gpus: Names of all GPUs.
  """
  defaults = config.lookup(registry.BACKBONES, case.backbone, "backbone")
  dropout = run_config.dropout
  return {
    "backbone": case.backbone,
    "batch": case.batch,
    "policy": case.policy,
    "is_compiled": case.jit_compile == "on",
    "input": case.input,
    "folder": folder,
    "image_size": image_size,
    "num_identities": IDENTITIES,
    "warm_up_steps": WARM_UP_STEPS,
    "steps": steps,
    "num_replicas": max(len(gpus), 1),
    "on_gpu": bool(gpus),
    "peak_tflops": peak_tflops(gpus[0], case.policy) if gpus else None,
    "embedding_size": run_config.embedding_size,
    "pooling": defaults.pooling,
    "dropout": defaults.dropout if dropout is None else dropout,
    "batch_norm_momentum": run_config.batch_norm_momentum,
    "margin": run_config.margin,
    "scale": run_config.scale,
    "learning_rate": RATE,
    "momentum": run_config.momentum,
    "nesterov": run_config.nesterov,
    "weight_decay": run_config.weight_decay,
  }


def _run_config(case: Case, replicas: int) -> TrainConfig:
  """Returns the config of a training run with this case's settings."""
  return resolve(
    TrainConfig(
      backbone=case.backbone,
      backbone_weights="none",
      policy=case.policy,
      global_batch=case.batch * replicas,
      jit_compile=case.jit_compile,
    )
  )


def measure(case: Case, image_size: int, steps: int, folder: str) -> dict[str, Any]:
  """Trains a few steps of TensorFlow in this process.

  Args:
    case: What to train with.
    image_size: Height and width in pixels.
    steps: How many steps are measured.
    folder: The shards.
  """
  gpus = timing.gpu_names()
  replicas = max(len(gpus), 1)
  strategy = strategies.make_strategy("mirrored" if replicas > 1 else "one", Cluster())
  run_config = _run_config(case, replicas)
  state = train_state.build_train_state(
    strategy, run_config, image_size=image_size, num_identities=IDENTITIES
  )
  phase = schedules.Phase("full", 0, 10**6, 0, RATE, RATE, tf.ones_like)
  settings = train_step.settings_of(run_config)
  loop = train_step.train_loop(
    state, phase, settings, strategy, step_health.StepHealth()
  )
  dataset = shard_batches(folder, run_config.global_batch, local_replicas=replicas)
  if case.input == "constant":
    dataset = dataset.take(replicas).cache().repeat()
  iterator = iter(strategy.distribute_datasets_from_function(lambda _: dataset))
  start = time.perf_counter()
  loop(iterator, tf.constant(WARM_UP_STEPS))[0].numpy()
  warm_up_seconds = time.perf_counter() - start
  start = time.perf_counter()
  rows = loop(iterator, tf.constant(steps))[0].numpy()
  seconds = time.perf_counter() - start

  rate = len(rows) * run_config.global_batch / seconds
  wait = rows[:, metrics.COLUMNS.index("input_wait")].sum() / seconds
  network = state.network
  per_image = 6 * cost.multiply_adds(network.backbone, network.embedding)
  tflops = rate * per_image / 1e12 / replicas
  peak = peak_tflops(gpus[0], case.policy) if gpus else None
  memory = tf.config.experimental.get_memory_info("GPU:0")["peak"] if gpus else None
  return {
    "images_per_second": rate,
    "step_seconds": seconds / len(rows),
    "warm_up_seconds": warm_up_seconds,
    "tflops_per_gpu": tflops,
    "share_of_peak": tflops / peak if peak else None,
    "peak_memory_bytes": memory,
    "input_wait": float(wait) if np.isfinite(wait) else None,
    "gradient_bytes": sum(
      4 * int(np.prod(variable.shape))
      for variable in (*state.head_variables, *state.backbone_variables)
    ),
  }


def peak_tflops(chip: str, policy: str) -> float | None:
  """Returns the chip's published dense peak in that precision, if it is known."""
  for name, (tf32, half) in PEAKS.items():
    if name in chip:
      return tf32 if policy == "float32" else half
  return None


def ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns TensorFlow's rate over PyTorch's for each case that both have run."""
  by_case: dict[tuple[Any, ...], dict[str, float]] = {}
  names = [field.name for field in dataclasses.fields(Case)][:-1]
  for row in results:
    rates = by_case.setdefault(tuple(row[name] for name in names), {})
    rates[row["framework"]] = row["images_per_second"]
  return [
    dict(zip(names, case, strict=True))
    | {name: rates[name] for name in FRAMEWORKS}
    | {"ratio": rates["tensorflow"] / rates["torch"]}
    for case, rates in by_case.items()
    if rates.keys() == set(FRAMEWORKS)
  ]


def best_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Compares TensorFlow's best rate with PyTorch's best without torch.compile.

  The best of all batches, and for TensorFlow with XLA or without, by network, precision
  and input.
  """
  groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
  names = ("backbone", "policy", "input")
  for row in results:
    if row["framework"] == "tensorflow" or row["jit_compile"] == "off":
      group = groups.setdefault(tuple(row[name] for name in names), {})
      group.setdefault(row["framework"], []).append(row)
  found = []
  for group_name, rows in groups.items():
    if rows.keys() != set(FRAMEWORKS):
      continue
    best = {
      name: max(rows[name], key=lambda row: row["images_per_second"]) for name in rows
    }
    rates = {name: row["images_per_second"] for name, row in best.items()}
    found.append(
      dict(zip(names, group_name, strict=True))
      | rates
      | {f"{name}_batch": row["batch"] for name, row in best.items()}
      | {
        "tensorflow_jit_compile": best["tensorflow"]["jit_compile"],
        "ratio": rates["tensorflow"] / rates["torch"],
      }
    )
  return found


def main(settings: BenchmarkConfig) -> None:
  """Prints the tables and what was left out; writes the JSON file."""
  found = run(settings)
  print(f"{found['machine']}, TensorFlow {found['tensorflow']}")
  if found["torch"]:
    print(f"PyTorch {found['torch']}, channels-last; compiled: torch.compile for XLA")
  else:
    print("PyTorch is not installed: these are TensorFlow's figures alone.")
  case_columns = "| network | batch | policy | compiled | input |"
  print(case_columns, "framework | images/s | peak | memory | wait |")
  print("|---" * 10 + "|")
  for row in found["results"]:
    named = [row[field.name] for field in dataclasses.fields(Case)]
    share, memory, wait = (
      row[key] for key in ("share_of_peak", "peak_memory_bytes", "input_wait")
    )
    measured = (
      f"{row['images_per_second']:,.0f}",
      "unknown" if share is None else f"{share:.1%}",
      "unknown" if memory is None else f"{memory / 1e9:.2f} GB",
      "unknown" if wait is None else f"{wait:.1%}",
    )
    print("|", " | ".join(map(str, (*named, *measured))), "|")
  if found["ratios"]:
    print(f"\n{case_columns} TensorFlow images/s | PyTorch images/s | ratio |")
    print("|---" * 8 + "|")
  for row in found["ratios"]:
    *named, tensorflow, torch, ratio = row.values()
    rates = (f"{tensorflow:,.0f}", f"{torch:,.0f}", f"{ratio:.2f}")
    print("|", " | ".join(map(str, (*named, *rates))), "|")
  if found["best"]:
    print(
      "\nTensorFlow's best / PyTorch's best eager (goal on an H100: at least 0.95):"
    )
  for row in found["best"]:
    print(
      f"{row['backbone']}, {row['policy']}, {row['input']}: {row['tensorflow']:,.0f} "
      f"(batch {row['tensorflow_batch']}, XLA {row['tensorflow_jit_compile']}) / "
      f"{row['torch']:,.0f} (batch {row['torch_batch']}) = {row['ratio']:.2f}"
    )
  for row in found["left_out"]:
    named = [str(row[field.name]) for field in dataclasses.fields(Case)]
    print(f"left out: {' '.join(named)}: {row['reason']}")
  if settings.output:
    pathlib.Path(settings.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
