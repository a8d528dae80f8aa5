"""Lists of images: which of a folder's to take, or where all of them lie."""

import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import external_sort, list_lines, source, tables

_ORIGIN = struct.Struct("<I")
_CHECKED_LINES = 1000  # more would take long on a network's disk, in every task


def of_paths(
  input_list: str,
  input_dir: str | None,
  *,
  by_label: bool = False,
  names: image_names.NameFilter,
  origins: list[str],
  scratch_dir: str | None = None,
  most_checked: int = _CHECKED_LINES,
) -> Iterator[source.Group]:
  """Yields the images that a list of paths names.

  Args:
    input_list: One path a line, see `list_lines`; ends in identity/image.
    input_dir: What a path starts from that is not absolute and not gs://.
    by_label: Whether a line's label is the identity. Images are then called
      label/path, and need no folder.
    names: Says which lines are taken, and counts the others.
    origins: Gets the folders that hold identities' folders.
    scratch_dir: See `external_sort.sorted_by_key`.
    most_checked: Images on a disk that must be there, from the first on.

  Raises:
    errors.DataError: A line is no such path or names no file, or an image comes twice.
  """
  number_of: dict[str, int] = {}

  def records() -> Iterator[external_sort.Record]:
    unchecked = most_checked
    for line in list_lines.read(input_list):
      split = _split_whole if by_label else _split
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
      if by_label:
        path = f"{_label_of(line)}/{path}"
      yield path.encode(), _ORIGIN.pack(number_of[folder])

  ordered = external_sort.sorted_by_key(records(), scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, places in by_identity(ordered, _ORIGIN, origins):
    is_empty = False
    yield source.new_group(
      identity,
      paths,
      origins=[place for (place,) in places],
      starts=len(identity) + 1 if by_label else 0,
    )
  if is_empty:
    raise errors.DataError(f"{input_list} lists no image{names.note()}.")


def of_images(
  folder: str,
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[source.Group]:
  """Yields the images of a folder that a list names, identity/image a line.

  Raises:
    errors.DataError: The folder or the list is missing, empty or malformed.
  """
  is_local = not storage.is_bucket(folder)
  if is_local:
    check_folder(folder)
  for identity, paths in listed(image_list, names=names, scratch_dir=scratch_dir):
    place = os.path.join(folder, identity)
    if is_local and not os.path.isdir(image_names.on_disk(place)):
      raise errors.DataError(
        f"{image_list} lists images of {identity}, which is not in {folder}; say "
        f"--image_list={tables.NONE} to take what the folder holds."
      )
    yield source.new_group(identity, paths)


def only_listed(
  groups: Iterable[source.Group],
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[source.Group]:
  """Passes on the images that a list names, identity/image a line.

  Raises:
    errors.DataError: The list is malformed or names an image that is not there.
  """
  wanted = listed(image_list, names=names, scratch_dir=scratch_dir)
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


def check_folder(folder: str) -> None:
  """Raises DataError unless it is a local folder."""
  if not os.path.isdir(folder):
    raise errors.DataError(f"--input_dir={folder} is no folder; check the path.")


def by_identity(
  records: Iterable[external_sort.Record],
  numbers: struct.Struct,
  origins: Sequence[str],
) -> Iterator[tuple[str, list[str], list[tuple[Any, ...]]]]:
  """Yields identity, paths and each path's numbers of records sorted by path.

  Args:
    records: Path, and its numbers as packed; the first is of its origin.
    numbers: How they are packed.
    origins: For the error.

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
    unpacked(), key=lambda found: source.identity_of(found[0])
  ):
    paths, places = zip(*group, strict=True)
    yield identity, list(paths), list(places)


def listed(
  image_list: str,
  *,
  names: image_names.NameFilter,
  scratch_dir: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
  """Yields each identity of a list with the sorted paths of its images.

  Raises:
    errors.DataError: A line is no identity/image or comes twice, or there is none.
  """
  records = (
    (_checked(line).encode(), _ORIGIN.pack(0))
    for line in list_lines.read(image_list)
    if names.takes(line.path)
  )
  ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
  is_empty = True
  for identity, paths, _ in by_identity(ordered, _ORIGIN, [image_list]):
    is_empty = False
    yield identity, paths
  if is_empty:
    raise errors.DataError(f"{image_list} lists no image{names.note()}.")


def _checked(line: list_lines.Line) -> str:
  """Returns a line's path; DataError if it is not identity/image."""
  parts = line.path.split("/")
  if len(parts) != 2 or not all(parts) or ".." in parts:
    raise errors.DataError(f"{line.place} is not identity/image.")
  return line.path


def _below(line: str, input_dir: str | None) -> str:
  """Returns the part of a listed path that tells whether it is to be left out.

  What lies above --input_dir does not: that may be hidden.
  """
  above = "" if input_dir is None else f"{input_dir.rstrip('/')}/"
  below = line.removeprefix(above).removeprefix(storage.BUCKET_PREFIX)
  return "/".join(part for part in below.split("/") if part not in ("", "."))


def _label_of(line: list_lines.Line) -> str:
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


def _split_whole(line: list_lines.Line, input_dir: str | None) -> tuple[str, str]:
  """Returns --input_dir and the path below it; what `_split` does for others."""
  below = _below(line.path, input_dir)
  above = None if input_dir is None else input_dir.rstrip("/")
  is_below = not line.path.startswith(("/", storage.BUCKET_PREFIX)) or (
    above is not None and line.path.startswith(f"{above}/")
  )
  if above is None or not is_below or not below or ".." in line.path.split("/"):
    return _split(line, input_dir)
  return above or "/", below


def _split(line: list_lines.Line, input_dir: str | None) -> tuple[str, str]:
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
