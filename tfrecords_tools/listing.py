"""Where the images lie: a folder of identities' folders, on a disk or in a bucket."""

import itertools
import os
from collections.abc import Iterable, Iterator

from facedist import errors
from tfrecords_tools import external_sort, source, tables


def in_folder(folder: str) -> Iterator[source.Group]:
  """Yields the images of a local folder of identities' folders.

  Raises:
    errors.DataError: There is no such folder, or no image in it.
  """
  _check_folder(folder)
  with os.scandir(folder) as entries:
    identities = [entry.name for entry in entries if entry.is_dir()]
  is_empty = True
  for identity in sorted(identities, key="{}/".format):
    with os.scandir(os.path.join(folder, identity)) as entries:
      names = [entry.name for entry in entries if tables.is_image_name(entry.name)]
    if names:
      is_empty = False
      paths = [f"{identity}/{name}" for name in sorted(names)]
      yield source.new_group(identity, paths)
  if is_empty:
    raise errors.DataError(
      f"--input_dir={folder} has no images in folders; it must hold a folder for "
      "each identity, such as n000002/0001_01.jpg."
    )


def in_image_list(
  folder: str, image_list: str, *, scratch_dir: str | None = None
) -> Iterator[source.Group]:
  """Yields the images of a local folder that a list names, identity/image a line.

  Raises:
    errors.DataError: The folder or the list is missing, empty or malformed.
  """
  _check_folder(folder)
  is_empty = True
  for identity, paths in listed(image_list, scratch_dir=scratch_dir):
    is_empty = False
    if not os.path.isdir(os.path.join(folder, identity)):
      raise errors.DataError(
        f"{image_list} lists images of {identity}, which is not in {folder}; say "
        f"--image_list={tables.NONE} to take what the folder holds."
      )
    yield source.new_group(identity, paths)
  if is_empty:
    raise errors.DataError(f"{image_list} lists no image.")


def listed(
  image_list: str, *, scratch_dir: str | None
) -> Iterator[tuple[str, list[str]]]:
  """Yields each identity of a list with the sorted paths of its images.

  Raises:
    errors.DataError: A line is no identity/image, or comes twice.
  """
  records = (
    (_checked(line, image_list).encode(), b"") for line in tables.lines_of(image_list)
  )
  ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
  paths = _each_once((path.decode() for path, _ in ordered), image_list)
  for identity, group in itertools.groupby(paths, key=source.identity_of):
    yield identity, list(group)


def _each_once(paths: Iterable[str], origin: str) -> Iterator[str]:
  """Passes sorted paths on; DataError for one that comes twice."""
  before = None
  for path in paths:
    if path == before:
      raise errors.DataError(f"{origin} lists {path} twice; keep one.")
    before = path
    yield path


def _checked(line: str, image_list: str) -> str:
  """Returns a list's line; DataError if it is not identity/image."""
  parts = line.split("/")
  if len(parts) != 2 or not all(parts) or ".." in parts:
    raise errors.DataError(f"{image_list}: {line!r} is not identity/image.")
  return line


def _check_folder(folder: str) -> None:
  """Raises DataError unless it is a local folder."""
  if not os.path.isdir(folder):
    raise errors.DataError(f"--input_dir={folder} is no folder; check the path.")
