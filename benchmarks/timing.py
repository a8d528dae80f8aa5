"""Timings that can be compared: taken by turns, on a machine that is named."""

import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
  sides: Mapping[str, Callable[[], object]],
  *,
  rounds: int,
  before: Mapping[str, Callable[[], object]] | None = None,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
  """Times several pieces of work by turns, so that all meet the same disturbances.

  A first round of each is not counted. Every other round runs in reverse order, so
  that none gains from what it follows.

  Args:
    sides: The work, by name.
    rounds: How often to time each.
    before: What to do before a side's work, by name, outside its time.
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
  return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> str:
  """Names the processor, the cores this process may use, and TensorFlow's GPUs."""
  import tensorflow as tf

  cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
  found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
  cpu = found[1] if found else platform.machine()
  gpus = [
    tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
    for gpu in tf.config.list_physical_devices("GPU")
  ]
  return ", ".join([f"{cpu}, {len(os.sched_getaffinity(0))} cores", *gpus])
