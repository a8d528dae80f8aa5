"""Temporary files: a folder for them that is there, and a full disk in one line."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from facedist import errors
from facedist.storage import disk


@contextlib.contextmanager
def scratch(folder: str | None = None) -> Iterator[str]:
  """Yields the folder for the temporary files that the body writes.

  Args:
    folder: What --scratch_dir says, made if need be; None is the system's.

  Raises:
    errors.UsageError: The folder cannot be made, or not be written.
    errors.DataError: Its disk is full.
  """
  where = f"--scratch_dir={folder}" if folder else f"TMPDIR={tempfile.gettempdir()}"
  try:
    if folder:
      os.makedirs(folder, exist_ok=True)
    yield folder or tempfile.gettempdir()
  except OSError as error:
    if error.errno in disk.NO_SPACE:
      raise errors.DataError(
        f"the disk of {where} is full; free some of it, or name a folder on a larger "
        "one."
      ) from error
    if folder and str(error.filename or "").startswith(folder):
      raise errors.UsageError(
        f"{where} cannot be written ({error.strerror}); name another folder on this "
        "machine's disk."
      ) from error
    raise
