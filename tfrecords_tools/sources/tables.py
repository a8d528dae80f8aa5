"""The text files beside the images: tables of landmarks, boxes and names, and lists."""

import array
import contextlib
import csv
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort

NONE = "none"
"""Value of a flag that ignores such a file, even beside the images."""
LANDMARK_COLUMNS = 10
BOX_COLUMNS = 4
_LINE_BYTES = 8
_SHOWN_LETTERS = 200
_NAME_COLUMNS = (
  *("nameid", "imageid", "filename", "filepath", "path", "imagepath", "imagename"),
  *("file", "image", "img", "name"),
)
_POINTS = (
  ("lefteye", "eyeleft", "leye"),
  ("righteye", "eyeright", "reye"),
  ("nose", "nosetip"),
  ("leftmouth", "mouthleft", "lmouth", "leftmouthcorner", "mouthleftcorner"),
  ("rightmouth", "mouthright", "rmouth", "rightmouthcorner", "mouthrightcorner"),
)
_LEFT, _TOP = ("x", "left", "xmin", "x1", "bboxx"), ("y", "top", "ymin", "y1", "bboxy")
_WIDTH, _HEIGHT = ("w", "width", "bboxw"), ("h", "height", "bboxh")
_RIGHT, _BOTTOM = ("right", "xmax", "x2"), ("bottom", "ymax", "y2")


def _point_columns(first: int) -> list[tuple[str, ...]]:
  """Returns known names of the landmarks' columns, with points counted from `first`."""
  return [
    tuple(
      name
      for stem in (
        *(f"{kind}{first + place}" for kind in ("p", "point", "pt", "landmark", "lm")),
        *(str(first + place), f"landmarks{first + place}", f"kp{first + place}"),
        *named,
      )
      for name in (f"{stem}{axis}", f"{axis}{stem}")
    )
    for place, named in enumerate(_POINTS)
    for axis in "xy"
  ]


_KNOWN_COLUMNS: dict[int, tuple[tuple[list[tuple[str, ...]], bool], ...]] = {
  LANDMARK_COLUMNS: ((_point_columns(1), False), (_point_columns(0), False)),
  BOX_COLUMNS: (
    ([_LEFT, _TOP, _WIDTH, _HEIGHT], False),
    ([_LEFT, _TOP, _RIGHT, _BOTTOM], True),
  ),
}
_EXPECTED_COLUMNS = {
  LANDMARK_COLUMNS: "NAME_ID and P1X,P1Y to P5X,P5Y, or x1,y1 to x5,y5, or lefteye_x "
  "and the like (left and right as in the image)",
  BOX_COLUMNS: "NAME_ID and X,Y,W,H, or x1,y1,x2,y2",
}


def find_beside(
  images: str | None, given: str | None, *, flag: str, names: Sequence[str]
) -> str | None:
  """Returns the file a flag names or, without the flag, the one beside the images.

  Args:
    images: The folder of the images, such as .../train, or their tar file; or None.
    given: The flag's value; 'none' is no file.
    flag: The flag's name, for the error.
    names: Where to look below the parent of `images`, or below the bucket that `images`
      is; {} is replaced by its name.

  Raises:
    errors.DataError: The file that the flag names does not exist.
  """
  if given == NONE:
    return None
  if given is not None:
    if not storage.exists(given):
      raise errors.DataError(
        f"--{flag}={given} does not exist; check the path or say --{flag}={NONE}."
      )
    return given
  if images is None:
    return None
  if not storage.is_bucket(images):
    images = os.path.abspath(images)
  images = images.rstrip("/").removesuffix(".tar")
  parent, _, folder = images.rpartition("/")
  if f"{parent}/" == storage.BUCKET_PREFIX:  # the top of a bucket has no parent
    parent, names = images, [name.removeprefix("{}/") for name in names]
  candidates = (f"{parent}/{name.format(folder)}" for name in names)
  return next((path for path in candidates if storage.exists(path)), None)


class SortedTable:
  """A CSV of any length, sorted on disk, whose rows are read by identity in order.

  Args:
    origin: The file; rows in any order.
    columns: Numbers in a row.
    scratch_dir: See `external_sort.sorted_by_key`.
  """

  def __init__(self, origin: str, columns: int, scratch_dir: str | None = None) -> None:
    self.origin, self._columns = origin, columns
    records = (
      (name.encode(), line.to_bytes(_LINE_BYTES, "little") + numbers)
      for name, line, numbers in numbers_of(origin, columns)
    )
    ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
    self._groups = itertools.groupby(self._each_once(ordered), key=_folder_of)
    self._next = next(self._groups, None)

  def of(self, identity: str) -> tuple[dict[str, int], np.ndarray]:
    """Returns the rows of an identity's images.

    Args:
      identity: Sorts after the identities of earlier calls, by identity + '/'.

    Returns:
      The row of each image, by its path without suffix; and float32[rows, columns].

    Raises:
      errors.DataError: An image has two rows.
    """
    wanted = f"{identity}/".encode()
    while self._next is not None and self._next[0] < wanted:
      self._next = next(self._groups, None)
    found = [] if self._next is None or self._next[0] != wanted else self._next[1]
    row_of: dict[str, int] = {}
    content = bytearray()
    for name, numbers in found:
      row_of[name.decode()] = len(row_of)
      content += numbers[_LINE_BYTES:]
    return row_of, np.frombuffer(content, "<f4").reshape(-1, self._columns)

  def _each_once(
    self, records: Iterable[external_sort.Record]
  ) -> Iterator[external_sort.Record]:
    """Yields sorted records; DataError for the second one of an image."""
    before = None
    for record in records:
      if record[0] == before:
        line = int.from_bytes(record[1][:_LINE_BYTES], "little")
        raise repeated(self.origin, line, record[0].decode())
      before = record[0]
      yield record


def _folder_of(record: external_sort.Record) -> bytes:
  """Returns a record's identity with its slash; all of a name that has none."""
  folder, slash, _ = record[0].partition(b"/")
  return folder + slash


def numbers_of(path: str, columns: int) -> Iterator[tuple[str, int, bytes]]:
  """Yields image, line and the bytes of float32[columns] for each row of a CSV.

  A header gives the order of the columns (`_Columns`). Names may be quoted, padded and
  have an image's suffix.

  Raises:
    errors.DataError: A row is not such a row, or the header names other columns.
  """
  order = None
  with open_text(path) as stream:
    for line, row, _ in rows_of(stream, path):
      if line == 1 and not _is_number(row[-1]):
        order = _columns_of(row, columns, path=path)
        continue
      if order is not None and len(row) != order.count:
        raise errors.DataError(
          f"{path}, line {line}: {order.count} columns were expected, as in the first "
          f"line, not {shortened(','.join(row))!r}."
        )
      cells = row if order is None else [row[place] for place in order.places]
      name = without_suffix(cells[0].strip())
      if not name:
        raise errors.DataError(f"{path}, line {line}: the image's name is empty.")
      try:
        numbers = array.array("f", map(float, cells[1:]))
      except ValueError as error:
        raise errors.DataError(f"{path}, line {line}: {shortened(error)}.") from error
      if len(numbers) != columns:
        raise errors.DataError(
          f"{path}, line {line}: a name and {columns} numbers were "
          f"expected, not {shortened(','.join(row))!r}."
        )
      if not math.isfinite(sum(numbers)):
        raise errors.DataError(f"{path}, line {line}: {name} has no finite numbers.")
      if order is not None and order.are_corners:
        left, top, right, bottom = numbers
        numbers = array.array("f", (left, top, right - left, bottom - top))
      yield name, line, numbers.tobytes()


@dataclasses.dataclass(frozen=True)
class _Columns:
  """The columns that a table's header names.

  Attributes:
    count: Number of all columns.
    places: Indexes of the name's column, then of each number's.
    are_corners: Whether a box's last two numbers are its right and its bottom.
  """

  count: int
  places: tuple[int, ...]
  are_corners: bool = False


def _columns_of(header: Sequence[str], columns: int, *, path: str) -> _Columns:
  """Returns the columns that a header names.

  Raises:
    errors.DataError: It does not name each column that is needed.
  """
  found = [re.sub("[^a-z0-9]", "", column.lower()) for column in header]
  for names, are_corners in _KNOWN_COLUMNS.get(columns, ()):
    places = [_first_of(some, found) for some in names]
    if None in places or len(set(places)) < len(places):
      continue
    name = _first_of(_NAME_COLUMNS, found) or 0
    if name not in places:
      return _Columns(len(header), (name, *filter(_is_place, places)), are_corners)
  raise errors.DataError(
    f"{path}: the first line, {shortened(','.join(header))!r}, names no columns that "
    f"are known; name {_EXPECTED_COLUMNS.get(columns, 'them')}, or take the line out."
  )


def _is_place(place: int | None) -> TypeGuard[int]:
  """Says whether a column was found."""
  return place is not None


def _first_of(names: Sequence[str], found: Sequence[str]) -> int | None:
  """Returns the index of the first name that is found; None if none is."""
  return next((found.index(name) for name in names if name in found), None)


def _is_number(text: str) -> bool:
  """Says whether the text is a number."""
  try:
    float(text)
  except ValueError:
    return False
  return True


def read_identity_names(path: str) -> dict[str, str]:
  """Reads identity_meta.csv: the name of the person by folder name.

  Raises:
    errors.DataError: There is no column Class_ID or Name, or a row lacks one.
  """
  with open_text(path) as stream:
    rows = rows_of(stream, path)
    header = [column.strip() for column in next(rows, (1, [], ""))[1]]
    if not {"Class_ID", "Name"} <= set(header):
      raise errors.DataError(
        f"{path} has no columns Class_ID and Name in its first line; give VGGFace2's "
        f"identity_meta.csv or say --identity_meta={NONE}."
      )
    folder, name = header.index("Class_ID"), header.index("Name")
    names = {}
    for line, row, text in rows:
      row = _with_whole_name(row, text, name=name, count=len(header))
      if len(row) <= max(folder, name):
        raise errors.DataError(f"{path}, line {line}: a column is missing.")
      identity = row[folder].strip()
      if identity in names:
        raise repeated(path, line, identity)
      names[identity] = row[name].strip()
    return names


def _with_whole_name(row: list[str], text: str, *, name: int, count: int) -> list[str]:
  """Joins a name that was cut at commas without quotes, and returns the row."""
  while len(row) > count and not row[-1].strip():
    row = row[:-1]
  end = name + 1 + len(row) - count
  if end <= name + 1:
    return row
  cells = text.split(",")  # with the blanks after the commas, unless there are quotes
  whole = ",".join((row if '"' in text else cells)[name:end])
  return [*row[:name], whole, *row[end:]]


def read_renamings(path: str) -> dict[str, str]:
  """Reads a CSV with a name and its new name in each line, without a header.

  Raises:
    errors.DataError: A line is not two names, or a name has two lines.
  """
  renamed: dict[str, str] = {}
  with open_text(path) as stream:
    for line, row, _ in rows_of(stream, path):
      names = [name.strip() for name in row]
      if len(names) != 2 or not all(names) or names[0] in renamed:
        raise errors.DataError(
          f"{path}, line {line}: {shortened(','.join(row))!r} must be a name and its "
          "new name, once for each name."
        )
      renamed[names[0]] = names[1]
  return renamed


def rows_of(stream: Iterator[str], path: str) -> Iterator[tuple[int, list[str], str]]:
  """Yields line, row and text of a CSV's rows that are not empty.

  Raises:
    errors.DataError: A row spans several lines, or is malformed.
  """
  line, text = 0, ""

  def watched() -> Iterator[str]:
    nonlocal text
    # The extra line ends a quote that is still open in the file's last line.
    for text in itertools.chain(stream, ("\n",)):  # noqa: UP028 - keeps the text
      yield text

  reader = csv.reader(watched(), skipinitialspace=True)
  while True:
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise errors.DataError(
        f"{path}, line {line + 1}: not a CSV file ({error}); look for a quote that is "
        "not closed."
      ) from error
    if row is None:
      return
    if reader.line_num > line + 1:
      raise errors.DataError(
        f"{path}, line {line + 1}: a quote is not closed in its line; close it, or "
        "take line breaks out of the field."
      )
    line = reader.line_num
    if row:
      yield line, row, text


def repeated(path: str, line: int, name: str) -> errors.DataError:
  """Returns the error for an image's second row."""
  return errors.DataError(f"{path}, line {line}: {name} has a row already; keep one.")


def read_lines(path: str) -> list[str]:
  """Returns a text file's lines, stripped, without empty lines and # comments."""
  return list(lines_of(path))


def lines_of(path: str, *, escape: bool = False) -> Iterator[str]:
  """Yields what `read_lines` returns; see `storage.open_lines` for `escape`."""
  return (text for _, text in numbered_lines(path, escape=escape))


def numbered_lines(path: str, *, escape: bool = False) -> Iterator[tuple[int, str]]:
  """Yields what `lines_of` yields, each with its line number, from 1."""
  with open_text(path, escape=escape) as stream:
    for number, line in enumerate(stream, 1):
      text = line.strip()
      if text and not text.startswith("#"):
        yield number, text


@contextlib.contextmanager
def open_text(path: str, *, escape: bool = False) -> Iterator[Iterator[str]]:
  """Opens a text file, local or in a bucket, as lines; UTF-8, with or without a mark.

  Raises:
    errors.DataError: It is missing, no file, not text, or has a line above 1 MiB.
  """
  try:
    lines = storage.open_lines(path, escape=escape)
    yield itertools.chain((next(lines, "").removeprefix("\ufeff"),), lines)
  except OSError as error:
    raise errors.DataError(f"{path} cannot be read ({error.strerror}).") from error


def without_suffix(name: str) -> str:
  """Returns an image's path without .jpg and the like, in any case."""
  return name.rpartition(".")[0] if image_names.has_image_ending(name) else name


def shortened(value: object) -> str:
  """Cuts a text for an error message; it may be a whole file in one line."""
  text = str(value)
  return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
