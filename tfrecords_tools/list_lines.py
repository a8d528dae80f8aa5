"""Lines of a list of images: a path alone, or with a label, an index or a header."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from facedist import errors
from facedist.data import image_names
from tfrecords_tools import tables

_DECIDING_LINES = 1000
_PATH_COLUMNS = frozenset(
  (
    *("path", "paths", "file", "files", "filename", "filenames", "file_name"),
    *("filepath", "file_path", "image", "images", "image_path", "imagepath", "img"),
    *("img_path", "image_name", "image_file", "imagename", "name_id"),
  )
)
_ENDINGS = "|".join(map(re.escape, image_names.ENDINGS))
_LABELLED = re.compile(
  rf"(?P<path>.*?(?:{_ENDINGS}))\"?[ ]*(?P<separator>[\t, ])\s*\S", re.IGNORECASE
)
_MXNET = re.compile(r"\d+\t(?:[-+.\deE]+\t)+(?P<path>[^\t]+)")
_PLAIN, _INDEXED = "path", "index<TAB>label<TAB>path"


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a list.

  Attributes:
    path: The image that it names.
    place: The list, the line's number and the line, for errors.
  """

  path: str
  place: str


@dataclasses.dataclass(frozen=True)
class _Header:
  """The columns that a list's first line names."""

  separator: str | None  # None is any number of blanks
  before: int  # columns before the path's
  after: int

  def path_of(self, text: str) -> str | None:
    """Returns a line's path, which may hold the separator; None if columns lack."""
    fields = text.split(self.separator, self.before)
    if len(fields) <= self.before:
      return None
    fields = fields[-1].rsplit(self.separator, self.after)
    return fields[0].strip().strip('"') if len(fields) > self.after else None


def read(path: str) -> Iterator[Line]:
  """Yields the lines of a list without its header.

  The first line with an image in it decides whether lines hold a path alone,
  `path label`, `path<TAB>label`, `path,label` or MXNet's index<TAB>label<TAB>path.

  Raises:
    errors.DataError: A line is of another kind than those before it.
  """
  lines = tables.numbered_lines(path, escape=True)
  first = list(itertools.islice(lines, _DECIDING_LINES))
  header = _header_of(first[0][1]) if first else None
  rows = first if header is None else first[1:]
  kind = next(filter(None, (_kind_of(text) for _, text in rows)), _PLAIN)
  for number, text in itertools.chain(rows, lines):
    place = f"{path}, line {number}: {tables.shortened(text)!r}"
    if header is not None:
      found = header.path_of(text)
      if found is None:
        raise errors.DataError(f"{place} lacks a column that the first line names.")
      yield Line(found, place)
      continue
    other = _kind_of(text)
    if other is not None and other != kind:
      raise errors.DataError(
        f"{place} reads as {other!r}, but the lines before it as {kind!r}; write all "
        "lines of a list alike."
      )
    yield Line(_path_of(text, kind), place)


def _header_of(text: str) -> _Header | None:
  """Returns the columns that a first line names; None if it is no header."""
  if "/" in text:
    return None
  separator = next((one for one in ("\t", ",") if one in text), None)
  columns = [column.strip().strip('"').lower() for column in text.split(separator)]
  for place, column in enumerate(columns):
    if column in _PATH_COLUMNS:
      return _Header(separator, place, len(columns) - place - 1)
  return None


def _kind_of(text: str) -> str | None:
  """Returns what a line that names an image holds; None if it names none."""
  if image_names.has_image_ending(text.strip('"')):
    return _INDEXED if _MXNET.fullmatch(text) else _PLAIN
  if found := _LABELLED.match(text):
    return {"\t": "path<TAB>label", ",": "path,label", " ": "path label"}[
      found["separator"]
    ]
  return None


def _path_of(text: str, kind: str) -> str:
  """Returns the path in a line of a kind."""
  if kind == _PLAIN:
    return text
  if kind == _INDEXED:
    return text.rpartition("\t")[2]
  if found := _LABELLED.match(text):
    return found["path"].strip('"')
  separator = {"path<TAB>label": "\t", "path,label": ","}.get(kind)
  return text.rsplit(separator, 1)[0].strip('"')
