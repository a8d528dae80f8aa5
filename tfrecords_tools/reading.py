"""The source images' bytes: files of their own, or parts of an archive."""

from collections.abc import Sequence

import numpy as np

from facedist import errors
from tfrecords_tools import source


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
  return [
    f"{place}/{path}" if is_file else place
    for place, path, is_file in zip(places, paths, whole, strict=True)
  ]


def read_all(files: Sequence[str], rows: np.ndarray) -> list[bytes | errors.DataError]:
  """Returns each image's bytes, or the reason why it cannot be read.

  Args:
    files: The file that each lies in.
    rows: source.ROW_DTYPE[images] where in it.
  """
  return [_read(path) for path in files]


def _read(path: str) -> bytes | errors.DataError:
  """Returns a local file's bytes, or the system's words why not."""
  try:
    with open(path, "rb", buffering=0) as stream:
      return stream.readall()
  except OSError as error:
    return errors.DataError(error.strerror or "it cannot be read")
