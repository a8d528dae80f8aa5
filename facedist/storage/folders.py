"""Folders that appear whole: nobody sees one that is half written, nothing is lost."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

from absl import logging

from facedist import errors
from facedist.storage import buckets, disk, objects, uploads

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def new_folder(path: str, *, last: str) -> Iterator[str]:
  """Yields an empty local folder; what is in it at the end is the folder `path`.

  On a disk it lies beside `path` and is renamed. To a bucket its files are uploaded,
  `last` after all others: a folder without it is not whole. If the body or an upload
  fails, what was written is removed again.

  Args:
    path: The folder to make, local or gs://.
    last: Name of the file that readers look for first.

  Raises:
    FileExistsError: `path` is there and no empty folder, or became so meanwhile.
    errors.DataError: The disk is full.
  """
  if path.startswith(objects.PREFIX):
    with tempfile.TemporaryDirectory(prefix="facedist-") as local:
      yield local
      _upload(local, path, last)
    return
  final = os.path.realpath(path)
  partial = disk.partial_name(final)
  try:
    with disk.writable(path, os.path.dirname(final)):
      os.makedirs(partial)
      yield partial
      _flush(partial)
    _rename(partial, final)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: str, final: str) -> None:
  """Gives a folder its name, which nothing but an empty folder may have."""
  try:
    os.rename(partial, final)
  except OSError as error:
    if error.errno in _TAKEN:
      raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final) from error
    raise


def _flush(folder: str) -> None:
  """Brings all files of a folder to the disk."""
  for name, _ in disk.walk(folder):
    with open(os.path.join(folder, name), "rb") as stream:
      os.fsync(stream.fileno())


def _upload(local: str, path: str, last: str) -> None:
  """Uploads all files of a folder, `last` after the others, to names that are free."""
  names = [name for name, _ in disk.walk(local)]
  uploaded = []
  try:
    for name in sorted(names, key=lambda name: name == last):
      target = f"{path.rstrip('/')}/{name}"
      if not uploads.upload(os.path.join(local, name), target, if_absent=True):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
      uploaded.append(target)
  except BaseException:
    _take_back(uploaded)
    raise


def _take_back(paths: list[str]) -> None:
  """Removes objects, the newest first; stops where the bucket does not answer."""
  try:
    for path in reversed(paths):
      buckets.remove(path)
  except errors.FacedistError as error:
    logging.error("left behind because the bucket fails: %s (%s)", paths, error)
