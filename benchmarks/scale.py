"""Measures what a billion records cost: start-up, the order, and reading a batch.

  python -m benchmarks.scale --records=1000000,1000000000
  python -m benchmarks.scale --records=100000000 --records_a_shard=100000
  python -m benchmarks.scale --records=1000000 --identities=2000000

The sets are simulated: one shard of small images stands for all of them, under as many
names as the set has shards. All else is real: a manifest that lists every
shard, an index of 24 bytes a record, records read and decoded by number. Each set is
measured in processes of its own; memory is the peak above that of the imports.
"""

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import logging

from benchmarks import memory
from facedist import config, storage
from facedist.config import setting
from facedist.data import noise
from facedist.data.readers import local_reader, streaming_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers import block_sampler
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import manifest, tfrecord

GLOBAL_BATCH = 512
BATCHES = 40
DISTINCT_IMAGES = 100
IMAGE_SIZE = 32

READERS: dict[str, tuple[Callable[[str, str], RecordReader], int]] = {
  "stage, records": (local_reader.open_reader, 1),
  "stage, blocks of 256": (local_reader.open_reader, 256),
  "stream, blocks of 256": (streaming_reader.open_reader, 256),
}
"""What opens a split, and the order's block, by the name of the way of reading."""


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
  """Sizes of the measurement."""

  records: str = setting(
    "1000000,1000000000", help="Records of the simulated sets, separated by commas."
  )
  records_a_shard: int = setting(10_000, help="Records per shard.", at_least=1)
  identities: int = setting(100, help="Identities in the manifest.", at_least=100)


@dataclasses.dataclass(frozen=True)
class Costs:
  """What one way of reading costs at one size.

  Attributes:
    open_seconds: To load the manifest and open the reader.
    open_mb: Memory of that, in MiB.
    order_ms: Milliseconds to find the records of one global batch, anywhere.
    order_mb: Memory after many of them, in MiB above that of the imports.
    read_ms: Milliseconds to read and decode a global batch in one thread.
    read_mb: Memory after many of them, in MiB above that of the imports.
  """

  open_seconds: float
  open_mb: float
  order_ms: float
  order_mb: float
  read_ms: float
  read_mb: float


def measure(name: str, folder: str) -> Costs:
  """Measures one way of reading in this process, which must be a new one."""
  open_split, block = READERS[name]
  before = memory.peak_bytes() / 2**20
  start = time.perf_counter()
  opened = open_split(folder, "train")
  open_seconds, open_mb = (
    time.perf_counter() - start,
    memory.peak_bytes() / 2**20 - before,
  )
  order = block_sampler.make_block_sampler(
    opened.num_records,
    GLOBAL_BATCH,
    0,
    shuffle_block=block,
    streams=64,
    window_blocks=4,
  )
  last = 10 * opened.num_records // GLOBAL_BATCH
  seconds = []
  for step in np.linspace(0, last, BATCHES).astype(int).tolist():
    start = time.perf_counter()
    order.batch_at(step)
    seconds.append(time.perf_counter() - start)
  order_mb = memory.peak_bytes() / 2**20 - before
  read_ms = _read(opened, order, first_step=last // 3)
  return Costs(
    open_seconds,
    open_mb,
    statistics.median(seconds) * 1000,
    order_mb,
    read_ms,
    memory.peak_bytes() / 2**20 - before,
  )


def _read(opened: RecordReader, order: EpochSampler, *, first_step: int) -> float:
  """Reads batches from a step on; returns the median milliseconds of one."""
  prefetcher = opened.shards.prefetcher(
    order, BatchShard(GLOBAL_BATCH, 0, 1, 1), first_step=first_step, end_step=None
  )
  seconds = []
  for step in range(first_step, first_step + BATCHES):
    start = time.perf_counter()
    positions = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    wanted = order.samples_at(positions).records
    with prefetcher.batch(positions, wanted) as source:
      opened.read_batch(wanted, source)
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds) * 1000


def write_set(
  folder: str, num_records: int, *, records_a_shard: int, identities: int
) -> None:
  """Writes a set whose shards are all the same one; few identities have a record."""
  described = noise.write_noise_shards(
    folder,
    num_identities=DISTINCT_IMAGES,
    images_per_identity=1,
    val_images_per_identity=0,
    image_size=IMAGE_SIZE,
    num_shards=1,
    seed=0,
  )
  images, _ = local_reader.open_reader(folder, "train").read(np.arange(DISTINCT_IMAGES))
  count = min(records_a_shard, num_records)
  content = [
    tfrecord.Record(
      images[number % DISTINCT_IMAGES], number % 10, "n0", f"{number}.jpg"
    )
    for number in range(count)
  ]
  (one,) = noise.write_split(folder, "one", content, num_shards=1).shards
  num_shards = num_records // count
  shards = []
  for number in range(num_shards):
    shard = dataclasses.replace(
      one,
      name=f"train-{number:06d}.tfrecord",
      index_name=f"train-{number:06d}.index.npy",
    )
    os.symlink(one.name, storage.join(folder, shard.name))
    os.symlink(one.index_name, storage.join(folder, shard.index_name))
    shards.append(shard)
  split = manifest.Split(num_shards * count, tuple(shards))
  names = tuple(f"n{number:07d}" for number in range(identities))
  made = dataclasses.replace(described, splits={"train": split}, identities=names)
  manifest.save(made, folder)


def main(settings: ScaleConfig) -> None:
  """Prints a row for each size and way of reading."""
  titles = ("records", "reading", "open s", "MiB", "order ms", "MiB", "read ms", "MiB")
  print("{:>12} {:24}{:>8}{:>8}{:>10}{:>8}{:>9}{:>8}".format(*titles))
  processes = multiprocessing.get_context("spawn")
  for text in settings.records.split(","):
    with tempfile.TemporaryDirectory() as folder:
      write_set(
        folder,
        int(text),
        records_a_shard=settings.records_a_shard,
        identities=settings.identities,
      )
      logging.info("%s records are written", text)
      for name in READERS:
        with processes.Pool(1) as pool:
          costs = pool.apply(measure, (name, folder))
        row = "{:8.2f}{:8.0f}{:10.2f}{:8.0f}{:9.1f}{:8.0f}"
        print(f"{int(text):12d} {name:24}" + row.format(*dataclasses.astuple(costs)))


if __name__ == "__main__":
  config.run_command(main, ScaleConfig)
