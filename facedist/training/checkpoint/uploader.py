"""Copies a run's checkpoints and logs from a local folder to its workdir in a bucket.

Only the chief writes. If the workdir is on a disk, the chief writes there. If it is in
a bucket, the chief writes to a local staging folder and a thread uploads: of a
checkpoint the data, the index and then the marker, so that a checkpoint appears whole;
of a log the whole file whenever it has grown. A run that restarts deletes the staging
folder and continues from the newest checkpoint in the bucket.
"""

import abc
import collections
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator

from absl import logging

from facedist import errors, storage
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints

MAX_WAITING = 4
SYNC_SECONDS = 30.0
RETRY_SECONDS = 30.0


@contextlib.contextmanager
def open_uploader(
  workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
) -> Iterator["Uploader"]:
  """Yields the uploader of a run; uploads all that waits when the block ends.

  Args:
    workdir: The run's folder, local or gs://.
    is_chief: Whether this process writes; other processes upload nothing.
    keep_last: Number of newest checkpoints to keep.
    keep_every: Checkpoints at multiples of so many steps are never deleted; 0: none.
  """
  keep = {"keep_last": keep_last, "keep_every": keep_every}
  if not storage.is_bucket(workdir) or not is_chief:
    yield DiskUploader(workdir, is_chief=is_chief, **keep)
    return
  with staging_folder(workdir) as folder:
    uploader = BucketUploader(workdir, folder, **keep)
    try:
      yield uploader
    finally:
      uploader.finish()


class Uploader(abc.ABC):
  """Has the folder that the chief writes to, and copies it to the workdir.

  Attributes:
    workdir: The run's folder, local or gs://.
    folder: The local folder to write to.
    is_chief: Whether this worker's files are kept.
    missing: Names of what could not be written or uploaded.
  """

  def __init__(self, workdir: str, folder: str, *, is_chief: bool) -> None:
    self.workdir, self.folder = workdir, folder
    self.is_chief = is_chief
    self.missing: list[str] = []

  @abc.abstractmethod
  def publish(self, step: int) -> None:
    """Takes over the checkpoint of that step, saved in `folder`, and prunes."""

  @abc.abstractmethod
  def drain(self) -> None:
    """Waits for all uploads; drops those that a failing bucket refuses."""

  @abc.abstractmethod
  def finish(self) -> bool:
    """Waits for all uploads; returns whether the newest checkpoint is uploaded."""

  def check(self) -> None:
    """Raises SavingError, after `finish`, if anything is missing in the workdir."""
    if self.missing:
      raise errors.SavingError(
        f"{', '.join(self.missing)} did not reach {self.workdir}, see the log for the "
        "reason; fix that and, if the last step is missing, start again: training "
        "continues from the newest checkpoint in the workdir."
      )

  def record_missing(self, name: str) -> None:
    """Records that something could not be written."""
    if name not in self.missing:
      self.missing.append(name)

  def _set_saved(self, step: int) -> None:
    """Removes a step from `missing`: after a rewind it was saved again."""
    name = checkpoints.at(self.folder, step).name
    self.missing[:] = [other for other in self.missing if other != name]


class DiskUploader(Uploader):
  """The uploader of a workdir on a disk, where nothing has to be copied."""

  def __init__(
    self, workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
  ) -> None:
    super().__init__(workdir, workdir, is_chief=is_chief)
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}

  def publish(self, step: int) -> None:
    """Deletes the checkpoints that are no longer kept."""
    self._set_saved(step)
    checkpoints.prune(self.folder, **self._keep)

  def drain(self) -> None:
    """Does nothing: there are no uploads."""

  def finish(self) -> bool:
    """Returns True: there are no uploads."""
    return True


class BucketUploader(Uploader):
  """The uploader of a workdir in a bucket: a thread uploads from a local folder.

  Up to MAX_WAITING checkpoints wait; then `publish` waits too, so that a slow bucket
  loses none. If the bucket fails (after the retries of `storage`), training continues:
  the thread tries again every RETRY_SECONDS, and when too many checkpoints wait, the
  oldest that is not being uploaded is deleted.
  """

  def __init__(
    self,
    workdir: str,
    folder: str,
    *,
    keep_last: int,
    keep_every: int = 0,
    retry_seconds: float = RETRY_SECONDS,
    sync_seconds: float = SYNC_SECONDS,
  ) -> None:
    """Starts the thread.

    Args:
      workdir: The run's folder in a bucket.
      folder: A local folder of this process alone.
      keep_last: Number of newest checkpoints to keep in the bucket.
      keep_every: Checkpoints at multiples of so many steps are never deleted; 0: none.
      retry_seconds: Time between two attempts while the bucket fails.
      sync_seconds: Time between two uploads of logs that have grown.
    """
    super().__init__(workdir, folder, is_chief=True)
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}
    self._retry_seconds = retry_seconds
    self._sync_seconds = sync_seconds
    self._logs = FileUploader(folder, workdir, leave_out="checkpoints")
    self._logs.fetch(metric_writer.LOG_NAME)
    self._changed = threading.Condition()
    self._waiting: collections.deque[int] = collections.deque()
    self._is_uploading = self._is_failing = self._is_ending = False
    self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
    self._thread.start()

  def publish(self, step: int) -> None:
    """Queues a checkpoint; waits while the queue is full and the bucket works."""
    with self._changed:
      self._changed.wait_for(
        lambda: len(self._waiting) < MAX_WAITING or self._is_failing
      )
      if len(self._waiting) >= MAX_WAITING:
        # The first may be half uploaded, so the second is deleted.
        late = checkpoints.at(self.folder, self._waiting[1])
        logging.error("%s is given up: too many wait for the bucket", late.name)
        self.record_missing(late.name)
        checkpoints.remove(late)
        del self._waiting[1]
      if step not in self._waiting:
        self._waiting.append(step)
      self._changed.notify_all()

  def drain(self) -> None:
    """Waits until the queue is empty; empties it if the bucket fails.

    After it, a run that goes back to a checkpoint sees in the bucket all checkpoints
    that will ever be there. The dropped steps come after that checkpoint, so they are
    trained and saved again.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: not self._waiting or (self._is_failing and not self._is_uploading)
      )
      for step in self._waiting:
        dropped = checkpoints.at(self.folder, step)
        logging.warning("%s is dropped: the bucket fails", dropped.name)
        checkpoints.remove(dropped)
      self._waiting.clear()

  def finish(self) -> bool:
    """Uploads what waits, up to the first failure, and ends the thread."""
    with self._changed:
      self._is_ending = True
      self._changed.notify_all()
    self._thread.join()
    for step in self._waiting:
      self.record_missing(checkpoints.at(self.folder, step).name)
    return not self._waiting

  def _work(self) -> None:
    """Uploads checkpoints, the oldest first, and logs, until told to end."""
    is_last = False
    while not is_last:
      with self._changed:
        pause = self._retry_seconds if self._is_failing else self._sync_seconds
        self._changed.wait_for(self._is_due, pause)
        is_ending = self._is_ending
        head = self._waiting[0] if self._waiting else None
        self._is_uploading = head is not None
      is_good = head is None or self._upload(head)
      with self._changed:
        if is_good and head is not None:
          self._waiting.popleft()
        self._is_uploading, self._is_failing = False, not is_good
        is_last = is_ending and (self._is_failing or not self._waiting)
        self._changed.notify_all()
      if is_good and not self._try("logs", self._logs.sync) and is_last:
        self.record_missing("the newest logs")

  def _is_due(self) -> bool:
    """Says whether there is something to do before the pause is over."""
    return self._is_ending or (bool(self._waiting) and not self._is_failing)

  def _upload(self, step: int) -> bool:
    """Uploads a checkpoint and prunes in the bucket; returns whether it is there."""
    local = checkpoints.at(self.folder, step)
    if not self._try(local.name, lambda: checkpoints.upload(local, self.workdir)):
      return False
    logging.info("step %d is in %s", step, self.workdir)
    checkpoints.remove(local)
    self._set_saved(step)
    self._try("pruning", lambda: checkpoints.prune(self.workdir, **self._keep))
    return True

  def _try(self, what: str, action: Callable[[], None]) -> bool:
    """Returns whether `action` succeeded; logs why it did not."""
    try:
      action()
    except Exception as error:  # whatever it is, training continues
      logging.error("%s did not reach %s: %s", what, self.workdir, error)
      return False
    return True


@contextlib.contextmanager
def staging_folder(workdir: str) -> Iterator[str]:
  """Yields the empty local folder of a run whose workdir is in a bucket.

  It lies in the folder for temporary files (TMPDIR) and is named after the workdir.
  What a killed process left there is deleted. If another process is still uploading
  from it, this one waits, since both belong to the same run.
  """
  name = f"facedist-workdir-{storage.crc32c_of(workdir.encode()):08x}"
  folder = os.path.join(tempfile.gettempdir(), name)
  with open(f"{folder}.lock", "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("another process here still writes to %s; waiting for it", workdir)
      fcntl.flock(lock, fcntl.LOCK_EX)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class FileUploader:
  """Copies the files of a local folder, such as logs, to a workdir when they change.

  An object cannot be appended to, so each copy is the whole file; of a .jsonl file, up
  to the end of its last whole line. If the folder is the workdir, nothing is copied.
  """

  def __init__(self, folder: str, workdir: str, *, leave_out: str = "") -> None:
    """Copies nothing yet.

    Args:
      folder: A local folder.
      workdir: Where its files go, under their paths below `folder`.
      leave_out: Name of a folder in `folder` that is not copied.
    """
    self.folder = folder
    self._workdir = workdir
    self._leave_out = leave_out
    self._copied: dict[str, tuple[int, int]] = {}

  def fetch(self, name: str) -> None:
    """Downloads a file of the workdir, if it exists, so that it can be appended to."""
    source = storage.join(self._workdir, name)
    if self.folder != self._workdir and storage.exists(source):
      storage.download(source, os.path.join(self.folder, name))

  def sync(self) -> None:
    """Copies what has changed since the last call; call it from one thread at a time.

    Raises:
      errors.FacedistError: The workdir cannot be written.
    """
    if self.folder == self._workdir:
      return
    for name in self._names():
      path = os.path.join(self.folder, name)
      status = os.stat(path)
      version = (status.st_size, status.st_mtime_ns)  # from before the file is read
      if self._copied.get(name) == version:
        continue
      content = storage.read_bytes(path)
      if path.endswith(".jsonl"):
        content = metric_writer.whole_lines(content)
      storage.write_bytes(storage.join(self._workdir, *name.split(os.sep)), content)
      self._copied[name] = version

  def _names(self) -> Iterator[str]:
    """Yields the paths of all files to copy, relative to the folder."""
    for parent, folders, files in os.walk(self.folder):
      folders[:] = sorted(set(folders) - {self._leave_out})
      for name in sorted(files):
        yield os.path.relpath(os.path.join(parent, name), self.folder)


@contextlib.contextmanager
def file_uploader(workdir: str) -> Iterator[FileUploader]:
  """Yields a FileUploader of the workdir itself, or of a temporary folder for a bucket.

  The caller copies the files with `sync`; what has changed since is copied at the end.
  """
  if not storage.is_bucket(workdir):
    yield FileUploader(workdir, workdir)
    return
  with tempfile.TemporaryDirectory(prefix="facedist-logs-") as folder:
    uploader = FileUploader(folder, workdir)
    yield uploader
    uploader.sync()
