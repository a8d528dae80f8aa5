"""The source images' bytes: files of their own, or parts of an archive."""

import concurrent.futures
import errno
import os
from collections.abc import Sequence

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools import source

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
  whole = (rows["length"] == source.WHOLE).tolist()
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
  if length != source.WHOLE:
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
      if length == source.WHOLE:
        return stream.readall()
      content = os.pread(stream.fileno(), length, start)
  except OSError as error:
    return errors.DataError(error.strerror or "it cannot be read")
  return content if len(content) == length else errors.DataError("it is cut off")
