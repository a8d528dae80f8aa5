"""The room in a cache folder: how much of it is taken, and what goes to make more."""

import contextlib
import fcntl
import io
import os
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from facedist import errors
from facedist.data import file_locks

_PARTIAL = re.compile(r"(.+)\.(\d+)\.partial")
_SHARD_ENDING = ".tfrecord"


class NoRoomError(errors.DataError):
  """The cache is full of files that are in use."""


class _Entry(NamedTuple):
  """A file of the cache: its path, its bytes, and when it was last used."""

  path: str
  size: int
  used_ns: int


def partial_name(path: str, size: int) -> str:
  """Returns the name of `path` while it is on its way; it tells its whole size."""
  return f"{path}.{size}.partial"


def reserve(folder: str, path: str, size: int, *, limit_bytes: int | None) -> io.FileIO:
  """Opens the partial file of a file to come; if it is new, after making room for it.

  Args:
    folder: The cache.
    path: The file to come, in a folder of the cache.
    size: The bytes that it will have.
    limit_bytes: What all files of the cache may have; None is any number.

  Raises:
    NoRoomError: Files in use fill the cache.
  """
  name = partial_name(path, size)
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)  # held for a moment only, by anyone
    if not os.path.exists(name):
      room.seek(0)
      text = room.read()
      used = size + (int(text) if text.isdigit() else _bytes_in(folder))
      if limit_bytes is not None and used > limit_bytes:
        # the sum only ever grows, so look what there is before anything goes
        used = size + _make_room(folder, limit_bytes, wanted=size)
      room.truncate(0)
      room.write(str(used).encode())
    return open(name, "a+b", buffering=0)


def remove(folder: str, path: str, opened: int) -> None:
  """Removes a file if it is the one that was opened, whoever else has it open too."""
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)  # so that one of several processes removes it
    if file_locks.is_at(opened, path):
      os.remove(path)


def count_again(folder: str) -> None:
  """Has the bytes in use counted anew; for who puts small files there unasked."""
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)
    room.truncate(0)


def _make_room(folder: str, limit_bytes: int, *, wanted: int) -> int:
  """Removes the shards not used for longest until `wanted` bytes are free.

  Returns:
    The bytes in use.

  Raises:
    NoRoomError: The rest is in use.
  """
  sets = _sets(folder)
  entries = sorted(
    (entry for each in sets for entry in _entries(each)),
    key=lambda entry: entry.used_ns,
  )
  used = sum(entry.size for entry in entries)
  for entry in entries:
    if used + wanted <= limit_bytes:
      break
    if _is_shard(entry.path) and _evict(entry.path):
      used -= entry.size
  for each in sets:
    _remove_if_unused(each)
  if used + wanted > limit_bytes:
    raise NoRoomError(
      f"--cache_dir={folder} has no room: files of {used / 1e9:.3g} GB are in use at "
      f"once, {wanted / 1e9:.3g} GB more are needed, --cache_gb is "
      f"{limit_bytes / 1e9:g}; raise it, or read with --read_mode=stream."
    )
  return used


def _sets(folder: str) -> list[str]:
  """Returns the folders of the sets in a cache."""
  with os.scandir(folder) as found:
    return [entry.path for entry in found if entry.is_dir()]


def _bytes_in(folder: str) -> int:
  """Returns the bytes of all sets, with what is under way."""
  return sum(entry.size for each in _sets(folder) for entry in _entries(each))


def _entries(folder: str) -> Iterator[_Entry]:
  """Yields the files of a set; a partial one has the size it will have."""
  with os.scandir(folder) as found:
    paths = [entry.path for entry in found]
  for path in paths:
    partial = _PARTIAL.fullmatch(path)
    # A partial file that is gone may be whole by now, under its own name.
    for name in (path, partial[1]) if partial else (path,):
      with contextlib.suppress(FileNotFoundError):
        status = os.stat(name)
        size = int(partial[2]) if partial else status.st_size
        yield _Entry(name, size, status.st_atime_ns)
        break


def _is_shard(path: str) -> bool:
  """Says whether a file may go by itself: a shard, whole or partial."""
  partial = _PARTIAL.fullmatch(path)
  return (partial[1] if partial else path).endswith(_SHARD_ENDING)


def _evict(path: str) -> bool:
  """Removes a file unless it is in use; says whether its bytes are free."""
  try:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except FileNotFoundError:
    partial = _PARTIAL.fullmatch(path)  # gone, or whole by now and under its own name
    return partial is None or not os.path.exists(partial[1])
  try:
    if not file_locks.lock(file, file_locks.ALONE):
      return False
    os.remove(path)
    return True
  finally:
    os.close(file)


def _remove_if_unused(folder: str) -> None:
  """Removes a set's folder that holds no shard, unless a process uses the set."""
  if any(_is_shard(entry.path) for entry in _entries(folder)):
    return
  lock = os.path.join(folder, "used")
  file = file_locks.open_locked(lock, file_locks.ALONE, wait=False)
  if file is not None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(file)
