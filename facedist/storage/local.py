"""Files and folders on a local disk or a shared one.

A new file or folder is written beside its place under a name of this process alone,
flushed, and then renamed: a reader sees all of it or nothing. Errors of the system
become one line that says what to do.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator

from absl import logging

from facedist import errors
from facedist.storage import gcs


def exists(path: str) -> bool:
  """Says whether there is a file or folder of that name."""
  try:
    os.stat(path)
  except OSError as error:
    if error.errno in _REFUSED:
      raise unreadable(path, error) from error
    return False
  return True


def status(path: str) -> tuple[int, str]:
  """Returns the file's bytes, and a token that changes when it is written to."""
  with readable(path):
    found = os.stat(path)
  return found.st_size, _generation(found)


def read_bytes(path: str) -> bytes:
  """Returns the whole file."""
  with readable(path):
    return pathlib.Path(path).read_bytes()


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the file ends."""
  with readable(path), open(path, "rb") as stream:
    if generation not in (None, _generation(os.fstat(stream.fileno()))):
      raise errors.DataError(
        f"{path} was replaced since it was first read; start anew."
      )
    stream.seek(start)
    return stream.read(length)


def write_bytes(path: str, content: bytes, *, if_absent: bool) -> bool:
  """Writes the whole file; returns whether it did, see `_named_for`."""
  with _named_for(path, if_absent=if_absent) as outcome:
    pathlib.Path(outcome.partial).write_bytes(content)
  return outcome.written


def upload(local: str, path: str, *, if_absent: bool) -> bool:
  """Copies a file; returns whether it did, see `_named_for`."""
  with _named_for(path, if_absent=if_absent) as outcome:
    shutil.copyfile(local, outcome.partial)
  return outcome.written


def download(path: str, partial: str) -> None:
  """Copies the file to the local name."""
  with readable(path):
    shutil.copyfile(path, partial)


def remove(path: str) -> None:
  """Removes a file; one that is not there is no error."""
  with (
    writable(path, path),
    contextlib.suppress(FileNotFoundError, NotADirectoryError),
  ):
    os.remove(path)


def list_names(folder: str) -> list[str]:
  """Returns the sorted names in a folder; none if there is no such folder."""
  with readable(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def walk(
  folder: str, below: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, int]]:
  """Yields (path below `folder`, size in bytes) in byte-wise order of the path.

  Only the names of the folders on the way to the current file are held.

  Args:
    folder: Where to begin; links are followed.
    below: Which folder below it to walk, ending with a slash.
    above: Device and inode of the folders on the way there.

  Raises:
    errors.DataError: A link leads nowhere, or to a folder that holds it.
  """
  here = os.path.join(folder, below)
  if not os.path.isdir(here):
    return
  with readable(here):
    status = os.stat(here)
  if (status.st_dev, status.st_ino) in above:
    raise errors.DataError(f"{here} links to a folder that holds it; remove the link.")
  above = (*above, (status.st_dev, status.st_ino))
  with readable(here), os.scandir(here) as found:
    # In a path a slash follows the name, so `a/b` comes after `a.b`.
    names = sorted(
      (os.fsencode(entry.name + "/" * entry.is_dir()) for entry in found), reverse=True
    )
  while names:
    name = below + os.fsdecode(names.pop())
    if name.endswith("/"):
      yield from walk(folder, name, above)
    else:
      path = os.path.join(folder, name)
      try:
        num_bytes = os.stat(path).st_size
      except FileNotFoundError as error:
        if os.path.islink(path):
          raise errors.DataError(f"{path} is a link that leads nowhere.") from error
        continue  # gone since it was listed
      except OSError as error:
        raise unreadable(path, error) from error
      yield name, num_bytes


def check_file(path: str) -> None:
  """Checks that a file can be written at `path`; leaves nothing behind."""
  if os.path.isdir(path) or not os.path.basename(path):
    raise errors.UsageError(f"{path} cannot be written: {_OF_WRITING[errno.EISDIR]}.")
  if os.path.exists(path) and not os.path.isfile(
    path
  ):  # a rename would replace /dev/null
    raise errors.UsageError(f"{path} cannot be written: it is no file; name a file.")
  _try_writing(path, partial_name(path))


def check_folder(folder: str) -> None:
  """Checks that files can be written in a folder, which need not exist yet."""
  _try_writing(folder, partial_name(os.path.join(folder, "try")))


def _try_writing(path: str, partial: str) -> None:
  """Writes a file in the lowest existing folder above `partial`.

  Args:
    path: What the user named, for messages.
    partial: The name that a process would write to first.
  """
  there, name = os.path.split(partial)
  missing = [name]
  while there and not os.path.lexists(there):
    there, name = os.path.split(there)
    missing.append(name)
  with writable(path, there):
    for name in filter(None, missing):  # one of them may be too long
      with contextlib.suppress(FileNotFoundError):
        os.stat(os.path.join(there, name))
    tried = os.path.join(there, os.path.basename(partial))
    pathlib.Path(tried).touch()
    os.remove(tried)


@contextlib.contextmanager
def partial_file(path: str, *, if_absent: bool = False) -> Iterator[str]:
  """Yields a name beside the local `path`; moves it there if the body succeeds.

  The content is on the disk before it has its name, so a crash of the machine
  leaves no half-written file under the final name. A leftover of an earlier
  process that was killed keeps its own name and is never read.

  Raises:
    FileExistsError: With `if_absent`, a file is there already; it stays as it is.
    errors.DataError: The disk is full.
  """
  with _named_for(path, if_absent=if_absent) as outcome:
    yield outcome.partial
  if not outcome.written:
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


class _Outcome:
  """A write in progress: the name to write to, and at the end whether it was kept."""

  def __init__(self, partial: str) -> None:
    self.partial = partial
    self.written = True


@contextlib.contextmanager
def _named_for(path: str, *, if_absent: bool) -> Iterator[_Outcome]:
  """Moves what the body writes to `outcome.partial` to `path`, at once or not at all.

  With `if_absent`, an existing file stays and `outcome.written` becomes False.
  """
  folder = os.path.dirname(path)
  outcome = _Outcome(partial_name(path))
  try:
    with writable(path, folder):
      if folder:
        os.makedirs(folder, exist_ok=True)
      yield outcome
      with open(outcome.partial, "rb") as stream:
        os.fsync(stream.fileno())
      if if_absent:
        outcome.written = _take_name(outcome.partial, path)
      else:
        os.replace(outcome.partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(outcome.partial)
    raise


def partial_name(path: str) -> str:
  """Returns a temporary name beside `path` that no other process uses.

  It holds host and process, so that a clean-up can tell whether the writer still runs.
  """
  writer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
  return f"{path}.partial-{writer}"


# What a file system without hard links says, such as that of a bucket or a memory card.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def _take_name(partial: str, path: str) -> bool:
  """Renames a file unless the new name is taken; returns whether it did."""
  try:
    os.link(partial, path)  # unlike a rename, it fails where the name is taken
  except FileExistsError:
    os.remove(partial)
    return False
  except OSError as error:
    if error.errno not in _NO_LINKS:
      raise
    try:
      os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
      os.remove(partial)
      return False
    os.replace(partial, path)
    return True
  os.remove(partial)
  return True


def _generation(status: os.stat_result) -> str:
  return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def new_folder(path: str, *, last: str) -> Iterator[str]:
  """Yields an empty local folder; what is in it at the end is the folder `path`.

  On a disk it lies beside `path` and is renamed. To a bucket its files are uploaded,
  `last` after all others, so a folder without that file is not complete. If the body or
  an upload fails, what was written is removed again.

  Args:
    path: The folder to make, local or gs://.
    last: Name of the file that readers open first.

  Raises:
    FileExistsError: `path` exists and is not an empty folder.
    errors.DataError: The disk is full.
  """
  if path.startswith(gcs.PREFIX):
    with tempfile.TemporaryDirectory(prefix="facedist-") as local:
      yield local
      _upload(local, path, last)
    return
  final = os.path.realpath(path)
  partial = partial_name(final)
  try:
    with writable(path, os.path.dirname(final)):
      os.makedirs(partial)
      yield partial
      _flush(partial)
    _rename(partial, final)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: str, final: str) -> None:
  """Renames a folder; FileExistsError unless the name is free or an empty folder."""
  try:
    os.rename(partial, final)
  except OSError as error:
    if error.errno in _TAKEN:
      raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final) from error
    raise


def _flush(folder: str) -> None:
  """Flushes all files of a folder to the disk."""
  for name, _ in walk(folder):
    with open(os.path.join(folder, name), "rb") as stream:
      os.fsync(stream.fileno())


def _upload(local: str, path: str, last: str) -> None:
  """Uploads all files of a folder to free names, `last` after the others."""
  names = [name for name, _ in walk(local)]
  uploaded = []
  try:
    for name in sorted(names, key=lambda name: name == last):
      target = f"{path.rstrip('/')}/{name}"
      if not gcs.upload(os.path.join(local, name), target, if_absent=True):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
      uploaded.append(target)
  except BaseException:
    _take_back(uploaded)
    raise


def _take_back(paths: list[str]) -> None:
  """Removes objects, the newest first; stops if the bucket does not answer."""
  try:
    for path in reversed(paths):
      gcs.remove(path)
  except errors.FacedistError as error:
    logging.error("left behind because the bucket fails: %s (%s)", paths, error)


def is_pattern(path: str) -> bool:
  """Says whether TensorFlow reads the path as a pattern when it loads weights."""
  return any(character in path for character in "*?[]\\")


@contextlib.contextmanager
def plain_name(folder: str) -> Iterator[str]:
  """Yields a name of a local folder that TensorFlow does not read as a pattern.

  It is the folder's own name, or the kernel's, which is valid until the body ends.
  """
  if not is_pattern(folder):
    yield folder
    return
  opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    yield f"/proc/self/fd/{opened}"
  finally:
    os.close(opened)


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
_OF_READING = {
  errno.EISDIR: "it is a folder; name a file",
  errno.ENOTDIR: "a part of the path is a file; check the path",
  errno.EACCES: "permission denied; let this user read it",
  errno.EPERM: "not permitted; let this user read it",
  errno.ENAMETOOLONG: "the name is too long; shorten it",
  errno.ELOOP: "its links lead in a circle; remove one",
}
_OF_WRITING = {
  errno.EISDIR: "it is a folder; name a file",
  errno.ENOTDIR: "a part of the path is a file; name another path",
  errno.EEXIST: "a file is where a folder must be; name another path",
  errno.EACCES: "permission denied; name a folder that this user may write to",
  errno.EPERM: "not permitted; name a folder that this user may write to",
  errno.EROFS: "the file system is read-only; name a folder on another one",
  errno.ENAMETOOLONG: "the name is too long; shorten it",
  errno.ELOOP: "its links lead in a circle; remove one",
  errno.ENOENT: "the system makes no file there; name another folder",
}


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
  """Turns an error of the system while reading into a DataError about the file."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise
    raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> errors.DataError:
  """Returns the error for a file or folder that the system does not let us read."""
  if error.errno == errno.ENOENT:
    return errors.DataError(f"{path} does not exist; check its spelling.")
  return errors.DataError(f"{path} cannot be read: {_reason(error, _OF_READING)}.")


@contextlib.contextmanager
def writable(path: str, folder: str) -> Iterator[None]:
  """Turns an error of the system about a file in `folder` into one about `path`."""
  try:
    with disk_full_as_data_error(path):
      yield
  except OSError as error:
    place = os.fsdecode(error.filename or "")
    is_ours = place.startswith(folder) or folder.startswith(place)
    if error.errno is None or not place or not is_ours:
      raise
    reason = _reason(error, _OF_WRITING)
    kind = errors.UsageError if error.errno in _OF_WRITING else errors.DataError
    raise kind(f"{path} cannot be written: {reason}.") from error


@contextlib.contextmanager
def disk_full_as_data_error(path: str) -> Iterator[None]:
  """Turns 'no space left' into a DataError that names what was to be written."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_SPACE:
      raise
    raise errors.DataError(_full(path, error.errno)) from error


def explain(error: OSError) -> errors.DataError | None:
  """Returns the error for a file, if it is not known whether it was read or written.

  None for an error of the system that is not about a file.
  """
  if error.errno is None or not isinstance(error.filename, str | bytes):
    return None
  path = os.fsdecode(error.filename)
  if error.errno in NO_SPACE:
    return errors.DataError(_full(path, error.errno))
  if error.errno in (*_OF_READING, errno.ENOENT):
    return unreadable(path, error)
  return errors.DataError(f"{path} cannot be used: {_reason(error, _OF_WRITING)}.")


def _full(path: str, number: int) -> str:
  """Returns the message for a disk that has no room for a file."""
  return (
    f"{path}: {os.strerror(number)}; free space on its disk or name another folder."
  )


def _reason(error: OSError, known: dict[int, str]) -> str:
  """Returns what the system said and what to do about it."""
  number = error.errno or 0
  return known.get(number) or f"{os.strerror(number).lower()}; check the disk"
