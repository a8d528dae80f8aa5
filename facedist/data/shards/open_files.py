"""Local files that are kept open for reading, within the process's limit."""

import os
import resource
import threading
from collections.abc import Callable
from typing import Protocol

from facedist import errors, storage
from facedist.data.shards import integrity

_OTHER_FILES = 512  # connections, logs, libraries


class OpenFile:
  """A local file open for reading, closed when no reference to it is left.

  Attributes:
    descriptor: The operating system's number of the open file.
    size: Bytes of the file when it was opened.
    token: Distinguishes it from another file at the same path.
  """

  def __init__(self, path: str):
    """Opens `path`; DataError if there is no such file."""
    try:
      self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
      raise integrity.missing(path) from error
    except OSError as error:
      raise storage.unreadable(path, error) from error
    status = os.fstat(self.descriptor)
    self.size, self.token = status.st_size, integrity.token(status)

  def __del__(self) -> None:
    if hasattr(self, "descriptor"):
      os.close(self.descriptor)


class ShardFiles(Protocol):
  """The shards of a split as open files; safe from many threads."""

  def get(self, number: int) -> OpenFile:
    """Returns a shard; hold it while you read."""

  def path(self, number: int) -> str:
    """Returns where a shard comes from, for messages."""

  def check(self, number: int, file: OpenFile) -> None:
    """Checks a shard, opened as `file`, in which a bad record was read.

    Raises:
      errors.DataError: It was replaced since it was opened.
      errors.CorruptCopyError: It is a corrupt copy.
    """


class OpenFiles:
  """Files by number, opened when first requested; the oldest are closed first.

  A file stays open as long as a caller holds its `OpenFile`, so that a descriptor is
  never closed or reused while a thread reads from it.
  """

  def __init__(self, open_file: Callable[[int], OpenFile], max_open: int):
    """Opens nothing yet; `open_file` opens a file by its number."""
    self._open_file, self._max_open = open_file, max_open
    self._open: dict[int, OpenFile] = {}
    self._lock = threading.Lock()

  def get(self, number: int) -> OpenFile:
    """Returns a file; hold it while you read."""
    found = self._open.get(number)  # without a lock, which would cost every record
    if found is not None:
      return found
    opened = self._open_file(number)
    with self._lock:
      while len(self._open) >= self._max_open:
        del self._open[next(iter(self._open))]
      return self._open.setdefault(number, opened)


def max_open() -> int:
  """Returns how many files to hold open: a quarter of this process's limit."""
  return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


def allow(count: int) -> None:
  """Raises this process's limit of open files so that `count` shards fit.

  Raises:
    errors.UsageError: The system does not allow that many.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = 2 * count + _OTHER_FILES
  if soft == resource.RLIM_INFINITY or soft >= wanted:
    return
  if hard != resource.RLIM_INFINITY and hard < wanted:
    raise errors.UsageError(
      f"{count} shards are more than the {hard} files that a process may hold open "
      f"here; allow {wanted} with ulimit -n, or read with --read_mode=stream."
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
