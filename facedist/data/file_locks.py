"""Locks on files of this host, which end with the process that holds them.

They are Linux' `flock`, of an open file: two descriptors of one process exclude each
other too, and one that is closed, in whatever way, holds nothing any more.
"""

import fcntl
import os
import time

_POLL_SECONDS = 0.05
SHARED, ALONE = fcntl.LOCK_SH, fcntl.LOCK_EX


def open_locked(path: str, kind: int, *, wait: bool) -> int | None:
  """Opens and locks a file, made if need be; closing the descriptor unlocks it.

  Args:
    path: The file, in a folder that is there.
    kind: SHARED or ALONE.
    wait: Whether to wait for others to unlock it.

  Returns:
    A file descriptor; None if the file was removed meanwhile, or others have it locked
    and there is no waiting.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  while not lock(file, kind):
    if not wait:
      os.close(file)
      return None
    time.sleep(_POLL_SECONDS)
  if is_at(file, path):
    return file
  os.close(file)
  return None


def lock(file: int, kind: int) -> bool:
  """Tries to lock an open file; says whether it could."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def is_at(file: int, path: str) -> bool:
  """Says whether an open file still has its name."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False
