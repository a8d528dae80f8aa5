"""The local folder of a run whose workdir is in a bucket: one process's at a time."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator

from absl import logging

from facedist import storage


@contextlib.contextmanager
def beside(workdir: str) -> Iterator[str]:
  """Yields an empty folder among the temporary ones (TMPDIR), named by the workdir.

  What a killed process left there is deleted. One that is still sending is waited for,
  since what it sends is part of the same run.
  """
  name = f"facedist-workdir-{storage.crc32c_of(workdir.encode()):08x}"
  folder = os.path.join(tempfile.gettempdir(), name)
  with open(f"{folder}.lock", "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("another process here still writes to %s; waiting for it", workdir)
      fcntl.flock(lock, fcntl.LOCK_EX)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
