"""Finds the landmarks of a source's images in processes, and keeps them in parts.

The images are cut, in their order, into parts of 1,024. A part's file, JSON Lines in
the folder `parts` of the output, is written when all its images are done, so a run that
was killed continues with the parts that have none. A part whose file names other images
than the source does now is done again.
"""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from facedist import errors, storage
from facedist.data import alignment, decoding, face_detection
from tfrecords_tools import parallel
from tfrecords_tools.sources import base, tables

PARTS_FOLDER = "parts"
IMAGES_FOLDER = "images"
IMAGES_A_PART = 1024  # at most half a minute of one core's work is lost
_IMAGES_A_TASK = 16
_DECIMALS = 4  # as VGGFace2's tables have
ONE_THREAD = {
  **{"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"},
  "CUDA_VISIBLE_DEVICES": "-1",  # MTCNN runs on the CPU; a GPU's memory would be taken
}
"""Environment of the command and its processes. With more threads TensorFlow adds in
another order, so that a resumed run would differ in the landmarks' last digit."""


@dataclasses.dataclass(frozen=True)
class FindSettings:
  """How faces are found and what is written of them.

  Attributes:
    detector: Which detector, and which of several faces.
    images_dir: Folder for the aligned images; None writes none.
    face: Size and quality of an aligned image.
  """

  detector: face_detection.DetectorSettings
  images_dir: str | None
  face: alignment.FaceSettings


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What was found in an image.

  Attributes:
    path: identity/image.
    landmarks: x1, y1, ..., y5 in pixels of the upright image; None without a face.
    box: Left, top, width and height in whole pixels; None without a face.
    num_faces: Faces that were found.
    reason: Why there is no face; None if there is one.
    is_readable: Whether the image could be decoded.
  """

  path: str
  landmarks: list[float] | None = None
  box: list[int] | None = None
  num_faces: int = 0
  reason: str | None = None
  is_readable: bool = True


@dataclasses.dataclass(frozen=True)
class Images:
  """Some neighbouring images of a source.

  Attributes:
    paths: identity/image.
    files: The files that they lie in.
    rows: base.ROW_DTYPE[images]: where in them.
  """

  paths: list[str]
  files: list[str]
  rows: np.ndarray

  def cut(self, size: int) -> Iterator["Images"]:
    """Yields them, `size` at a time."""
    for start in range(0, len(self.paths), size):
      part = slice(start, start + size)
      yield Images(self.paths[part], self.files[part], self.rows[part])


def parts_of(source: base.Source) -> Iterator[Images]:
  """Yields the images of a source in parts of IMAGES_A_PART, the last one smaller.

  Raises:
    errors.DataError: Two images differ only in their endings, which tables leave out.
  """
  paths: list[str] = []
  waiting: list[np.ndarray] = []

  def taken(size: int) -> Images:
    rows = np.concatenate(waiting)
    waiting[:] = [rows[size:]]
    part, paths[:] = paths[:size], paths[size:]
    files = base.files_of(rows[:size], part, origins=source.origins)
    return Images(part, files, rows[:size])

  for group in source.groups:
    _check_stems(group.paths)
    paths += group.paths
    waiting.append(group.rows)
    while len(paths) >= IMAGES_A_PART:
      yield taken(IMAGES_A_PART)
  if paths:
    yield taken(len(paths))


def _check_stems(paths: Iterable[str]) -> None:
  """Raises DataError where a row of a table would stand for two images."""
  path_of: dict[str, str] = {}
  for path in paths:
    stem = tables.without_suffix(path)
    if stem in path_of:
      raise errors.DataError(
        f"{path_of[stem]} and {path} would have the same row in the table of "
        "landmarks, which names no endings; rename or remove one."
      )
    path_of[stem] = path


@dataclasses.dataclass
class Survey:
  """The images of a source, and which of its parts are finished.

  Attributes:
    num_images: All images.
    num_parts: All parts.
    finished: Numbers of the finished parts.
    num_done: Images of the finished parts.
    num_unreadable: Images of the finished parts that could not be decoded.
  """

  num_images: int = 0
  num_parts: int = 0
  finished: set[int] = dataclasses.field(default_factory=set)
  num_done: int = 0
  num_unreadable: int = 0


def survey(parts: Iterable[Images], folder: str) -> Survey:
  """Counts the images and finds the parts of `folder` that are finished.

  Raises:
    errors.DataError: A part's file is corrupt.
  """
  existing = set(storage.list_names(folder))
  result = Survey()
  for number, part in enumerate(parts):
    result.num_images += len(part.paths)
    result.num_parts += 1
    if part_name(number) not in existing:
      continue
    done = read_part(storage.join(folder, part_name(number)))
    if [outcome.path for outcome in done] == part.paths:
      result.finished.add(number)
      result.num_done += len(done)
      result.num_unreadable += sum(not outcome.is_readable for outcome in done)
  return result


def find_in_parts(
  parts: Iterable[Images],
  *,
  folder: str,
  finished: Collection[int],
  settings: FindSettings,
  num_processes: int,
) -> Generator[list[Outcome], None, None]:
  """Yields what was found, some images at a time, and writes each part that is done.

  Args:
    parts: From `parts_of`.
    folder: Where the parts' files lie, local or in a bucket.
    finished: Numbers of the parts to leave out.
    settings: How to find faces.
    num_processes: Processes to use.
  """
  waiting: collections.deque[tuple[int, int]] = collections.deque()  # number, images

  def tasks() -> Iterator[tuple[Images, FindSettings]]:
    for number, part in enumerate(parts):
      if number not in finished:
        waiting.append((number, len(part.paths)))
        for images in part.cut(_IMAGES_A_TASK):
          yield images, settings

  done: list[Outcome] = []
  found = parallel.ordered_map(find, tasks(), num_processes=num_processes)
  with contextlib.closing(found):
    for outcomes in found:
      done += outcomes
      yield outcomes
      if len(done) == waiting[0][1]:
        number, _ = waiting.popleft()
        lines = (json.dumps(dataclasses.asdict(one)) + "\n" for one in done)
        path = storage.join(folder, part_name(number))
        storage.write_bytes(path, "".join(lines).encode())
        done = []


def part_name(number: int) -> str:
  """Returns the name of a part's file."""
  return f"part-{number:06d}.jsonl"


def read_part(path: str) -> list[Outcome]:
  """Returns what was found in a finished part.

  Raises:
    errors.DataError: The file is not what this module writes.
  """
  try:
    lines = storage.read_bytes(path).decode().splitlines()
    return [Outcome(**json.loads(line)) for line in lines]
  except (ValueError, TypeError) as error:
    raise errors.DataError(
      f"{path} is corrupt ({error}); delete it, and its images are done again."
    ) from error


def find(task: tuple[Images, FindSettings]) -> list[Outcome]:
  """Finds the face of each image; runs in a process that keeps its detector."""
  images, settings = task
  finder = _finder(settings.detector)
  sources = base.read_all(images.files, images.rows)
  return [
    _find_in(path, source, finder, settings)
    for path, source in zip(images.paths, sources, strict=True)
  ]


@functools.lru_cache(maxsize=1)
def _finder(settings: face_detection.DetectorSettings) -> face_detection.FaceFinder:
  """Loads the detector, once a process."""
  return face_detection.load(settings)


def _find_in(
  path: str,
  source: base.Image,
  finder: face_detection.FaceFinder,
  settings: FindSettings,
) -> Outcome:
  """Finds the face of one image and writes it aligned, if that is wanted."""
  if isinstance(source, errors.DataError):
    return Outcome(path, reason=str(source), is_readable=False)
  try:
    image = decoding.decode(source)
  except errors.DataError as error:
    return Outcome(path, reason=str(error), is_readable=False)
  try:
    face, count = finder.find(image)
    # Rounded as in the table, so that the builder cuts the same image from it.
    landmarks = np.round(face.landmarks.astype(np.float64), _DECIMALS)
    rounded = dataclasses.replace(face, landmarks=landmarks.astype(np.float32))
    pixels = face_detection.align(image, rounded, size=settings.face.size)
  except face_detection.NoFaceError as error:
    return Outcome(path, reason=str(error))
  if settings.images_dir is not None:
    encoded = alignment.encode(pixels, quality=settings.face.quality)
    name = f"{tables.without_suffix(path)}.jpg"
    storage.write_bytes(storage.join(settings.images_dir, name), encoded)
  box = [round(float(value)) for value in face.box]
  return Outcome(path, landmarks.ravel().tolist(), box, count)


def compare(found: str, reference: str, *, without: Iterable[str]) -> dict[str, Any]:
  """Compares two tables of landmarks.

  The distance of an image is the mean distance of its five points, in pixels of the
  image of 112 x 112 that the reference's landmarks align.

  Args:
    found: CSV of landmarks.
    reference: CSV of landmarks that it is measured against; kept in memory.
    without: Names of the images that were looked at and are not in `found`.

  Returns:
    images (in both), median_pixels, p90_pixels, not_found (share, of the images looked
    at that the reference has, of those without a face) and only_found (images with a
    face that the reference lacks).

  Raises:
    errors.DataError: A table is malformed, or no image is in both.
  """
  known = {
    name: np.frombuffer(numbers, np.float32).reshape(5, 2)
    for name, _, numbers in tables.numbers_of(reference, tables.LANDMARK_COLUMNS)
  }
  distances = []
  only_found = 0
  for name, _, numbers in tables.numbers_of(found, tables.LANDMARK_COLUMNS):
    if name not in known:
      only_found += 1
      continue
    warp = alignment.warp_to_template(known[name], size=alignment.TEMPLATE_SIZE)
    offsets = np.frombuffer(numbers, np.float32).reshape(5, 2) - known[name]
    distances.append(np.linalg.norm(offsets @ warp[:, :2].T, axis=1).mean())
  if not distances:
    raise errors.DataError(
      f"{found} and {reference} have no image in common; compare tables of one folder."
    )
  missed = sum(1 for name in without if name in known)
  return {
    "images": len(distances),
    "median_pixels": round(float(np.median(distances)), 3),
    "p90_pixels": round(float(np.percentile(distances, 90)), 3),
    "not_found": round(missed / (missed + len(distances)), 5),
    "only_found": only_found,
  }
