"""Lists of images: the formats of their lines, and the images that they name.

--input_list names every image by its path; --image_list names the images of
--input_dir to take, as identity/image.
"""

import dataclasses
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base, tables

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


def read(path: str) -> Iterator[Line]:
  """Yields the lines of a list without its header.

  A header that names a column of paths decides the format. Without one, the first line
  that names an image decides whether lines hold a path alone, `path label`,
  `path<TAB>label`, `path,label` or MXNet's index<TAB>label<TAB>path.

  Raises:
    errors.DataError: A line has another format than those before it.
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
    yield Line(_path_of(text, kind), _label_in_columns(text, kind), place)


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
  """Returns the format of a line that names an image; None if it names none."""
  if image_names.has_image_ending(text.strip('"')):
    return _INDEXED if _MXNET.fullmatch(text) else _PLAIN
  if found := _LABELLED.match(text):
    return {"\t": "path<TAB>label", ",": "path,label", " ": "path label"}[
      found["separator"]
    ]
  return None


def _path_of(text: str, kind: str) -> str:
  """Returns the path in a line of a format."""
  if kind == _PLAIN:
    return text
  if kind == _INDEXED:
    return text.rpartition("\t")[2]
  if found := _LABELLED.match(text):
    return found["path"].strip('"')
  separator = {"path<TAB>label": "\t", "path,label": ","}.get(kind)
  return text.rsplit(separator, 1)[0].strip('"')


def _label_in_columns(text: str, kind: str) -> str | None:
  """Returns the one label in a line of a format; None if it has none or several."""
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


_CHECKED_LINES = 1000  # more would take long on a network's disk, in every task
_ORIGIN = struct.Struct("<I")


def from_input_list(
  input_list: str,
  input_dir: str | None,
  *,
  labels_are_identities: bool = False,
  names: image_names.NameFilter,
  origins: list[str],
  scratch_dir: str | None = None,
  max_checked: int = _CHECKED_LINES,
) -> Iterator[base.IdentityGroup]:
  """Yields the images that --input_list names.

  Args:
    input_list: One path a line, see `read`; a path ends in identity/image.
    input_dir: The folder of paths that are neither absolute nor gs://.
    labels_are_identities: Whether a line's label is the identity. Images are then
      called label/path, and need no identity's folder.
    names: Says which lines are taken, and counts the others.
    origins: The folders that hold identities' folders are appended.
    scratch_dir: See `external_sort.sorted_by_key`.
    max_checked: The first images on a disk whose existence is checked.

  Raises:
    errors.DataError: A line is no such path or names no file, or an image comes twice.
  """
  number_of: dict[str, int] = {}

  def records() -> Iterator[external_sort.Record]:
    unchecked = max_checked
    for line in read(input_list):
      split = _split_whole if labels_are_identities else _split
      folder, path = split(line, input_dir)
      if not names.takes(_below(line.path, input_dir)):
        continue
      if unchecked and not storage.is_bucket(folder):
        unchecked -= 1
        place = os.path.join(folder, path)
        if not os.path.exists(image_names.on_disk(place)):
          raise errors.DataError(
            f"{line.place} names {place}, which does not exist; correct the list or "
            "--input_dir."
          )
      if folder not in number_of:
        number_of[folder] = len(origins)
        origins.append(folder)
      if labels_are_identities:
        path = f"{_label_of(line)}/{path}"
      yield path.encode(), _ORIGIN.pack(number_of[folder])

  ordered = external_sort.sorted_by_key(records(), scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, places in base.by_identity(ordered, _ORIGIN, origins):
    is_empty = False
    yield base.new_group(
      identity,
      paths,
      origins=[place for (place,) in places],
      starts=len(identity) + 1 if labels_are_identities else 0,
    )
  if is_empty:
    raise errors.DataError(f"{input_list} lists no image{names.note()}.")


def _split_whole(line: Line, input_dir: str | None) -> tuple[str, str]:
  """Returns --input_dir and the path below it; of another path what `_split` does."""
  below = _below(line.path, input_dir)
  above = None if input_dir is None else input_dir.rstrip("/")
  is_below = not line.path.startswith(("/", storage.BUCKET_PREFIX)) or (
    above is not None and line.path.startswith(f"{above}/")
  )
  if above is None or not is_below or not below or ".." in line.path.split("/"):
    return _split(line, input_dir)
  return above or "/", below


def _split(line: Line, input_dir: str | None) -> tuple[str, str]:
  """Returns the folder of a listed path, and identity/image in it."""
  is_absolute = line.path.startswith(("/", storage.BUCKET_PREFIX))
  if not is_absolute and input_dir is None:
    raise errors.DataError(f"{line.place} is relative; say from which --input_dir.")
  path = line.path
  if not is_absolute and input_dir is not None:
    path = storage.join(input_dir, path)
  folder, *image = path.rsplit("/", 2)
  is_in_bucket = storage.is_bucket(path)
  is_whole = (
    len(image) == 2 and all(image) and storage.is_bucket(folder) == is_in_bucket
  )
  if not is_whole or ".." in line.path.split("/"):
    raise errors.DataError(f"{line.place} does not end in identity/image.")
  return folder or "/", "/".join(image)


def _below(line: str, input_dir: str | None) -> str:
  """Returns the part of a listed path that is below --input_dir.

  Only this part decides whether an image is left out; folders above may be hidden.
  """
  above = "" if input_dir is None else f"{input_dir.rstrip('/')}/"
  below = line.removeprefix(above).removeprefix(storage.BUCKET_PREFIX)
  return "/".join(part for part in below.split("/") if part not in ("", "."))


def _label_of(line: Line) -> str:
  """Returns a line's label; DataError if it has none that can be an identity."""
  if line.label is None:
    raise errors.DataError(
      f"{line.place} has no label, or several, for --list_labels; write "
      "path<TAB>label, path,label, path label (one word), index<TAB>label<TAB>path, or "
      "a first line that names the columns, one of them label."
    )
  if "/" in line.label or line.label in (".", ".."):
    raise errors.DataError(
      f"{line.place} has the label {line.label!r}, but an identity's name has no '/' "
      "and is not '.' or '..'; rename it."
    )
  return line.label


def from_image_list(
  folder: str,
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a folder that --image_list names, identity/image a line.

  Raises:
    errors.DataError: The folder or the list is missing, empty or malformed.
  """
  is_local = not storage.is_bucket(folder)
  if is_local:
    base.check_folder(folder)
  for identity, paths in paths_by_identity(
    image_list, names=names, scratch_dir=scratch_dir
  ):
    place = os.path.join(folder, identity)
    if is_local and not os.path.isdir(image_names.on_disk(place)):
      raise errors.DataError(
        f"{image_list} lists images of {identity}, which is not in {folder}; say "
        f"--image_list={tables.NONE} to take what the folder holds."
      )
    yield base.new_group(identity, paths)


def only_listed(
  groups: Iterable[base.IdentityGroup],
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[base.IdentityGroup]:
  """Yields of an archive's groups the images that --image_list names.

  Raises:
    errors.DataError: The list is malformed or names an image that is not there.
  """
  wanted = paths_by_identity(image_list, names=names, scratch_dir=scratch_dir)
  identity, paths = next(wanted, (None, []))
  for group in groups:
    if identity != group.identity:
      continue
    places = {path: place for place, path in enumerate(group.paths)}
    absent = [path for path in paths if path not in places]
    if absent:
      break
    yield group.take(np.array([places[path] for path in paths]))
    identity, paths = next(wanted, (None, []))
  else:
    absent = paths
  if absent:
    raise errors.DataError(
      f"{image_list} lists {absent[0]}, which is not in the archive; say "
      f"--image_list={tables.NONE} to take what it holds."
    )


def paths_by_identity(
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
  """Yields each identity of --image_list with the sorted paths of its images.

  Raises:
    errors.DataError: A line is no identity/image or comes twice, or there is none.
  """
  records = (
    (_checked(line).encode(), _ORIGIN.pack(0))
    for line in read(image_list)
    if names.takes(line.path)
  )
  ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, _ in base.by_identity(ordered, _ORIGIN, [image_list]):
    is_empty = False
    yield identity, paths
  if is_empty:
    raise errors.DataError(f"{image_list} lists no image{names.note()}.")


def _checked(line: Line) -> str:
  """Returns a line's path; DataError if it is not identity/image."""
  parts = line.path.split("/")
  if len(parts) != 2 or not all(parts) or ".." in parts:
    raise errors.DataError(f"{line.place} is not identity/image.")
  return line.path
