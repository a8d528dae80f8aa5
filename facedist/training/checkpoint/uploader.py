"""The way of a run's files to its workdir: at once on a disk, behind it to a bucket.

Only the chief writes. For a workdir in a bucket it writes to a local folder, and a
thread brings checkpoints and logs to the bucket: of a checkpoint the data, then the
index, then the marker, so that nobody sees a half of one. The bucket is what counts: a
run that starts again forgets the local folder and goes on from the bucket's newest.

The local folder of a run whose workdir is in a bucket: one process's at a time.

Small files that grow, such as logs: copied whole to a bucket, again and again.
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


@contextlib.contextmanager
def staging_folder(workdir: str) -> Iterator[str]:
  """Yields an empty folder among the temporary ones (TMPDIR), named by the workdir.

  What a killed process left there is deleted. One that is still sending is waited for,
  since what it sends is part of the same run.
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
        storage.write_bytes(
          target, metric_writer.whole_lines(content) if is_lines else content
        )
        self._sent[name] = version

  def _names(self) -> Iterator[str]:
    """Yields the paths of all files below the folder, less what stays."""
    for parent, folders, files in os.walk(self.folder):
      folders[:] = sorted(set(folders) - {self._leave_out})
      for name in sorted(files):
        yield os.path.relpath(os.path.join(parent, name), self.folder)


@contextlib.contextmanager
def file_uploader(workdir: str) -> Iterator[FileUploader]:
  """Yields a mirror whose folder is the workdir, or a temporary one for a bucket."""
  if not storage.is_bucket(workdir):
    yield FileUploader(workdir, workdir)
    return
  with tempfile.TemporaryDirectory(prefix="facedist-logs-") as folder:
    yield FileUploader(folder, workdir)


MOST_WAITING = 4
SYNC_SECONDS = 30.0
RETRY_SECONDS = 30.0


class Uploader(abc.ABC):
  """Where the chief of a run writes, and how that reaches the workdir.

  Attributes:
    workdir: The run's folder, local or gs://.
    folder: The local folder to write to.
    is_chief: Whether this worker's files count.
    missing: What could not be written or did not reach the workdir, by name.
  """

  def __init__(self, workdir: str, folder: str, *, is_chief: bool) -> None:
    self.workdir, self.folder = workdir, folder
    self.is_chief = is_chief
    self.missing: list[str] = []

  @abc.abstractmethod
  def publish(self, step: int) -> None:
    """Hands over the checkpoint of that step, saved in `folder`, and prunes."""

  @abc.abstractmethod
  def settle(self) -> None:
    """Returns when nothing is on its way; what a failing bucket refuses is dropped."""

  @abc.abstractmethod
  def finish(self) -> bool:
    """Waits for all that is on its way; says whether the newest checkpoint is there."""

  def check(self) -> None:
    """Raises SavingError, after `finish`, if anything did not reach the workdir."""
    if self.missing:
      raise errors.SavingError(
        f"{', '.join(self.missing)} did not reach {self.workdir}, the log says why; "
        "mend that and, if the last step is among them, start again: training goes on "
        "from the newest checkpoint that is there."
      )

  def miss(self, name: str) -> None:
    """Notes that something could not be written."""
    if name not in self.missing:
      self.missing.append(name)

  def _has_arrived(self, step: int) -> None:
    """Forgets that a step was missing: after a rewind it was saved again."""
    name = checkpoints.at(self.folder, step).name
    self.missing[:] = [other for other in self.missing if other != name]


class DiskUploader(Uploader):
  """A workdir on a disk: what is written is there."""

  def __init__(
    self, workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
  ) -> None:
    super().__init__(workdir, workdir, is_chief=is_chief)
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}

  def publish(self, step: int) -> None:
    """Deletes the checkpoints that are no longer kept."""
    self._has_arrived(step)
    checkpoints.prune(self.folder, **self._keep)

  def settle(self) -> None:
    """Nothing is on its way."""

  def finish(self) -> bool:
    """There is nothing to wait for."""
    return True


class BucketUploader(Uploader):
  """A workdir in a bucket, and a thread that brings there what lies in a local folder.

  Up to MOST_WAITING checkpoints wait; then `publish` waits too, so that a slow bucket
  loses none. If the bucket fails (storage has retried by then), training goes on: the
  thread tries again every RETRY_SECONDS, and when too many wait, the oldest that is not
  being sent is given up.
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
      folder: A local folder of this process's own.
      keep_last: Newest checkpoints that stay in the bucket.
      keep_every: Those at multiples of so many steps stay for good; 0: none.
      retry_seconds: Time between two attempts while the bucket fails.
      sync_seconds: Time between two looks for logs that have grown.
    """
    super().__init__(workdir, folder, is_chief=True)
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}
    self._retry_seconds = retry_seconds
    self._sync_seconds = sync_seconds
    self._logs = FileUploader(folder, workdir, leave_out="checkpoints")
    self._logs.fetch(metric_writer.LOG_NAME)
    self._changed = threading.Condition()
    self._waiting: collections.deque[int] = collections.deque()
    self._is_sending = self._is_failing = self._is_ending = False
    self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
    self._thread.start()

  def publish(self, step: int) -> None:
    """Queues a checkpoint; waits while the queue is full and the bucket works."""
    with self._changed:
      self._changed.wait_for(
        lambda: len(self._waiting) < MOST_WAITING or self._is_failing
      )
      if len(self._waiting) >= MOST_WAITING:
        late = checkpoints.at(self.folder, self._waiting[1])  # the first is half sent
        logging.error("%s is given up: too many wait for the bucket", late.name)
        self.miss(late.name)
        checkpoints.remove(late)
        del self._waiting[1]
      if step not in self._waiting:
        self._waiting.append(step)
      self._changed.notify_all()

  def settle(self) -> None:
    """Waits until nothing waits or, while the bucket fails, drops what does.

    So that who goes back to a checkpoint finds in the bucket all there ever will be:
    what is dropped is of a course that is left, and its steps are saved again.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: not self._waiting or (self._is_failing and not self._is_sending)
      )
      for step in self._waiting:
        dropped = checkpoints.at(self.folder, step)
        logging.warning("%s is dropped: the bucket fails", dropped.name)
        checkpoints.remove(dropped)
      self._waiting.clear()

  def finish(self) -> bool:
    """Sends what waits, up to the first that fails, and ends the thread."""
    with self._changed:
      self._is_ending = True
      self._changed.notify_all()
    self._thread.join()
    for step in self._waiting:
      self.miss(checkpoints.at(self.folder, step).name)
    return not self._waiting

  def _work(self) -> None:
    """Sends what waits, the oldest first, and the logs, until told to end."""
    is_last = False
    while not is_last:
      with self._changed:
        pause = self._retry_seconds if self._is_failing else self._sync_seconds
        self._changed.wait_for(self._is_due, pause)
        is_ending = self._is_ending
        head = self._waiting[0] if self._waiting else None
        self._is_sending = head is not None
      is_good = head is None or self._send(head)
      with self._changed:
        if is_good and head is not None:
          self._waiting.popleft()
        self._is_sending, self._is_failing = False, not is_good
        is_last = is_ending and (self._is_failing or not self._waiting)
        self._changed.notify_all()
      if is_good and not self._try("logs", self._logs.sync) and is_last:
        self.miss("the newest logs")

  def _is_due(self) -> bool:
    """Says whether there is something to do before the pause is over."""
    return self._is_ending or (bool(self._waiting) and not self._is_failing)

  def _send(self, step: int) -> bool:
    """Brings a checkpoint to the bucket and prunes there; says whether it is there."""
    local = checkpoints.at(self.folder, step)
    if not self._try(local.name, lambda: checkpoints.send(local, self.workdir)):
      return False
    logging.info("step %d is in %s", step, self.workdir)
    checkpoints.remove(local)
    self._has_arrived(step)
    self._try("pruning", lambda: checkpoints.prune(self.workdir, **self._keep))
    return True

  def _try(self, what: str, action: Callable[[], None]) -> bool:
    """Says whether `action` succeeded; why it did not is logged."""
    try:
      action()
    except Exception as error:  # whatever it is, the training itself goes on
      logging.error("%s did not reach %s: %s", what, self.workdir, error)
      return False
    return True


@contextlib.contextmanager
def open_uploader(
  workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
) -> Iterator[Uploader]:
  """Yields the uploader of a run; what is on its way at the end of the block arrives.

  Args:
    workdir: The run's folder, local or gs://.
    is_chief: Whether this process writes; others send nothing.
    keep_last: Newest checkpoints that stay.
    keep_every: Those at multiples of so many steps stay for good; 0: none.
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
