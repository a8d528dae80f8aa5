"""Measures the shard builder against the least that its work can cost.

  FACEDIST_REAL_DATA=/data/real python -m benchmarks.build_shards

One side is the whole command: it lists the images, reads the landmarks, plans, reads,
decodes, aligns, encodes, frames, writes and checksums, with index and manifest, into a
new folder each time. The other is the bare kernel in as many processes: OpenCV's
decode, warp and encode of the same images, which lie in memory, with warps computed
before. The goal is a rate of at least 0.8 of the kernel's.

The images are VGGFace2's sample, each identity taken several times over so that a
round lasts seconds, as a real build lasts minutes; without it, drawn ones of like size.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from absl import logging

from benchmarks import timing
from facedist import config
from facedist.data import alignment
from tfrecords_tools import build, parallel
from tfrecords_tools.builder import options
from tfrecords_tools.sources import tables

SIZE, QUALITY = 112, 95
DRAWN_SIZES = ((106, 122), (227, 250), (457, 465))  # like VGGFace2's: 10, 50, 90 %
DRAWN_IMAGES = 900
IMAGES_A_TASK = 128


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Sizes of the measurement."""

  copies: int = config.setting(12, help="How often each identity is taken.", at_least=1)
  rounds: int = config.setting(3, help="Rounds of each side.", at_least=1)
  num_processes: int = config.setting(
    0, help="Processes of each side; 0: one per core.", at_least=0
  )
  scratch: str | None = config.setting(
    None, help="Folder to write to, on a disk.", path=True
  )


def run(settings: BenchmarkConfig) -> dict[str, float]:
  """Measures both sides, logs their rates and what the images were.

  Returns:
    The builder's share of the kernel's rate, by its name in the table.
  """
  processes = settings.num_processes or parallel.available_cores()
  with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
    faces, origin = _faces(os.path.join(scratch, "originals"))
    source = os.path.join(scratch, "train")
    num_images = _take_several_times(faces, source, copies=settings.copies)
    folders = _new_folders(os.path.join(scratch, "shards"))
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(
      processes, mp_context=context, initializer=_load, initargs=(source,)
    ) as pool:
      sides: dict[str, Callable[[], object]] = {
        "builder": lambda: _build(source, next(folders), processes),
        "kernel": functools.partial(_run_kernel, pool, num_images),
      }
      logging.set_verbosity(logging.WARNING)
      seconds = timing.interleaved(sides, rounds=settings.rounds, title="build_shards")
      logging.set_verbosity(logging.INFO)
  rates = {name: num_images / value for name, value in seconds.items()}
  logging.info(
    "%s: %d %s, %d processes, %d rounds, medians: builder %.0f images/s, bare kernel "
    "%.0f images/s",
    timing.machine(),
    num_images,
    origin,
    processes,
    settings.rounds,
    rates["builder"],
    rates["kernel"],
  )
  return {"builder's rate / bare kernel's": rates["builder"] / rates["kernel"]}


def _faces(folder: str) -> tuple[str, str]:
  """Returns a folder in VGGFace2's layout, and what it holds, in words."""
  real = os.environ.get("FACEDIST_REAL_DATA")
  if real and os.path.isdir(real):
    return os.path.join(real, "vggface2_sample", "train"), "images of VGGFace2"
  rng = np.random.default_rng(0)
  rows = []
  for number in range(DRAWN_IMAGES):
    width, height = DRAWN_SIZES[number % len(DRAWN_SIZES)]
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    name = f"n{number // 30:06d}/{number:04d}"
    path = os.path.join(folder, "train", f"{name}.jpg")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    landmarks = alignment.TEMPLATE * (0.6 * height / 112) + 0.2 * width
    rows.append(",".join([name, *(f"{value:.4f}" for value in landmarks.ravel())]))
  table = os.path.join(folder, "loose_landmark_train.csv")
  pathlib.Path(table).write_text("\n".join(rows))
  return os.path.join(folder, "train"), "drawn images (FACEDIST_REAL_DATA is not set)"


def _take_several_times(faces: str, source: str, *, copies: int) -> int:
  """Makes a layout with links to each identity's folder; returns how many images."""
  parent = pathlib.Path(faces).parent
  table = _read_landmarks(parent)
  os.makedirs(source)
  rows = []
  for copy in range(copies):
    for identity in {name.split("/")[0] for name in table}:
      os.symlink(os.path.join(faces, identity), f"{source}/{identity}_{copy}")
    for name, values in table.items():
      identity, image = name.split("/")
      numbers = (f"{value:.4f}" for value in values)
      rows.append(",".join((f"{identity}_{copy}/{image}", *numbers)))
  landmarks = pathlib.Path(source).parent / "loose_landmark_train.csv"
  landmarks.write_text("\n".join(rows))
  return len(rows)


def _read_landmarks(parent: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns float32[LANDMARK_COLUMNS] by image of the table in that folder."""
  path = str(parent / "loose_landmark_train.csv")
  rows = tables.numbers_of(path, tables.LANDMARK_COLUMNS)
  return {name: np.frombuffer(numbers, "<f4") for name, _, numbers in rows}


def _new_folders(parent: str) -> Iterator[str]:
  """Yields names of folders that do not exist."""
  number = 0
  while True:
    yield os.path.join(parent, str(number))
    number += 1


def _build(source: str, folder: str, processes: int) -> None:
  """Runs the whole builder."""
  build.main(
    options.BuildConfig(
      dataset="vggface2",
      input_dir=source,
      output_dir=folder,
      image_size=SIZE,
      quality=QUALITY,
      num_processes=processes,
    )
  )


_loaded: list[tuple[np.ndarray, np.ndarray]] = []
"""In a process of the kernel: each encoded image and its warp."""


def _load(source: str) -> None:
  """Reads all images into a process of the kernel and computes their warps."""
  cv2.setNumThreads(1)
  for name, values in _read_landmarks(pathlib.Path(source).parent).items():
    encoded = np.fromfile(os.path.join(source, f"{name}.jpg"), np.uint8)
    points = values.reshape(5, 2)
    warp = alignment.similarity_transform(points, alignment.template(SIZE))
    _loaded.append((encoded, warp))


def _run_kernel(pool: concurrent.futures.Executor, num_images: int) -> None:
  """Runs the bare kernel over all images once."""
  list(pool.map(_decode_warp_encode, range(0, num_images, IMAGES_A_TASK)))


def _decode_warp_encode(start: int) -> None:
  """Runs the bare kernel over a task's images."""
  for encoded, warp in _loaded[start : start + IMAGES_A_TASK]:
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    face = cv2.warpAffine(image, warp, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def main(settings: BenchmarkConfig) -> None:
  """Prints the ratio."""
  for name, ratio in run(settings).items():
    print(f"{name:45s} {ratio:.3f}")


if __name__ == "__main__":
  config.run_command(main, BenchmarkConfig)
