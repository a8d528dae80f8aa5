"""Measures how the memory of a build's plan grows with its images: it should not.

  python -m benchmarks.plan_memory --images=1000,1000000,10000000
  python -m benchmarks.plan_memory --is_listed --images=1000000,100000000

For each size, a process of its own plans a training set from a path list in random
order, with a table of landmarks in random order, or with --is_listed from paths in
order, as a folder or a bucket lists them; then it reads the first and the last shard
back. Its peak resident memory and its processor time are shown. No image is there or
needed: planning opens none.
"""

import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

from benchmarks import memory
from facedist import config
from tfrecords_tools.builder import plan
from tfrecords_tools.sources import base, listing, vggface2

_LIST, _TABLE = "images.txt", "landmarks.csv"
_STEP = 982_451_653  # a prime, so that its multiples pass over every image once


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  images: str = config.setting(
    "1000,1000000", help="Numbers of images, separated by commas."
  )
  images_an_identity: int = config.setting(
    50, help="Images of each identity.", at_least=1
  )
  is_listed: bool = config.setting(
    False, help="Yield the paths in order, without any files."
  )
  landmarks: bool = config.setting(True, help="Join a table of landmarks.")
  scratch: str | None = config.setting(
    None, help="Folder to write to, on a disk.", path=True
  )


def main(settings: BenchmarkConfig) -> None:
  """Prints a line for each size."""
  for text in settings.images.split(","):
    num_images = int(text)
    print(f"planning {num_images:,} images", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
      if not settings.is_listed:
        _write(scratch, num_images, settings)
      context = multiprocessing.get_context("spawn")
      with context.Pool(1) as pool:
        peak, seconds = pool.apply(_plan, (scratch, num_images, settings))
    print(
      f"{num_images:>12,} images: peak {peak / 2**20:,.0f} MiB resident, "
      f"{seconds:,.1f} s of a core, {1e6 * seconds / num_images:.1f} us an image",
      flush=True,
    )


def _write(folder: str, num_images: int, settings: BenchmarkConfig) -> None:
  """Writes a path list and a table of landmarks."""
  listed = os.path.join(folder, _LIST)
  table = os.path.join(folder, _TABLE) if settings.landmarks else os.devnull
  numbers = ",".join(f"{number}.5" for number in range(10))
  with open(listed, "w") as paths, open(table, "w") as rows:
    for place in range(num_images):
      number = place * _STEP % num_images
      name = f"n{number // settings.images_an_identity:08d}/{number:010d}"
      # in a bucket, where nobody checks that an image is there
      paths.write(f"gs://faces/{name}.jpg\n")
      rows.write(f"{name},{numbers}\n")


def _groups_in_order(num_images: int, an_identity: int) -> Iterator[base.IdentityGroup]:
  """Yields the identities of a folder that is not there."""
  for first in range(0, num_images, an_identity):
    name = f"n{first // an_identity:08d}"
    end = min(num_images, first + an_identity)
    yield base.new_group(
      name, [f"{name}/{number:010d}.jpg" for number in range(first, end)]
    )


def _groups_of_files(
  scratch: str, settings: BenchmarkConfig
) -> Iterable[base.IdentityGroup]:
  """Returns the identities of the path list, with their landmarks."""
  return vggface2.read(
    listing.list_images(
      None, input_list=os.path.join(scratch, _LIST), scratch_dir=scratch
    ),
    landmarks=os.path.join(scratch, _TABLE) if settings.landmarks else None,
    bounding_boxes=None,
    identity_meta=None,
    missing_row="fail",
    scratch_dir=scratch,
  ).groups


def _plan(
  scratch: str, num_images: int, settings: BenchmarkConfig
) -> tuple[int, float]:
  """Plans; returns this process's peak memory in bytes and its processor's seconds."""
  started = time.process_time()
  if settings.is_listed:
    groups: Iterable[base.IdentityGroup] = _groups_in_order(
      num_images, settings.images_an_identity
    )
  else:
    groups = _groups_of_files(scratch, settings)
  made = plan.plan_training_set(
    groups, seed=0, num_shards=None, val_fraction=0.02, scratch_dir=scratch
  )
  for shard in (made.shards[0], made.shards[-1]):
    if len(made.images_of(shard).paths) != shard.num_images:
      raise AssertionError("the plan is not whole")
  peak = memory.peak_bytes()
  return peak, time.process_time() - started


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
