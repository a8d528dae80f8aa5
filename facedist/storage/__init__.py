"""Paths, local and gs://: the one place that reads, writes and lists files.

Every write is atomic: the final name holds the whole content or does not exist.
Bucket access goes through google-cloud-storage with checksums, resumed transfers,
preconditions and one retry policy with a deadline, which TensorFlow's own gs:// file
system lacks. Modules: `disk` and `buckets` (with `uploads`) are the two homes of a
path; `client` makes the requests.

Every function may raise, for a path in a bucket, errors.AccessError (there is no such
bucket, or we may not use it) and errors.UnreachableError (it did not answer in time).
"""

import contextlib
import os
import posixpath
import tempfile
from collections.abc import Iterator
from typing import Any

from facedist import errors
from facedist.storage import buckets, disk, lines, objects, uploads
from facedist.storage.checksums import crc32c, crc32c_of
from facedist.storage.checksums import extend as extend_crc32c
from facedist.storage.client import close
from facedist.storage.contents import HEAD_BYTES, kind_of, kind_of_text, refuse_kind
from facedist.storage.disk import (
  explain,
  is_pattern,
  partial_file,
  plain_name,
  readable,
  unreadable,
)
from facedist.storage.entries import Entry, Status
from facedist.storage.folders import new_folder
from facedist.storage.objects import stored_crc32c
from facedist.storage.scratch import scratch
from facedist.storage.settings import configure
from facedist.storage.uploads import replace_object

__all__ = [
  "HEAD_BYTES",
  "Entry",
  "Status",
  "check_file",
  "check_folder",
  "close",
  "configure",
  "crc32c",
  "crc32c_of",
  "download",
  "exists",
  "explain",
  "extend_crc32c",
  "generation",
  "is_bucket",
  "is_pattern",
  "join",
  "kind_of",
  "kind_of_file",
  "kind_of_text",
  "list_names",
  "local_copy",
  "new_folder",
  "open_lines",
  "partial_file",
  "plain_name",
  "read_bytes",
  "read_range",
  "readable",
  "refuse_kind",
  "remove",
  "replace_object",
  "scratch",
  "size",
  "status",
  "stored_crc32c",
  "unreadable",
  "upload",
  "walk",
  "write_bytes",
]

BUCKET_PREFIX = objects.PREFIX
_LINES_PIECE_BYTES = 4 << 20


def is_bucket(path: str) -> bool:
  """Says whether `path` lies in a bucket."""
  return path.startswith(BUCKET_PREFIX)


def join(folder: str, *names: str) -> str:
  """Joins path parts; forward slashes in a bucket, the system's own elsewhere."""
  if is_bucket(folder):
    return posixpath.join(folder, *names)
  return os.path.join(folder, *names)


def exists(path: str) -> bool:
  """Says whether a file (in a bucket: an object) of that name is there."""
  return bool(_home(path).exists(path))


def status(path: str) -> Status:
  """Returns the file's size and generation, which are of one and the same content.

  Raises:
    errors.DataError: There is no such file.
  """
  return Status(*_home(path).status(path))


def check_file(path: str | None, *, flag: str) -> None:
  """Checks, before work begins, that a file can be written later.

  A local one is tried; a bucket is asked whether it lets us in.

  Args:
    path: The file; none needs no check.
    flag: The flag that names it, for messages.

  Raises:
    errors.UsageError: It cannot be written.
    errors.DataError: The disk is full.
  """
  if path is not None:
    with _named(flag):
      exists(path) if is_bucket(path) else disk.check_file(path)


def check_folder(path: str, *, flag: str) -> None:
  """Checks, before work begins, that files can be written in a folder, if need be new.

  Args:
    path: The folder; one in a bucket is not written to, see `check_file`.
    flag: The flag that names it, for messages.

  Raises:
    errors.UsageError: It cannot be made or written.
    errors.DataError: The disk is full.
  """
  with _named(flag):
    exists(join(path, "manifest.json")) if is_bucket(path) else disk.check_folder(path)


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
  """Puts the flag before the path that a UsageError begins with."""
  try:
    yield
  except errors.UsageError as error:
    raise errors.UsageError(f"--{flag}={error}") from error


def size(path: str) -> int:
  """Returns the file's size in bytes.

  Raises:
    errors.DataError: There is no such file.
  """
  return status(path).size


def generation(path: str) -> str:
  """Returns a token that changes when the file is replaced.

  Raises:
    errors.DataError: There is no such file.
  """
  return status(path).generation


def read_bytes(path: str) -> bytes:
  """Returns the whole file.

  Raises:
    errors.DataError: There is no such file.
  """
  return bytes(_home(path).read_bytes(path))


def read_range(
  path: str, start: int, length: int, *, generation: str | None = None
) -> bytes:
  """Returns exactly the `length` bytes from byte `start` on.

  Args:
    path: The file.
    start: The first byte's position.
    length: In bytes.
    generation: What `generation(path)` returned when the file was first looked at.

  Raises:
    errors.DataError: The file is shorter, is not there or is another generation.
  """
  if length == 0:
    return b""
  content = bytes(_home(path).read_range(path, start, length, generation))
  if len(content) != length:
    length_there = size(path)
    kind = kind_of(bytes(_home(path).read_range(path, 0, HEAD_BYTES, generation)))
    raise errors.DataError(
      f"{path} has {length_there} bytes; bytes {start} to {start + length} were asked "
      f"for, so it was cut or is {kind or 'another file'}."
    )
  return content


def kind_of_file(path: str) -> str | None:
  """Returns what a file is that was found to be wrong, as `kind_of` says it.

  Raises:
    errors.DataError: There is no such file.
  """
  return kind_of(read_range(path, 0, min(size(path), HEAD_BYTES)))


def write_bytes(path: str, content: bytes, *, if_absent: bool = False) -> bool:
  """Writes the whole file at once; a reader sees the old content or the new.

  Args:
    path: The file.
    content: All of it.
    if_absent: Leave a file that is there already as it is.

  Returns:
    Whether it was written; False only with `if_absent`.

  Raises:
    errors.DataError: The disk is full.
  """
  home = uploads if is_bucket(path) else disk
  return home.write_bytes(path, content, if_absent=if_absent)


def upload(local: str, path: str, *, if_absent: bool = False) -> bool:
  """Puts the local file at `path`, in a bucket or on a disk.

  Args:
    local: The file to copy; it must not change meanwhile.
    path: Its new name.
    if_absent: Leave a file that is there already as it is.

  Returns:
    Whether it was written; False only with `if_absent`.

  Raises:
    errors.DataError: The disk is full.
  """
  home = uploads if is_bucket(path) else disk
  return home.upload(local, path, if_absent=if_absent)


def download(path: str, local: str) -> None:
  """Brings the file at `path` to the local name, whole or not at all.

  Raises:
    errors.DataError: There is no such file, it was replaced meanwhile, or the local
      disk is full.
  """
  with partial_file(local) as partial:
    _home(path).download(path, partial)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
  """Yields a local file with the content, which is the file itself if it is local.

  A copy has the same ending of its name and goes when the body ends.
  """
  if not is_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="facedist-") as folder:
    local = os.path.join(folder, posixpath.basename(path))
    download(path, local)
    yield local


def open_lines(path: str, *, escape: bool = False) -> Iterator[str]:
  """Yields the lines of a UTF-8 text file without their ends, in constant memory.

  With `escape`, bytes that are no UTF-8 become \\xNN instead of an error.

  Raises:
    errors.DataError: There is no such file, or it is not lines of UTF-8 text.
  """
  length, first = status(path)
  pieces = (
    read_range(path, start, min(_LINES_PIECE_BYTES, length - start), generation=first)
    for start in range(0, length, _LINES_PIECE_BYTES)
  )
  return lines.lines_of(pieces, path, escape=escape)


def list_names(folder: str) -> list[str]:
  """Returns the sorted names of the files and folders in `folder`.

  None if there is no such folder, which a bucket cannot tell from an empty one.
  """
  return list(_home(folder).list_names(folder))


def walk(folder: str) -> Iterator[Entry]:
  """Yields all files below `folder`, in byte-wise order of their paths.

  Memory does not grow with their number: a bucket is listed page by page, a disk
  folder by folder. Nothing is yielded where there is no such folder.

  Raises:
    errors.DataError: A link leads nowhere or in a circle.
  """
  for path, num_bytes in _home(folder).walk(folder):
    yield Entry(path, num_bytes)


def remove(path: str) -> None:
  """Removes a file; one that is not there is no error."""
  _home(path).remove(path)


def _home(path: str) -> Any:
  """Returns the module that reads this path."""
  return buckets if is_bucket(path) else disk
