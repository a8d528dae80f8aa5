"""Files on a local disk or a shared one."""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import uuid
from collections.abc import Iterator

from facedist import errors

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exists(path: str) -> bool:
  """Says whether there is a file or folder of that name."""
  return os.path.exists(path)


def status(path: str) -> tuple[int, str]:
  """Returns the file's bytes, and a token that changes when it is written to."""
  with _missing_is_a_data_error(path):
    found = os.stat(path)
  return found.st_size, _generation(found)


def read_bytes(path: str) -> bytes:
  """Returns the whole file."""
  with _missing_is_a_data_error(path):
    return pathlib.Path(path).read_bytes()


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the file ends."""
  with _missing_is_a_data_error(path), open(path, "rb") as stream:
    if generation not in (None, _generation(os.fstat(stream.fileno()))):
      raise errors.DataError(
        f"{path} was replaced since it was first read; start anew."
      )
    stream.seek(start)
    return stream.read(length)


def write_bytes(path: str, content: bytes, *, if_absent: bool) -> bool:
  """Writes the whole file; returns whether it did, see `put`."""
  with _named_for(path, if_absent=if_absent) as outcome:
    pathlib.Path(outcome.partial).write_bytes(content)
  return outcome.written


def upload(local: str, path: str, *, if_absent: bool) -> bool:
  """Copies a file; returns whether it did, see `put`."""
  with _named_for(path, if_absent=if_absent) as outcome:
    shutil.copyfile(local, outcome.partial)
  return outcome.written


def download(path: str, partial: str) -> None:
  """Copies the file to the local name."""
  with _missing_is_a_data_error(path):
    shutil.copyfile(path, partial)


@contextlib.contextmanager
def partial_file(path: str) -> Iterator[str]:
  """Yields a name beside the local `path`; moves it there if the body succeeds.

  The content is on the disk before it has its name, so a crash of the machine
  leaves no half-written file under the final name. A leftover of an earlier
  process that was killed keeps its own name and is never read.

  Raises:
    errors.DataError: The disk is full.
  """
  with _named_for(path, if_absent=False) as outcome:
    yield outcome.partial


def list_names(folder: str) -> list[str]:
  """Returns the sorted names in a folder; none if there is no such folder."""
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
  status = os.stat(here)
  if (status.st_dev, status.st_ino) in above:
    raise errors.DataError(f"{here} links to a folder that holds it; remove the link.")
  above = (*above, (status.st_dev, status.st_ino))
  with os.scandir(here) as found:
    # As a path goes on with a slash, `a/b` comes after `a.b`.
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
      yield name, num_bytes


def remove(path: str) -> None:
  """Removes a file; one that is not there is no error."""
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


class _Outcome:
  """A write under way: the name to write to, and later whether it took effect."""

  def __init__(self, partial: str) -> None:
    self.partial = partial
    self.written = True


@contextlib.contextmanager
def _named_for(path: str, *, if_absent: bool) -> Iterator[_Outcome]:
  """Moves what the body writes to `outcome.partial` to `path`, at once or not at all.

  With `if_absent`, a file that is there already stays, and `outcome.written` says so.
  """
  folder = os.path.dirname(path)
  if folder:
    os.makedirs(folder, exist_ok=True)
  outcome = _Outcome(partial_name(path))
  try:
    with full_is_a_data_error(path):
      yield outcome
      with open(outcome.partial, "rb") as stream:
        os.fsync(stream.fileno())
      if if_absent:
        # A hard link, unlike a rename, fails where the name is taken.
        try:
          os.link(outcome.partial, path)
        except FileExistsError:
          outcome.written = False
        os.remove(outcome.partial)
      else:
        os.replace(outcome.partial, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(outcome.partial)
    raise


def partial_name(path: str) -> str:
  """Returns a name of this process alone, beside `path`, to write under.

  Who cleans up after a killed process sees by the name whether it still lives.
  """
  writer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
  return f"{path}.partial-{writer}"


@contextlib.contextmanager
def full_is_a_data_error(path: str) -> Iterator[None]:
  """Turns 'no space left' into a DataError that names what was to be written."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_SPACE:
      raise
    raise errors.DataError(
      f"{path}: {os.strerror(error.errno)}; free space on its disk or name another "
      "folder."
    ) from error


def _generation(status: os.stat_result) -> str:
  return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


@contextlib.contextmanager
def _missing_is_a_data_error(path: str) -> Iterator[None]:
  """Turns 'not found' into a DataError that names the file."""
  try:
    yield
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} does not exist; check its spelling.") from error
