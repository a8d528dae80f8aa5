"""Paths, local and gs://: every file is read, written and listed through these.

Each function calls its namesake in `local` or `gcs`. Every write is atomic: the final
name holds the whole content or does not exist.
"""

import contextlib
import errno
import os
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from facedist import errors
from facedist.storage import contents, gcs, local
from facedist.storage.contents import HEAD_BYTES, kind_of
from facedist.storage.local import partial_file

BUCKET_PREFIX = gcs.PREFIX


class Entry(NamedTuple):
  """A file found by `walk`.

  Attributes:
    path: Below the folder, with forward slashes.
    size: Bytes.
  """

  path: str
  size: int


class Status(NamedTuple):
  """A file as it was at one moment.

  Attributes:
    size: Bytes.
    generation: A token that changes when the file is replaced.
  """

  size: int
  generation: str


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
  """Returns the file's size and generation, both of the same content.

  Raises:
    errors.DataError: There is no such file.
  """
  return Status(*_home(path).status(path))


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
      f"{path} has {length_there} bytes, but bytes {start} to {start + length} were "
      f"requested: it was cut or is {kind or 'another file'}."
    )
  return content


def kind_of_file(path: str) -> str | None:
  """Returns the kind of a file whose content is not what was expected, see `kind_of`.

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
  return bool(_home(path).write_bytes(path, content, if_absent=if_absent))


def upload(local_path: str, path: str, *, if_absent: bool = False) -> bool:
  """Copies a local file, which must not change meanwhile; else as `write_bytes`."""
  return bool(_home(path).upload(local_path, path, if_absent=if_absent))


@contextlib.contextmanager
def new_file(path: str, *, if_absent: bool = False) -> Iterator[str]:
  """Yields a local name to write to; the content is at `path` if the body succeeds.

  For a bucket the file is written to a temporary folder and uploaded at the end.

  Args:
    path: The file, in a bucket or on a disk.
    if_absent: Leave a file that is there already as it is.

  Raises:
    FileExistsError: With `if_absent`, a file is there already.
    errors.DataError: The disk is full.
  """
  if not is_bucket(path):
    with partial_file(path, if_absent=if_absent) as partial:
      yield partial
    return
  with scratch(), tempfile.TemporaryDirectory(prefix="facedist-") as folder:
    local_path = os.path.join(folder, posixpath.basename(path))
    yield local_path
    if not upload(local_path, path, if_absent=if_absent):
      raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def download(path: str, local_path: str) -> None:
  """Copies the file at `path` to the local name, whole or not at all.

  Raises:
    errors.DataError: There is no such file, it was replaced meanwhile, or the local
      disk is full.
  """
  with partial_file(local_path) as partial:
    _home(path).download(path, partial)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
  """Yields a local file with the content: the file itself, or a copy from a bucket.

  A copy has the same name in a temporary folder and is removed when the body ends.
  """
  if not is_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="facedist-") as folder:
    local_path = os.path.join(folder, posixpath.basename(path))
    download(path, local_path)
    yield local_path


def remove(path: str) -> None:
  """Removes a file; one that is not there is no error."""
  _home(path).remove(path)


def list_names(folder: str) -> list[str]:
  """Returns the sorted names of the files and folders in `folder`.

  The list is empty if there is no such folder: buckets do not tell the difference.
  """
  return list(_home(folder).list_names(folder))


def walk(folder: str) -> Iterator[Entry]:
  """Yields all files below `folder`, in byte-wise order of their paths.

  Memory does not grow with their number: a bucket is listed page by page, a disk
  folder by folder. A folder that does not exist has no files.

  Raises:
    errors.DataError: A link leads nowhere or in a circle.
  """
  for path, num_bytes in _home(folder).walk(folder):
    yield Entry(path, num_bytes)


def _home(path: str) -> Any:
  """Returns the module that reads this path."""
  return gcs if is_bucket(path) else local


def check_file(path: str | None, *, flag: str) -> None:
  """Checks, before work begins, that a file can be written later.

  On a disk a file is written and removed; of a bucket the access is checked.

  Args:
    path: The file; None is not checked.
    flag: The flag that names it, for messages.

  Raises:
    errors.UsageError: It cannot be written.
    errors.DataError: The disk is full.
  """
  if path is not None:
    with _named(flag):
      exists(path) if is_bucket(path) else local.check_file(path)


def check_folder(path: str, *, flag: str) -> None:
  """Checks, before work begins, that files can be written in a folder.

  Args:
    path: The folder, which need not exist; one in a bucket is not written to.
    flag: The flag that names it, for messages.

  Raises:
    errors.UsageError: It cannot be made or written.
    errors.DataError: The disk is full.
  """
  with _named(flag):
    exists(join(path, "manifest.json")) if is_bucket(path) else local.check_folder(path)


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
  """Puts the flag before the path that a UsageError begins with."""
  try:
    yield
  except errors.UsageError as error:
    raise errors.UsageError(f"--{flag}={error}") from error


@contextlib.contextmanager
def scratch(folder: str | None = None) -> Iterator[str]:
  """Yields the folder for the temporary files that the body writes.

  Args:
    folder: The --scratch_dir, made if it does not exist; None is the system's.

  Raises:
    errors.UsageError: The folder cannot be made or written.
    errors.DataError: Its disk is full.
  """
  where = f"--scratch_dir={folder}" if folder else f"TMPDIR={tempfile.gettempdir()}"
  try:
    if folder:
      os.makedirs(folder, exist_ok=True)
    yield folder or tempfile.gettempdir()
  except OSError as error:
    if error.errno in local.NO_SPACE:
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


_LINES_PIECE_BYTES = 4 << 20
_MAX_LINE_BYTES = 1 << 20
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f]")  # a text file has no others than tabs


def open_lines(path: str, *, escape: bool = False) -> Iterator[str]:
  """Yields the lines of a UTF-8 text file without their ends, in constant memory.

  With `escape`, bytes that are not UTF-8 become \\xNN instead of an error.

  Raises:
    errors.DataError: There is no such file, or it is not lines of UTF-8 text.
  """
  length, first = status(path)
  pieces = (
    read_range(path, start, min(_LINES_PIECE_BYTES, length - start), generation=first)
    for start in range(0, length, _LINES_PIECE_BYTES)
  )
  return lines_of(pieces, path, escape=escape)


def lines_of(
  pieces: Iterable[bytes], path: str, *, escape: bool = False
) -> Iterator[str]:
  """Yields the lines of UTF-8 text without their ends, which may be \\n or \\r\\n.

  Args:
    pieces: The file's content, cut anywhere.
    path: The file's name, for messages.
    escape: Whether bytes that are not UTF-8 become \\xNN, as in a list of old names.

  Raises:
    errors.DataError: A line is not UTF-8 or longer than 1 MiB, or the file is a
      placeholder for another one, such as a Git LFS pointer.
  """
  number, rest = 0, b""
  for piece in pieces:
    if not number and (kind := contents.kind_of_text(rest + piece)):
      raise errors.DataError(f"{path} is {kind}.")
    *whole, rest = (rest + piece).split(b"\n")
    for line in whole:
      number += 1
      yield _decoded(line, path, number, escape)
    _check_length(rest, path, number + 1)
  if rest:
    yield _decoded(rest, path, number + 1, escape)


def _check_length(line: bytes, path: str, number: int) -> None:
  """Raises DataError for a line, or the start of one, that is too long."""
  if len(line) > _MAX_LINE_BYTES:
    raise errors.DataError(
      f"{path}, line {number} is longer than 1 MiB; give a text file."
    )


def _decoded(line: bytes, path: str, number: int, escape: bool) -> str:
  """Returns the text of a line without its end."""
  _check_length(line, path, number)
  try:
    return line.removesuffix(b"\r").decode()
  except UnicodeDecodeError as error:
    if escape and not _CONTROL.search(line.removesuffix(b"\r")):
      return line.removesuffix(b"\r").decode(errors="backslashreplace")
    if number == 1:
      contents.refuse_kind(line, path)
    raise errors.DataError(
      f"{path}, line {number} is not UTF-8 at its byte {error.start}; convert the file."
    ) from error
