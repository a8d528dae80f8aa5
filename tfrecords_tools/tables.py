"""The tables beside the images: landmarks, face boxes, names, lists."""

import array
import contextlib
import csv
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from facedist import errors, storage
from facedist.data import image_names

NONE = "none"
"""Flag value that says: do not even look for such a file."""
LANDMARK_COLUMNS = 10
BOX_COLUMNS = 4
_SHOWN_LETTERS = 200


def find_beside(
  images: str | None, given: str | None, *, flag: str, names: Sequence[str]
) -> str | None:
  """Returns the file a flag names or, without the flag, the one beside the images.

  Args:
    images: The folder of the images, such as .../train, or their tar file; or none.
    given: The flag's value; 'none' is no file.
    flag: The flag's name, for the error.
    names: Where to look, from the parent of `images`, or from the top of the bucket
      that is `images`; {} is its name.

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


def numbers_of(path: str, columns: int) -> Iterator[tuple[str, int, bytes]]:
  """Yields image, line and float32[columns] as bytes of each row of a CSV.

  There may be a header. Names may be quoted, padded and have an image's suffix.

  Raises:
    errors.DataError: A row is not such a row.
  """
  is_first = True
  with open_text(path) as stream:
    reader = csv.reader(stream, skipinitialspace=True)
    for row in _rows(reader, path):
      if not row or (is_first and reader.line_num == 1 and not _is_number(row[-1])):
        continue
      is_first = False
      name = without_suffix(row[0].strip())
      if not name:
        raise errors.DataError(
          f"{path}, line {reader.line_num}: the image's name is empty."
        )
      try:
        numbers = array.array("f", map(float, row[1:]))
      except ValueError as error:
        raise errors.DataError(
          f"{path}, line {reader.line_num}: {shortened(error)}."
        ) from error
      if len(numbers) != columns:
        raise errors.DataError(
          f"{path}, line {reader.line_num}: a name and {columns} numbers were "
          f"expected, not {shortened(','.join(row))!r}."
        )
      if not math.isfinite(sum(numbers)):
        raise errors.DataError(
          f"{path}, line {reader.line_num}: {name} has no finite numbers."
        )
      yield name, reader.line_num, numbers.tobytes()


def _rows(reader: Any, path: str) -> Iterator[list[str]]:
  """Yields a CSV's rows; DataError for one that goes over several lines."""
  before = reader.line_num
  for row in reader:
    if reader.line_num > before + 1:
      raise errors.DataError(
        f"{path}, line {before + 1}: a quote is not closed in its line; close it, or "
        "take line breaks out of the field."
      )
    before = reader.line_num
    yield row


def repeated(path: str, line: int, name: str) -> errors.DataError:
  """Returns the error for an image's second row."""
  return errors.DataError(f"{path}, line {line}: {name} has a row already; keep one.")


def read_identity_names(path: str) -> dict[str, str]:
  """Reads identity_meta.csv: the name of the person by folder name.

  Raises:
    errors.DataError: There is no column Class_ID or Name, or a row lacks one.
  """
  with open_text(path) as stream:
    reader = csv.reader(stream, skipinitialspace=True)
    header = [column.strip() for column in next(reader, [])]
    if not {"Class_ID", "Name"} <= set(header):
      raise errors.DataError(
        f"{path} has no columns Class_ID and Name in its first line; give VGGFace2's "
        f"identity_meta.csv or say --identity_meta={NONE}."
      )
    folder, name = header.index("Class_ID"), header.index("Name")
    names = {}
    for row in filter(None, _rows(reader, path)):
      if len(row) <= max(folder, name):
        raise errors.DataError(f"{path}, line {reader.line_num}: a column is missing.")
      identity = row[folder].strip()
      if identity in names:
        raise errors.DataError(
          f"{path}, line {reader.line_num}: {identity} has a row already; keep one."
        )
      names[identity] = row[name].strip()
    return names


def read_renamings(path: str) -> dict[str, str]:
  """Reads a CSV of a name and its new name a line, without a header.

  Raises:
    errors.DataError: A line is not two names, or a name has two lines.
  """
  renamed: dict[str, str] = {}
  with open_text(path) as stream:
    reader = csv.reader(stream, skipinitialspace=True)
    for row in filter(None, _rows(reader, path)):
      names = [name.strip() for name in row]
      if len(names) != 2 or not all(names) or names[0] in renamed:
        raise errors.DataError(
          f"{path}, line {reader.line_num}: {shortened(','.join(row))!r} must be a "
          "name and its new name, once for each name."
        )
      renamed[names[0]] = names[1]
  return renamed


def read_lines(path: str) -> list[str]:
  """Returns a text file's lines without padding, empty lines and # comments."""
  return list(lines_of(path))


def lines_of(path: str, *, escape: bool = False) -> Iterator[str]:
  """Yields what `read_lines` returns; see `storage.open_lines` for `escape`."""
  return (text for _, text in numbered_lines(path, escape=escape))


def numbered_lines(path: str, *, escape: bool = False) -> Iterator[tuple[int, str]]:
  """Yields what `lines_of` yields, each with its line's number, from 1."""
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
  except csv.Error as error:  # such as a quote that is never closed
    raise errors.DataError(f"{path} is not a CSV file ({error}).") from error


def without_suffix(name: str) -> str:
  """Returns an image's path without .jpg and the like, in any case."""
  return name.rpartition(".")[0] if image_names.has_image_ending(name) else name


def shortened(value: object) -> str:
  """Returns what an error shows of a text, which may be a whole file in one line."""
  text = str(value)
  return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def _is_number(text: str) -> bool:
  """Says whether the text is a number."""
  try:
    float(text)
  except ValueError:
    return False
  return True
