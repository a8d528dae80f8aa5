"""A cache of shards on a local disk, shared by all processes of a host.

  cache_dir/room              bytes in use; its lock guards them
  cache_dir/SET/used          locked by each process that uses the set
  cache_dir/SET/x.tfrecord    a whole shard whose checksum was compared
  cache_dir/SET/x.tfrecord.54321.partial    a shard of 54,321 bytes being fetched

Processes coordinate only by file locks (`flock` of Linux), which a process releases
even when it is killed. A lock belongs to an open file: two descriptors of one process
exclude each other too, and closing a descriptor releases its lock.

- The process that holds the lock of a partial file fetches it; the others wait until it
  is done. If it is killed, the next process continues its partial file.
- A process that reads a shard holds a shared lock on it. When the cache is full, shards
  that no process has open are removed, the least recently used first.
- A partial file counts with its final length, which is in its name, so files that are
  fetched at the same time do not exceed the limit together.

The folder must be on a disk of this host; locks on NFS are slow or do not work.
"""

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
from absl import logging

from facedist import errors, storage
from facedist.data.shards import integrity
from facedist.data.shards.open_files import OpenFile

SHARED, ALONE = fcntl.LOCK_SH, fcntl.LOCK_EX
_POLL_SECONDS = 0.05
_CHUNK_BYTES = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(errors.DataError):
  """The cache is full of files that are in use."""


class FetchStoppedError(Exception):
  """The `stop` event was set while a shard was fetched or waited for."""


class Remote(NamedTuple):
  """A shard: its source, its path in the cache, its bytes and its checksum."""

  source: str
  path: str
  size: int
  crc32c: int


class ShardCache:
  """Copies of shards from buckets, at most `limit_bytes` of them.

  Args:
    folder: The cache folder, created if missing.
    limit_bytes: None for no limit but the disk's.
    accept_corrupt: Whether a file that arrives twice with a wrong checksum is kept, for
      readers that check each record and continue past corrupt ones.
  """

  def __init__(
    self, folder: str, *, limit_bytes: int | None, accept_corrupt: bool = False
  ) -> None:
    self.folder = folder
    self.limit_bytes = limit_bytes
    self._accept_corrupt = accept_corrupt

  def use(self, name: str) -> tuple[str, int]:
    """Returns a set's folder, created if missing, and a descriptor that protects it."""
    folder = os.path.join(self.folder, name)
    while True:
      with self.disk_errors(), contextlib.suppress(FileNotFoundError):
        os.makedirs(folder, exist_ok=True)
        lock = os.path.join(folder, "used")
        file = open_locked(lock, SHARED, wait=True)
        if file is not None:
          return folder, file

  def acquire(self, shard: Remote, *, stop: threading.Event) -> OpenFile:
    """Opens a shard of the cache, fetched first if it is missing.

    The shard stays in the cache while the open file is held.

    Args:
      shard: The shard.
      stop: Ends the waiting when it is set.

    Raises:
      NoRoomError: Files in use fill the cache.
      FetchStoppedError: `stop` was set.
      errors.DataError: It is missing or another file, or the disk is full.
    """
    while True:
      file = _open_shared(shard.path, shard.size)
      if file is not None:
        status = os.fstat(file.descriptor)
        os.utime(file.descriptor, ns=(time.time_ns(), status.st_mtime_ns))
        return file
      with self.disk_errors():
        self._fetch(shard, stop)

  def discard(self, shard: Remote, file: OpenFile) -> None:
    """Removes a shard if it is still `file`; the next `acquire` fetches it again.

    Processes that have `file` open continue to read it.
    """
    with self.disk_errors():
      remove(self.folder, shard.path, file.descriptor)

  @contextlib.contextmanager
  def disk_errors(self) -> Iterator[None]:
    """Turns a full or read-only disk into an error with the fix."""
    try:
      yield
    except OSError as error:
      if error.errno in _FULL:
        raise errors.DataError(
          f"the disk of --cache_dir={self.folder} is full; free some of it, name "
          "another --cache_dir, or give --cache_gb so that old shards make room."
        ) from error
      if os.fsdecode(error.filename or "").startswith(self.folder):
        raise errors.UsageError(
          f"--cache_dir={self.folder} cannot be written ({error.strerror}); name a "
          "folder of your own."
        ) from error
      raise

  def _fetch(self, shard: Remote, stop: threading.Event) -> None:
    """Fetches a file, or waits while another process does."""
    source, path = shard.source, shard.path
    with reserve(
      self.folder, path, shard.size, limit_bytes=self.limit_bytes
    ) as partial:
      while not lock(partial.fileno(), ALONE):
        # a file that was renamed to its final name is locked by its readers
        if not is_at(partial.fileno(), partial.name):
          return
        if stop.wait(_POLL_SECONDS):
          raise FetchStoppedError
      if not is_at(partial.fileno(), partial.name):
        return  # another process finished it, or removed it to make room
      if os.path.exists(path):  # finished just before this partial file was begun
        os.remove(partial.name)
      else:
        if not _complete(shard, partial.name, stop):
          if not self._accept_corrupt:
            os.remove(partial.name)
            raise errors.DataError(
              f"{source} is not the file that its manifest describes: CRC mismatch; "
              "upload the folder again."
            )
          logging.warning("%s is corrupt; its records are checked one by one", source)
        os.replace(partial.name, path)


def _complete(shard: Remote, partial: str, stop: threading.Event) -> bool:
  """Fetches the missing part of a locked partial file; returns whether it is valid.

  The part that an earlier process fetched is kept if the whole file is valid. A corrupt
  file is fetched once more, in case the transfer corrupted it.
  """
  with open(partial, "r+b") as stream:
    done = checksum = 0
    while chunk := stream.read(_CHUNK_BYTES):
      done, checksum = done + len(chunk), google_crc32c.extend(checksum, chunk)
    for start in (done, 0) if done else (0, 0):
      stream.truncate(start)
      stream.seek(start)
      checksum = checksum if start else 0
      for chunk in _chunks(shard.source, start, shard.size, stop):
        stream.write(chunk)
        checksum = google_crc32c.extend(checksum, chunk)
      if checksum == shard.crc32c:
        break
    stream.flush()
    os.fsync(stream.fileno())
  return checksum == shard.crc32c


def _chunks(
  source: str, start: int, end: int, stop: threading.Event
) -> Iterator[bytes]:
  """Yields bytes [start, end) of a file that must not change meanwhile."""
  with integrity.missing_is_named(source):
    size, token = storage.status(source)
  integrity.check_size(source, size, end)
  while start < end:
    if stop.is_set():
      raise FetchStoppedError
    length = min(_CHUNK_BYTES, end - start)
    yield storage.read_range(source, start, length, generation=token)
    start += length


def _open_shared(path: str, size: int) -> OpenFile | None:
  """Opens a whole file, locked against removal; None if it is not there."""
  if not os.path.exists(path):
    return None
  try:
    file = OpenFile(path)
  except errors.DataError:  # removed meanwhile
    return None
  if not lock(file.descriptor, SHARED):
    return None  # being removed
  if not is_at(file.descriptor, path):
    return None
  if file.size != size:  # truncated, such as by a crash of the machine
    os.remove(path)
    return None
  return file


_PARTIAL = re.compile(r"(.+)\.(\d+)\.partial")
_SHARD_ENDING = ".tfrecord"


class _Entry(NamedTuple):
  """A file of the cache: its path, its bytes, and when it was last used."""

  path: str
  size: int
  used_ns: int


def partial_name(path: str, size: int) -> str:
  """Returns the name of `path` while it is fetched, with its final size."""
  return f"{path}.{size}.partial"


def reserve(folder: str, path: str, size: int, *, limit_bytes: int | None) -> io.FileIO:
  """Opens the partial file of a shard; makes room first if it is new.

  Args:
    folder: The cache.
    path: The shard's final path, in a folder of the cache.
    size: The shard's bytes.
    limit_bytes: Limit for all files of the cache; None for no limit.

  Raises:
    NoRoomError: Files in use fill the cache.
  """
  name = partial_name(path, size)
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)  # every process holds it only for a moment
    if not os.path.exists(name):
      room.seek(0)
      text = room.read()
      used = size + (int(text) if text.isdigit() else _bytes_in(folder))
      if limit_bytes is not None and used > limit_bytes:
        # the stored sum never shrinks, so count what there is before removing files
        used = size + _make_room(folder, limit_bytes, wanted=size)
      room.truncate(0)
      room.write(str(used).encode())
    return open(name, "a+b", buffering=0)


def remove(folder: str, path: str, opened: int) -> None:
  """Removes a file if it is the opened one, even if other processes have it open."""
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)  # so that one of several processes removes it
    if is_at(opened, path):
      os.remove(path)


def count_again(folder: str) -> None:
  """Makes the next `reserve` count the bytes in use, after small files were written."""
  with open(os.path.join(folder, "room"), "a+b") as room:
    fcntl.flock(room, fcntl.LOCK_EX)
    room.truncate(0)


def _make_room(folder: str, limit_bytes: int, *, wanted: int) -> int:
  """Removes the least recently used shards until `wanted` bytes are free.

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
  """Returns the bytes of all sets, partial files included."""
  return sum(entry.size for each in _sets(folder) for entry in _entries(each))


def _entries(folder: str) -> Iterator[_Entry]:
  """Yields the files of a set; a partial one counts with its final size."""
  with os.scandir(folder) as found:
    paths = [entry.path for entry in found]
  for path in paths:
    partial = _PARTIAL.fullmatch(path)
    # A partial file that is gone may be complete, under its final name.
    for name in (path, partial[1]) if partial else (path,):
      with contextlib.suppress(FileNotFoundError):
        status = os.stat(name)
        size = int(partial[2]) if partial else status.st_size
        yield _Entry(name, size, status.st_atime_ns)
        break


def _is_shard(path: str) -> bool:
  """Says whether a file may be removed alone: a shard, whole or partial."""
  partial = _PARTIAL.fullmatch(path)
  return (partial[1] if partial else path).endswith(_SHARD_ENDING)


def _evict(path: str) -> bool:
  """Removes a file unless it is in use; returns whether its bytes are free."""
  try:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except FileNotFoundError:
    partial = _PARTIAL.fullmatch(path)  # gone, or complete under its final name
    return partial is None or not os.path.exists(partial[1])
  try:
    if not lock(file, ALONE):
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
  file = open_locked(lock, ALONE, wait=False)
  if file is not None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(file)


def open_locked(path: str, kind: int, *, wait: bool) -> int | None:
  """Opens and locks a file, created if missing; closing the descriptor unlocks it.

  Args:
    path: The file, in an existing folder.
    kind: SHARED or ALONE.
    wait: Whether to wait until other processes unlock it.

  Returns:
    A file descriptor; None if the file was removed meanwhile, or if it is locked and
    `wait` is False.
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
  """Tries to lock an open file; returns whether it succeeded."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def is_at(file: int, path: str) -> bool:
  """Says whether an open file is still the file at `path`."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False
