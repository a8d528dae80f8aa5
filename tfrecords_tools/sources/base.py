"""What every reader of a data set yields, how faces are looked up, how files are read.

A reader yields an `IdentityGroup` for each identity, in the order of their paths.
Code that looks up, selects or merges images is a generator from groups to groups, so
memory holds one identity's images, however many there are.
"""

import concurrent.futures
import dataclasses
import errno
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from facedist import errors, storage
from facedist.data import alignment, image_names
from tfrecords_tools import external_sort
from tfrecords_tools.sources import tables

MISSING_ROW = ("skip", "crop", "fail")
"""What to do with an image that the landmarks, or boxes, have no row for."""
LANDMARK_FILES = ("loose_landmark_{}.csv", "bb_landmark/loose_landmark_{}.csv")
BOX_FILES = ("loose_bb_{}.csv", "bb_landmark/loose_bb_{}.csv")
WHOLE = 2**64 - 1
"""Length of an image that is a file of its own."""
ROW_DTYPE = np.dtype(
  [
    ("key", "<u8"),  # set by the planner: images of a split are sorted by it
    ("start", "<u8"),  # first byte of the image in its origin; of a WHOLE one, the
    # letters of its path that are a label, not part of the file's name
    ("length", "<u8"),  # bytes of the image; or WHOLE
    ("origin", "<u4"),  # index in `Source.origins`
    ("label", "<i4"),  # set by the planner
    ("place", "u1"),  # alignment.Place
    ("geometry", "<f4", (tables.LANDMARK_COLUMNS,)),  # landmarks or box, by `place`
  ]
)
MAX_SKIPPED = 1_000_000  # images without a row: the manifest names each
_MAX_MISSED = 1_000_000  # images without a row, before any with one, to give up after


@dataclasses.dataclass(frozen=True)
class IdentityGroup:
  """An identity's images.

  Attributes:
    identity: Its folder's name.
    paths: identity/image, sorted, each once; an image that has its identity from a
      list's label may lie deeper.
    rows: ROW_DTYPE[images]: where each image and the face in it lie.
  """

  identity: str
  paths: list[str]
  rows: np.ndarray

  def take(self, kept: np.ndarray) -> "IdentityGroup":
    """Returns the group of the images at these places, or where `kept` is true."""
    places = np.arange(len(self.paths))[kept]
    paths = [self.paths[place] for place in places.tolist()]
    return IdentityGroup(self.identity, paths, self.rows[places])


@dataclasses.dataclass
class Source:
  """The images of a data set, and what is known of them as a whole.

  Attributes:
    folder: What the user named, for messages.
    groups: All images in ascending order of identity + '/', each identity once; may be
      iterated once. The attributes below are complete afterwards.
    origins: Folders that `paths` start from, or archives that images lie in.
    skipped: `path` and `reason` of each image that the tables leave out.
    excluded: Identities that --exclude_identities left out.
    left_out: How many images other rules left out, by rule.
    identity_names: Names of people by folder name, where known.
    pairs: int32[pairs, 4] of first, second (numbers of images), same, fold; or none.
    num_folds: Folds of `pairs`.
    pairs_csv: The pairs as a CSV file for other tools, where the build drew them.
    contents: The images themselves by `start`, where they lie in memory; or none.
    unwrap: Makes the image's file of the bytes at its place, or raises DataError; None
      where they are the file.
    explain_broken: Makes an error message of an unreadable image's path and the reason,
      where the set needs every image. None where images may be skipped.
    is_held_out: Says of a path whether the set itself holds the image out for val; None
      where the plan chooses.
  """

  folder: str
  groups: Iterable[IdentityGroup]
  origins: list[str]
  skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
  excluded: list[str] = dataclasses.field(default_factory=list)
  left_out: dict[str, int] = dataclasses.field(default_factory=dict)
  identity_names: dict[str, str] = dataclasses.field(default_factory=dict)
  pairs: np.ndarray | None = None
  num_folds: int = 0
  pairs_csv: bytes | None = None
  contents: Sequence[bytes] | None = None
  unwrap: Callable[[bytes], bytes] | None = None
  explain_broken: Callable[[str, str], str] | None = None
  is_held_out: Callable[[str], bool] | None = None


def new_group(
  identity: str,
  paths: list[str],
  *,
  origins: int | Sequence[int] = 0,
  starts: int | Sequence[int] = 0,
  lengths: int | Sequence[int] = WHOLE,
) -> IdentityGroup:
  """Returns a group without anything known about its faces."""
  rows = np.zeros(len(paths), ROW_DTYPE)
  rows["origin"], rows["start"], rows["length"] = origins, starts, lengths
  rows["place"] = alignment.Place.UNKNOWN
  return IdentityGroup(identity, paths, rows)


def name_of_label(label: str | int) -> str:
  """Returns the identity's name of a label; a number gets seven digits.

  Sorted names are then in the order of the numbers, which the build keeps as labels.
  """
  text = str(label)
  is_number = text.isdecimal() and text.isascii()
  return f"{int(text):07d}" if is_number else text


def identity_of(path: str) -> str:
  """Returns the identity's folder of an image's path."""
  return path.partition("/")[0]


def by_identity(
  records: Iterable[external_sort.Record],
  numbers: struct.Struct,
  origins: Sequence[str],
) -> Iterator[tuple[str, list[str], list[tuple[Any, ...]]]]:
  """Groups sorted records into identity, paths and each path's unpacked numbers.

  Args:
    records: Sorted (path, packed numbers); the first number is the path's origin.
    numbers: How they are packed.
    origins: Folders or archives by number, for the error.

  Raises:
    errors.DataError: A path comes twice.
  """
  before, place_before = "", (0,)

  def unpacked() -> Iterator[tuple[str, tuple[Any, ...]]]:
    nonlocal before, place_before
    for encoded, packed in records:
      path, place = encoded.decode(), numbers.unpack(packed)
      if path == before:
        raise errors.DataError(
          f"{path} comes twice, in {origins[place_before[0]]} and in "
          f"{origins[place[0]]}; keep one, or rename an identity."
        )
      before, place_before = path, place
      yield path, place

  for identity, group in itertools.groupby(
    unpacked(), key=lambda found: identity_of(found[0])
  ):
    paths, places = zip(*group, strict=True)
    yield identity, list(paths), list(places)


def check_folder(folder: str) -> None:
  """Raises DataError unless it is a local folder."""
  if not os.path.isdir(folder):
    raise errors.DataError(f"--input_dir={folder} is no folder; check the path.")


def locate(
  groups: Iterable[IdentityGroup],
  *,
  landmarks: str | None,
  bounding_boxes: str | None,
  missing_row: str,
  skipped: list[dict[str, str]],
  scratch_dir: str | None = None,
) -> Iterator[IdentityGroup]:
  """Looks up each image's face in the landmarks and in the face boxes.

  The landmarks decide; without a file of them the boxes do; without either, every face
  is cut from the centre.

  Args:
    groups: The images.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    missing_row: One of MISSING_ROW, for an image without a row in the table that
      decides; 'crop' falls back to its box, then to the centre.
    skipped: `path` and `reason` of each image that is left out are appended.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: No image has a row, or one has none and `missing_row` is 'fail'.
  """
  deciding = landmarks or bounding_boxes
  if deciding is None:
    yield from groups
    return
  fills = []
  if bounding_boxes and (missing_row == "crop" or not landmarks):
    table = tables.SortedTable(bounding_boxes, tables.BOX_COLUMNS, scratch_dir)
    fills.append(_Fill(table, alignment.Place.BOX))
  if landmarks:
    table = tables.SortedTable(landmarks, tables.LANDMARK_COLUMNS, scratch_dir)
    fills.append(_Fill(table, alignment.Place.LANDMARKS))
  rule = _Missing(deciding, missing_row, skipped=skipped)
  for group in groups:
    for fill in fills:
      fill.apply(group)
    if kept := rule.apply(group):
      yield kept
  for fill in fills:
    fill.check()
  rule.check()


class _Fill:
  """Writes a table's rows over what other tables said of the same images."""

  def __init__(self, table: tables.SortedTable, place: alignment.Place) -> None:
    self._table, self._place = table, place
    self._found = self._missed = 0
    self._first = ""

  def apply(self, group: IdentityGroup) -> None:
    """Looks up an identity's images."""
    row_of, values = self._table.of(group.identity)
    stems = (tables.without_suffix(path) for path in group.paths)
    rows = np.array([row_of.get(stem, -1) for stem in stems], np.int64)
    has_row = rows >= 0
    found = int(np.count_nonzero(has_row))
    self._found += found
    self._missed += len(rows) - found
    self._first = self._first or group.paths[0]
    if not self._found and self._missed > _MAX_MISSED:
      self.check()
    if not found:
      return
    geometry = np.zeros((found, tables.LANDMARK_COLUMNS), np.float32)
    geometry[:, : values.shape[1]] = values[rows[has_row]]
    group.rows["place"][has_row] = self._place
    group.rows["geometry"][has_row] = geometry

  def check(self) -> None:
    """Raises DataError if not one image had a row."""
    if self._missed and not self._found:
      raise errors.DataError(
        f"{self._table.origin} has no row for any of the {self._missed} images, such "
        f"as {self._first}; give the file that belongs to this folder, or say none."
      )


class _Missing:
  """Applies the rule for images that no table has a row for."""

  def __init__(
    self, deciding: str, missing_row: str, *, skipped: list[dict[str, str]]
  ) -> None:
    self._deciding, self._rule, self._skipped = deciding, missing_row, skipped
    self._reason = f"no row in {deciding.rpartition('/')[2]}"
    self._count, self._first = 0, ""

  def apply(self, group: IdentityGroup) -> IdentityGroup | None:
    """Returns the group without those left out; None if none is left."""
    missing = group.rows["place"] == alignment.Place.UNKNOWN
    if self._rule == "crop" or not missing.any():
      return group
    left_out = list(itertools.compress(group.paths, missing.tolist()))
    self._count += len(left_out)
    self._first = self._first or left_out[0]
    if self._rule == "skip":
      self._skipped += [{"path": path, "reason": self._reason} for path in left_out]
      self._check_number()
    return None if missing.all() else group.take(~missing)

  def _check_number(self) -> None:
    """Raises DataError if more are left out than can be named."""
    if len(self._skipped) > MAX_SKIPPED:
      raise errors.DataError(
        f"{self._deciding} has no row for more than {MAX_SKIPPED:,} images, such as "
        f"{self._first}, and the manifest would name each; leave them out of "
        "--input_list, or let --missing_row=crop crop them."
      )

  def check(self) -> None:
    """Raises DataError if an image had no row and the rule is to fail."""
    if self._count and self._rule == "fail":
      raise errors.DataError(
        f"{self._deciding} has no row for {self._count} images, such as "
        f"{self._first}; add the rows, let --missing_row=crop crop such images or, "
        "unless they are in a list of pairs, --missing_row=skip leave them out."
      )


THREADS = 32
"""Requests that a process has open to a bucket at a time."""

Image = bytes | errors.DataError
"""An image's file, or the reason why it cannot be read."""


def files_of(
  rows: np.ndarray, paths: Sequence[str], *, origins: Sequence[str]
) -> list[str]:
  """Returns the file that each image lies in.

  Args:
    rows: ROW_DTYPE[images].
    paths: identity/image.
    origins: Folders and archives by `origin`.
  """
  places = [origins[number] for number in rows["origin"].tolist()]
  whole = (rows["length"] == WHOLE).tolist()
  starts = rows["start"].tolist()
  return [
    f"{place}/{path[start:]}" if is_file else place
    for place, path, start, is_file in zip(places, paths, starts, whole, strict=True)
  ]


def read_all(files: Sequence[str], rows: np.ndarray) -> list[Image]:
  """Returns each image's file, or the reason why it cannot be read.

  Requests to a bucket run in parallel, so its latency counts once.

  Args:
    files: The file that each image lies in.
    rows: ROW_DTYPE[images]: where in it.

  Raises:
    errors.FacedistError: The bucket cannot be read at all.
  """
  places = (files, rows["start"].tolist(), rows["length"].tolist())
  if not any(map(storage.is_bucket, files)):
    return list(map(_read_local, *places))
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(_read, *places))


def _read(path: str, start: int, length: int) -> Image:
  """Reads an image wherever it lies."""
  if not storage.is_bucket(path):
    return _read_local(path, start, length)
  if length != WHOLE:
    return storage.read_range(path, start, length)
  try:
    return storage.read_bytes(path)
  except errors.DataError:
    if storage.exists(path):
      raise
    return errors.DataError(os.strerror(errno.ENOENT))


def _read_local(path: str, start: int, length: int) -> Image:
  """Reads an image from a disk; an error has the operating system's text."""
  try:
    with open(image_names.on_disk(path), "rb", buffering=0) as stream:
      if length == WHOLE:
        return stream.readall()
      content = os.pread(stream.fileno(), length, start)
  except OSError as error:
    return errors.DataError(error.strerror or "it cannot be read")
  return content if len(content) == length else errors.DataError("it is cut off")
