"""Small files that grow, such as logs: copied whole to a bucket, again and again."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from facedist import storage
from facedist.training import logs


class Mirror:
  """Copies the files of a local folder to a workdir in a bucket, when they changed.

  Objects cannot be appended to, so each copy is the whole file; of a .jsonl file, up to
  its last whole line. Where the folder is the workdir itself there is nothing to do.
  """

  def __init__(self, folder: str, workdir: str, *, leave_out: str = "") -> None:
    """Copies nothing yet.

    Args:
      folder: A local folder.
      workdir: Where its files go, under their paths below `folder`.
      leave_out: Name of a folder in `folder` that stays.
    """
    self.folder = folder
    self._workdir = workdir
    self._leave_out = leave_out
    self._sent: dict[str, tuple[int, int]] = {}

  def fetch(self, name: str) -> None:
    """Brings a file from the workdir, if it is there, to be written on."""
    source = storage.join(self._workdir, name)
    if self.folder != self._workdir and storage.exists(source):
      storage.download(source, os.path.join(self.folder, name))

  def sync(self) -> None:
    """Copies what has changed since the last call; in one thread at a time."""
    if self.folder == self._workdir:
      return
    for name in self._names():
      path = os.path.join(self.folder, name)
      status = os.stat(path)
      version = (status.st_size, status.st_mtime_ns)  # of before it is read
      if self._sent.get(name) != version:
        target = storage.join(self._workdir, *name.split(os.sep))
        content = storage.read_bytes(path)
        is_lines = path.endswith(".jsonl")
        storage.write_bytes(target, logs.whole_lines(content) if is_lines else content)
        self._sent[name] = version

  def _names(self) -> Iterator[str]:
    """Yields the paths of all files below the folder, less what stays."""
    for parent, folders, files in os.walk(self.folder):
      folders[:] = sorted(set(folders) - {self._leave_out})
      for name in sorted(files):
        yield os.path.relpath(os.path.join(parent, name), self.folder)


@contextlib.contextmanager
def beside(workdir: str) -> Iterator[Mirror]:
  """Yields a mirror whose folder is the workdir, or a temporary one for a bucket."""
  if not storage.is_bucket(workdir):
    yield Mirror(workdir, workdir)
    return
  with tempfile.TemporaryDirectory(prefix="facedist-logs-") as folder:
    yield Mirror(folder, workdir)
