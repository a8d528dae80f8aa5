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
_LABEL_COLUMNS = frozenset(
  (
    *("label", "labels", "identity", "identity_id", "class", "class_id", "target"),
    *("person", "person_id", "subject", "subject_id"),
  )
)
_ENDINGS = "|".join(map(re.escape, image_names.ENDINGS))
_LABELLED = re.compile(
  rf"(?P<path>.*?(?:{_ENDINGS}))\"?[ ]*(?P<separator>[\t, ])\s*\S", re.IGNORECASE
)
_WHOLE_NUMBER = re.compile(r"([-+]?\d+)\.0*")  # MXNet writes 12 as 12.000000
_MXNET = re.compile(r"\d+\t(?:[-+.\deE]+\t)+(?P<path>[^\t]+)")
_PLAIN, _INDEXED = "path", "index<TAB>label<TAB>path"


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a list.

  Attributes:
    path: The image that it names.
    label: Its one label; None if it has none, or several.
    place: The list, the line's number and the line, for errors.
  """

  path: str
  label: str | None
  place: str


@dataclasses.dataclass(frozen=True)
class _Header:
  """The columns that a list's first line names."""

  separator: str | None  # None is any number of blanks
  before: int  # columns before the path's
  after: int
  label: int | None  # its column, from the end where it is after the path's

  def split(self, text: str) -> tuple[str, str | None] | None:
    """Returns a line's path, which may hold the separator, and its label.

    None if columns lack.
    """
    fields = text.split(self.separator, self.before)
    if len(fields) <= self.before:
      return None
    fields[-1:] = fields[-1].rsplit(self.separator, self.after)
    if len(fields) <= self.before + self.after:
      return None
    label = None if self.label is None else _cleaned(fields[self.label])
    return fields[self.before].strip().strip('"'), label


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
      found = header.split(text)
      if found is None:
        raise errors.DataError(f"{place} lacks a column that the first line names.")
      yield Line(*found, place)
      continue
    other = _kind_of(text)
    if other is not None and other != kind:
      raise errors.DataError(
        f"{place} reads as {other!r}, but the lines before it as {kind!r}; write all "
        "lines of a list alike."
      )
    yield Line(_path_of(text, kind), _label_of(text, kind), place)


def _header_of(text: str) -> _Header | None:
  """Returns the columns that a first line names; None if it is no header."""
  if "/" in text:
    return None
  separator = next((one for one in ("\t", ",") if one in text), None)
  columns = [column.strip().strip('"').lower() for column in text.split(separator)]
  for place, column in enumerate(columns):
    if column in _PATH_COLUMNS:
      after = len(columns) - place - 1
      labels = [at for at, column in enumerate(columns) if column in _LABEL_COLUMNS]
      label = labels[0] if len(labels) == 1 else None
      if label is not None and label > place:
        label -= len(columns)
      return _Header(separator, place, after, label)
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


def _label_of(text: str, kind: str) -> str | None:
  """Returns the one label in a line of a kind; None if it has none, or several."""
  if kind == _INDEXED:
    _, *labels = text.split("\t")[:-1]
  elif found := _LABELLED.match(text):
    separator = found["separator"].strip(" ") or None  # None is any number of blanks
    labels = text[found.end("separator") :].split(separator)
  else:
    return None
  return _cleaned(labels[0]) if len(labels) == 1 else None


def _cleaned(label: str) -> str | None:
  """Returns a label without quotes, and 12 for 12.0; None if nothing is left."""
  label = label.strip().strip('"').strip()
  whole = _WHOLE_NUMBER.fullmatch(label)
  return (whole[1] if whole else label) or None
