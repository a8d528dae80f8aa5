"""Timings that can be compared: taken by turns, on a machine that is named."""

import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping


def interleaved(
  sides: Mapping[str, Callable[[], object]],
  *,
  rounds: int,
  before: Mapping[str, Callable[[], object]] | None = None,
  title: str = "measuring",
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
  """Times several pieces of work by turns, so that all meet the same disturbances.

  A first round of each is not counted. Every other round runs in reverse order, so
  that none gains from what it follows.

  Args:
    sides: The work, by name.
    rounds: How often to time each.
    before: What to do before a side's work, by name, outside its time.
    title: What is measured; a line on stderr names it after each round.
    clock: Returns seconds.

  Returns:
    The median seconds of each side, by name.
  """
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for turn in range(rounds + 1):
    for name in list(sides)[:: -1 if turn % 2 else 1]:
      if before and name in before:
        before[name]()
      start = clock()
      sides[name]()
      if turn:
        seconds[name].append(clock() - start)
    report_round(title, turn, rounds)
  return {name: statistics.median(times) for name, times in seconds.items()}


def report_round(title: str, done: int, rounds: int) -> None:
  """Says on stderr how far a measurement is, whatever a benchmark does to the log."""
  print(f"{title}: {done} of {rounds} rounds", file=sys.stderr, flush=True)


def has_bfloat16() -> bool:
  """Says whether this machine computes in bfloat16, rather than emulating it.

  A GPU does. A CPU does where the kernel lists AVX-512 BF16, AMX or Arm's extension.
  """
  import tensorflow as tf

  if tf.config.list_physical_devices("GPU"):
    return True
  cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
  return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo) is not None


def machine() -> str:
  """Names the processor, the cores this process may use, and TensorFlow's GPUs."""
  cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
  found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
  cpu = found[1] if found else platform.machine()
  return ", ".join([f"{cpu}, {len(os.sched_getaffinity(0))} cores", *gpu_names()])


def gpu_names() -> list[str]:
  """Names each of TensorFlow's GPUs."""
  import tensorflow as tf

  return [
    tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
    for gpu in tf.config.list_physical_devices("GPU")
  ]
