"""Measures what the class weights cost: replicated, sharded, and sampled at 0.1.

  python -m benchmarks.head --identities=10000,1000000

It runs whole training steps with a backbone, in separate processes. The processes of
all sizes take turns; a size that does not fit in memory is halved until it does. The
first table has the median seconds of a step, a worker's peak memory above that with the
fewest identities, and the bytes that it sends in a step, each beside the formula of
`head_formulas`. The bytes are counted where two workers can have a network of their own
(Linux, as root). The second table has the formulas' predictions for larger clusters.

Two goals: a sampled step with a million identities takes at most 1.5 times as long as
with 10,000; and two workers need half the memory each.
"""

import dataclasses
import itertools
import pathlib
import re
import statistics

import tensorflow as tf
from absl import logging

from benchmarks import head_formulas, head_group, timing
from benchmarks.head_formulas import Job
from benchmarks.head_worker import WorkerConfig
from facedist import config, errors
from facedist.config import setting

PROCESS_BYTES = 2 << 30  # of TensorFlow, the network and its activations
ROOM = 0.85  # of the memory that is left, for all workers


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  identities: str = setting(
    "10000,1000000", help="Numbers of identities, separated by commas, increasing."
  )
  shardings: str = setting(
    "replicated,sharded,sampled", help="Values of --head_sharding, separated by commas."
  )
  workers: str = setting("1,2", help="Numbers of workers, separated by commas.")
  backbone: str = setting("resnet50", help="Network before the head.")
  batch: int = setting(32, help="Images per step, of all workers.", at_least=2)
  embedding_size: int = setting(
    512, help="Number of floats in an embedding.", at_least=2
  )
  steps: int = setting(1, help="Steps per round.", at_least=1)
  rounds: int = setting(5, help="Rounds of each size.", at_least=1)


@dataclasses.dataclass(frozen=True)
class Measured:
  """What one case took.

  Attributes:
    job: The case.
    seconds: Median time of a step.
    peak_bytes: A worker's memory.
    sent_bytes: Bytes that a worker sent in a step; none if they were not counted.
  """

  job: Job
  seconds: float
  peak_bytes: int
  sent_bytes: float | None


def run(settings: BenchmarkConfig) -> list[Measured]:
  """Measures every case that fits; cases that differ only in size take turns."""
  found: list[Measured] = []
  ways, numbers = settings.shardings.split(","), settings.workers.split(",")
  for sharding, workers in itertools.product(ways, map(int, numbers)):
    cases = _that_fit(settings, sharding, workers)
    with head_group.started(cases, workers) as groups:
      sides = {str(group.identities): group.run_round for group in groups}
      seconds = timing.interleaved(
        sides, rounds=settings.rounds, title=f"{sharding}, {workers} workers"
      )
      for group in groups:
        peak = group.finish()
        job = _job(settings, sharding, group.identities, workers)
        sent = group.sent_bytes
        found.append(
          Measured(
            dataclasses.replace(job, network_parameters=group.network_parameters),
            seconds[str(group.identities)] / settings.steps,
            peak,
            statistics.median(sent) / settings.steps / workers if sent else None,
          )
        )
        logging.info("%s", found[-1])
  return found


def _that_fit(
  settings: BenchmarkConfig, sharding: str, workers: int
) -> list[WorkerConfig]:
  """Returns the cases; one that does not fit in memory is halved until it does."""
  left = ROOM * _available_bytes()
  sizes: list[int] = []
  for wanted in map(int, settings.identities.split(",")):
    identities = wanted
    while left < (needed := _needed_bytes(settings, sharding, identities, workers)):
      identities //= 2
      if identities < 2:
        raise errors.UsageError(
          f"--identities={settings.identities}: there is no memory for {wanted:,} of "
          f"them, nor for fewer, with {left / 2**30:.1f} GiB left; give fewer sizes."
        )
    if identities < wanted:
      logging.warning(
        "%s: %d do not fit in memory, using %d", sharding, wanted, identities
      )
    left -= needed
    sizes.append(identities)
  return [
    WorkerConfig(
      sharding=sharding,
      identities=identities,
      batch=settings.batch,
      steps=settings.steps,
      backbone=settings.backbone,
      embedding_size=settings.embedding_size,
    )
    for identities in sizes
  ]


def _needed_bytes(
  settings: BenchmarkConfig, sharding: str, identities: int, workers: int
) -> float:
  """Returns the memory that all workers of a case need together."""
  job = _job(settings, sharding, identities, workers)
  return workers * (head_formulas.memory_bytes(job) + PROCESS_BYTES)


def _job(
  settings: BenchmarkConfig, sharding: str, identities: int, workers: int
) -> Job:
  return Job(
    sharding,
    identities=identities,
    embedding=settings.embedding_size,
    global_batch=settings.batch,
    replicas=workers,
  )


def _available_bytes() -> int:
  """Returns how much memory new processes can have."""
  found = re.search(
    r"^MemAvailable:\s+(\d+) kB$",
    pathlib.Path("/proc/meminfo").read_text(),
    re.MULTILINE,
  )
  return 1024 * int(found[1]) if found else 0


def table(found: list[Measured]) -> list[str]:
  """Returns the rows of the first table, beside what the formulas predict."""
  least = {_way(one): one for one in reversed(found)}
  rows = [
    "| head | workers | identities | step | peak | above the fewest | formula | sent "
    "a step | formula |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for one in found:
    base = least[_way(one)]
    above = one.peak_bytes - base.peak_bytes
    expected = head_formulas.memory_bytes(one.job) - head_formulas.memory_bytes(
      base.job
    )
    sent = "–" if one.sent_bytes is None else f"{one.sent_bytes / 1e6:,.1f} MB"
    rows.append(
      f"| {one.job.sharding} | {one.job.replicas} | {one.job.identities:,} "
      f"| {one.seconds:.2f} s | {one.peak_bytes / 2**20:,.0f} MiB "
      f"| {above / 2**20:,.0f} MiB | {expected / 2**20:,.0f} MiB "
      f"| {sent} | {head_formulas.sent_bytes(one.job) / 1e6:,.1f} MB |"
    )
  return rows


def ratios(found: list[Measured]) -> dict[str, float]:
  """Returns the ratios of the goals: the most identities over the fewest."""
  most = {_way(one): one for one in found}
  least = {_way(one): one for one in reversed(found)}
  measured: dict[str, float] = {}
  for way, one in most.items():
    base = least[way]
    if one is base:
      continue
    name = f"{way[0]}, {way[1]} workers: step with {one.job.identities:,} / "
    measured[f"{name}{base.job.identities:,}"] = one.seconds / base.seconds
  for sharding in {way[0] for way in most}:
    ways = [
      way
      for way in ((sharding, 1), (sharding, 2))
      if way in most and most[way] is not least[way]
    ]
    # Memory is comparable only if both have the same number of identities.
    if len(ways) == 2 and len({most[way].job.identities for way in ways}) == 1:
      alone, shared = (most[way].peak_bytes - least[way].peak_bytes for way in ways)
      measured[f"{sharding}: a worker's memory of two / one"] = shared / alone
  return measured


def _way(one: Measured) -> tuple[str, int]:
  return one.job.sharding, one.job.replicas


def prediction_table(network_parameters: int) -> list[str]:
  """Returns the rows of the second table."""
  rows = [
    "| identities | GPUs | head | memory | sent a step | multiply-adds |",
    "|---|---|---|---|---|---|",
  ]
  for job in head_formulas.predictions(network_parameters=network_parameters):
    rows.append(
      f"| {job.identities:,} | {job.replicas} | {job.sharding} "
      f"| {head_formulas.memory_bytes(job) / 2**30:,.1f} GiB "
      f"| {head_formulas.sent_bytes(job) / 1e6:,.0f} MB "
      f"| {head_formulas.multiply_adds(job) / 1e9:,.0f} G |"
    )
  return rows


def main(settings: BenchmarkConfig) -> None:
  """Prints the tables."""
  tf.get_logger().setLevel("ERROR")
  found = run(settings)
  logging.info(
    "%s, %s, batch %d, %d rounds of %d steps, medians",
    timing.machine(),
    settings.backbone,
    settings.batch,
    settings.rounds,
    settings.steps,
  )
  print("\n".join(table(found)))
  for name, ratio in ratios(found).items():
    print(f"{name:60s} {ratio:.2f}")
  print("\n".join(prediction_table(found[0].job.network_parameters)))


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
