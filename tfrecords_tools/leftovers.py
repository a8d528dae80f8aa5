"""Half-written files of builders that were killed: found by name, removed if dead."""

import os
import re
import socket
import time
from collections.abc import Iterable

from facedist import storage

_PARTIAL = re.compile(r".+\.partial-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}")
_DEAD_AFTER_SECONDS = 24 * 3600.0


def remove(folders: Iterable[str]) -> None:
  """Removes what dead builders left in these local folders.

  A file's name tells its writer's host and process (`storage.partial_file`). Of this
  host the process tells whether it lives; another host's file is dead when nothing was
  written to it for a day. A bucket has no such files: an object is whole or is not.
  """
  for folder in folders:
    if storage.is_bucket(folder):
      continue
    for name in storage.list_names(folder):
      found = _PARTIAL.fullmatch(name)
      path = storage.join(folder, name)
      if found and _is_dead(path, found["host"], int(found["process"])):
        storage.remove(path)


def _is_dead(path: str, host: str, process: int) -> bool:
  """Says whether nobody writes that file any more."""
  if host == socket.gethostname() and not _is_running(process):
    return True
  try:
    return time.time() - os.stat(path).st_mtime > _DEAD_AFTER_SECONDS
  except FileNotFoundError:
    return False


def _is_running(process: int) -> bool:
  """Says whether another process of this host has that number."""
  if process == os.getpid():  # ours writes nothing yet; in a container all have this
    return False
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
