"""The source images' bytes: files of their own, or parts of an archive.

The source images, an identity at a time: what readers hand to the planner.

A data set's reader yields `Group`s in the order of their paths. Whatever looks up,
selects or merges images is a generator from groups to groups, so that memory holds one
identity's images however many there are.
"""

import concurrent.futures
import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import align
from tfrecords_tools.sources import tables

MISSING_ROW = ("skip", "crop", "fail")
"""What to do with an image that the landmarks, or boxes, have no row for."""
LANDMARK_FILES = ("loose_landmark_{}.csv", "bb_landmark/loose_landmark_{}.csv")
BOX_FILES = ("loose_bb_{}.csv", "bb_landmark/loose_bb_{}.csv")
WHOLE = 2**64 - 1
"""Length of an image that is a file of its own."""
ROW_DTYPE = np.dtype(
  [
    ("key", "<u8"),  # the planner's: images of a split lie in its order
    ("start", "<u8"),  # byte of the origin at which the image lies; of a WHOLE one,
    # letters of its path, a label's, that are not part of the file's name
    ("length", "<u8"),  # bytes of the image there; or WHOLE
    ("origin", "<u4"),  # place in `Source.origins`
    ("label", "<i4"),  # the planner's
    ("place", "u1"),  # faces.Place
    ("geometry", "<f4", (tables.LANDMARK_COLUMNS,)),  # landmarks or box, by `place`
  ]
)
MOST_SKIPPED = 1_000_000  # images without a row: the manifest names each
_HOPELESS = 1_000_000  # images without a row, before any with one, to give up after


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
  """Images and what is known of them as a whole.

  Attributes:
    folder: What the user named, for messages.
    groups: All images in ascending order of identity + '/', each identity once; may be
      taken once. What follows is complete when they have been.
    origins: Folders that `paths` start from, or archives that images lie in.
    skipped: `path` and `reason` of each image that the tables leave out.
    excluded: Identities that were left out on demand.
    left_out: How many images other rules left out, by rule.
    identity_names: Names of people by folder name, where known.
    pairs: int32[pairs, 4] of first, second (numbers of images), same, fold; or none.
    num_folds: Folds of `pairs`.
    contents: The images themselves by `start`, where they lie in memory; or none.
    explain_broken: Where a set may lack no image: makes an unreadable image's path and
      the reason into the error's text. None where images may be skipped.
    is_held_out: Says of a path whether the set itself holds the image out, for val; or
      none, where the plan chooses.
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
  contents: Sequence[bytes] | None = None
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
  """Returns a group of whose faces nothing is known yet."""
  rows = np.zeros(len(paths), ROW_DTYPE)
  rows["origin"], rows["start"], rows["length"] = origins, starts, lengths
  rows["place"] = align.Place.UNKNOWN
  return IdentityGroup(identity, paths, rows)


def identity_of(path: str) -> str:
  """Returns the identity's folder of an image's path."""
  return path.partition("/")[0]


def locate(
  groups: Iterable[IdentityGroup],
  *,
  landmarks: str | None,
  bounding_boxes: str | None,
  missing_row: str,
  skipped: list[dict[str, str]],
  scratch_dir: str | None = None,
) -> Iterator[IdentityGroup]:
  """Looks each image up in the landmarks and in the face boxes.

  The landmarks, where there are any, decide; without them the boxes do; with neither
  every face is cut from the centre.

  Args:
    groups: The images.
    landmarks: CSV of five landmarks an image, or none.
    bounding_boxes: CSV of a face box an image, or none.
    missing_row: One of MISSING_ROW, for an image without a row in the table that
      decides; 'crop' falls back to its box, then to the centre.
    skipped: Gets `path` and `reason` of those left out.
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
    fills.append(_Fill(table, align.Place.BOX))
  if landmarks:
    table = tables.SortedTable(landmarks, tables.LANDMARK_COLUMNS, scratch_dir)
    fills.append(_Fill(table, align.Place.LANDMARKS))
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
  """Writes a table's rows over what is known of the images that it has."""

  def __init__(self, table: tables.SortedTable, place: align.Place) -> None:
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
    if not self._found and self._missed > _HOPELESS:
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
    """Returns the group without those left out; none if none is left."""
    missing = group.rows["place"] == align.Place.UNKNOWN
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
    if len(self._skipped) > MOST_SKIPPED:
      raise errors.DataError(
        f"{self._deciding} has no row for more than {MOST_SKIPPED:,} images, such as "
        f"{self._first}, and the manifest would name each; leave them out of "
        "--input_list, or let --missing_row=crop crop them."
      )

  def check(self) -> None:
    """Raises DataError if one had none and the rule is to fail."""
    if self._count and self._rule == "fail":
      raise errors.DataError(
        f"{self._deciding} has no row for {self._count} images, such as "
        f"{self._first}; add the rows, or let --missing_row=skip leave such images "
        "out or --missing_row=crop crop them."
      )


THREADS = 32
"""Images that a process asks a bucket for at a time."""

Image = bytes | errors.DataError
"""An image's file, or the reason why it cannot be read."""


def files_of(
  rows: np.ndarray, paths: Sequence[str], *, origins: Sequence[str]
) -> list[str]:
  """Returns the file that each image lies in.

  Args:
    rows: source.ROW_DTYPE[images].
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

  Those of a bucket are asked for many at a time, so that its latency counts once.

  Args:
    files: The file that each lies in.
    rows: source.ROW_DTYPE[images]: where in it.

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
  """Reads an image from a disk; an error has the system's words."""
  try:
    with open(image_names.on_disk(path), "rb", buffering=0) as stream:
      if length == WHOLE:
        return stream.readall()
      content = os.pread(stream.fileno(), length, start)
  except OSError as error:
    return errors.DataError(error.strerror or "it cannot be read")
  return content if len(content) == length else errors.DataError("it is cut off")
