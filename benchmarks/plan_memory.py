"""Measures how the memory of a build's plan grows with its images: it should not.

  python -m benchmarks.plan_memory --images=1000,1000000,10000000

For each size, a process of its own plans a training set from a path list in random
order, with a table of landmarks in random order, and reads the first shard back; its
peak resident memory and its processor time are shown. No image is there or needed:
planning opens none.
"""

import dataclasses
import multiprocessing
import os
import tempfile
import time

from benchmarks import memory
from facedist import config
from tfrecords_tools import listing, plan, vggface2

IMAGES_AN_IDENTITY = 50
_STEP = 982_451_653  # a prime, so that its multiples pass over every image once


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  images: str = config.setting("1000,1000000", help="Numbers of images, with commas.")
  landmarks: bool = config.setting(True, help="Join a table of landmarks.")
  scratch: str | None = config.setting(None, help="Folder to write to, on a disk.")


def main(settings: BenchmarkConfig) -> None:
  """Prints a line for each size."""
  for text in settings.images.split(","):
    num_images = int(text)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
      listed, table = _write(scratch, num_images, with_table=settings.landmarks)
      context = multiprocessing.get_context("spawn")
      with context.Pool(1) as pool:
        peak, seconds = pool.apply(_plan, (listed, table, scratch))
    print(
      f"{num_images:>12,} images: peak {peak / 2**20:,.0f} MiB resident, "
      f"{seconds:,.1f} s of a core, {1e6 * seconds / num_images:.1f} us an image",
      flush=True,
    )


def _write(folder: str, num_images: int, *, with_table: bool) -> tuple[str, str | None]:
  """Writes a path list and a table of landmarks; returns their names."""
  listed = os.path.join(folder, "images.txt")
  table = os.path.join(folder, "landmarks.csv") if with_table else None
  numbers = ",".join(f"{number}.5" for number in range(10))
  with open(listed, "w") as paths, open(table or os.devnull, "w") as rows:
    for place in range(num_images):
      number = place * _STEP % num_images
      name = f"n{number // IMAGES_AN_IDENTITY:08d}/{number:010d}"
      paths.write(f"/data/faces/{name}.jpg\n")
      rows.write(f"{name},{numbers}\n")
  return listed, table


def _plan(listed: str, table: str | None, scratch: str) -> tuple[int, float]:
  """Plans; returns this process's peak memory in bytes and its processor's seconds."""
  started = time.process_time()
  images = vggface2.read(
    listing.read(None, input_list=listed, scratch_dir=scratch),
    landmarks=table,
    bounding_boxes=None,
    identity_meta=None,
    missing_row="fail",
    scratch_dir=scratch,
  )
  made = plan.plan_training_set(
    images.groups, seed=0, num_shards=None, val_fraction=0.02, scratch_dir=scratch
  )
  first = made.images_of(made.shards[0])
  if len(first.paths) != made.shards[0].num_images:
    raise AssertionError("the plan is not whole")
  peak = memory.peak_bytes()
  return peak, time.process_time() - started


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
