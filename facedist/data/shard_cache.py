"""A cache folder on a local disk, shared by all processes of a host.

  cache_dir/room              bytes in use; its lock guards the room
  cache_dir/starving          locked by processes that need room and find none
  cache_dir/SET/used          locked by each process that uses the set
  cache_dir/SET/x.tfrecord    a shard, whole and checked
  cache_dir/SET/x.tfrecord.54321.partial    on its way to 54,321 bytes

Processes agree by file locks alone, which end with a process however it ends:

- A file is fetched by the one that holds its partial file's lock; the others wait, and
  find it done. One that was killed leaves what it had, and the next goes on there.
- Whoever reads a shard has it locked, shared. When the cache is full, shards go that
  nobody has open, the one that was used longest ago first.
- A partial file counts with its whole length, which is in its name, so what is under
  way at the same time never exceeds the limit.

The folder must be on a disk of this host; locks on NFS are slow or none.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
from absl import logging

from facedist import errors, storage
from facedist.data import cache_room, damage, file_locks
from facedist.data.open_files import OpenFile

_CHUNK_BYTES = 8 << 20
_POLL_SECONDS = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoppedError(Exception):
  """The caller asked to stop."""


class Remote(NamedTuple):
  """A shard: where it comes from, its place in the cache, its bytes and checksum."""

  source: str
  path: str
  size: int
  crc32c: int


class ShardCache:
  """Files brought from buckets, at most `limit_bytes` of them.

  Args:
    folder: The cache folder; made if need be.
    limit_bytes: None leaves it to the disk.
    accept_damage: Whether a file that comes with another checksum, twice, is taken as
      it is, for readers that check each record and go on past damage.
  """

  def __init__(
    self, folder: str, *, limit_bytes: int | None, accept_damage: bool = False
  ) -> None:
    self.folder = folder
    self.limit_bytes = limit_bytes
    self._accept_damage = accept_damage

  def use(self, name: str) -> tuple[str, int]:
    """Returns a set's folder, made if need be, and a descriptor that keeps it there."""
    folder = os.path.join(self.folder, name)
    while True:
      with self.disk_errors(), contextlib.suppress(FileNotFoundError):
        os.makedirs(folder, exist_ok=True)
        lock = os.path.join(folder, "used")
        file = file_locks.open_locked(lock, file_locks.SHARED, wait=True)
        if file is not None:
          return folder, file

  def acquire(self, shard: Remote, *, stop: threading.Event) -> OpenFile:
    """Opens a shard of the cache, which is fetched if need be.

    The shard stays in the cache for as long as the open file is held.

    Args:
      shard: Which one.
      stop: Ends the waiting.

    Raises:
      cache_room.NoRoomError: Files in use fill the cache.
      StoppedError: `stop` was set.
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
    """Has a shard fetched anew by who opens it next; it may be another by now.

    Those that have `file` open, here and in other processes, read on in it.
    """
    with self.disk_errors():
      cache_room.remove(self.folder, shard.path, file.descriptor)

  @contextlib.contextmanager
  def starving(self) -> Iterator[None]:
    """Asks all processes of this host for room while the body runs."""
    path = os.path.join(self.folder, "starving")
    file = file_locks.open_locked(path, file_locks.SHARED, wait=True)
    try:
      yield
    finally:
      if file is not None:
        os.close(file)

  def is_starving(self) -> bool:
    """Says whether a process of this host asks for room."""
    path = os.path.join(self.folder, "starving")
    file = file_locks.open_locked(path, file_locks.ALONE, wait=False)
    if file is not None:
      os.close(file)
    return file is None

  @contextlib.contextmanager
  def disk_errors(self) -> Iterator[None]:
    """Turns a full or forbidden disk into an error with the fix."""
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
    """Brings a file, or waits while another process does."""
    source, path = shard.source, shard.path
    with cache_room.reserve(
      self.folder, path, shard.size, limit_bytes=self.limit_bytes
    ) as partial:
      while not file_locks.lock(partial.fileno(), file_locks.ALONE):
        # one that has got its name already is locked by its readers
        if not file_locks.is_at(partial.fileno(), partial.name):
          return
        if stop.wait(_POLL_SECONDS):
          raise StoppedError
      if not file_locks.is_at(partial.fileno(), partial.name):
        return  # another one was faster, or it went to make room
      if os.path.exists(path):  # finished just before this partial file was begun
        os.remove(partial.name)
      else:
        if not _complete(shard, partial.name, stop):
          if not self._accept_damage:
            os.remove(partial.name)
            raise errors.DataError(
              f"{source} is not the file that its manifest describes: CRC mismatch; "
              "upload the folder again."
            )
          logging.warning("%s is damaged; its records are checked one by one", source)
        os.replace(partial.name, path)


def _complete(shard: Remote, partial: str, stop: threading.Event) -> bool:
  """Fetches what a locked partial file lacks; says whether it is the right file.

  What an earlier process left is kept if all of it turns out right, else fetched anew.
  A file that is wrong is fetched once more, in case the way was at fault.
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
  with damage.missing_is_named(source):
    size, token = storage.status(source)
  damage.check_size(source, size, end)
  while start < end:
    if stop.is_set():
      raise StoppedError
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
  if not file_locks.lock(file.descriptor, file_locks.SHARED):
    return None  # on its way out
  if not file_locks.is_at(file.descriptor, path):
    return None
  if file.size != size:  # cut by a crash of the machine, or by someone
    os.remove(path)
    return None
  return file
