"""The way of a run's files to its workdir: at once on a disk, behind it to a bucket.

Only the chief writes. For a workdir in a bucket it writes to a local folder, and a
thread brings checkpoints and logs to the bucket: of a checkpoint the data, then the
index, then the marker, so that nobody sees a half of one. The bucket is what counts: a
run that starts again forgets the local folder and goes on from the bucket's newest.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from absl import logging

from facedist import errors, storage
from facedist.training import checkpoints, logs
from facedist.training.mirror import Mirror

MOST_WAITING = 4
SYNC_SECONDS = 30.0
RETRY_SECONDS = 30.0


class Outbox(Protocol):
  """Where the chief of a run writes, and how that reaches the workdir."""

  workdir: str
  """The run's folder, local or gs://."""

  is_chief: bool
  """Whether this worker's files count."""

  folder: str
  """The local folder to write to."""

  def publish(self, step: int) -> None:
    """Hands over the checkpoint of that step, saved in `folder`, and prunes."""

  def finish(self) -> bool:
    """Waits for all that is on its way; says whether the newest checkpoint is there."""

  def check(self) -> None:
    """Raises SavingError, after `finish`, if anything did not reach the workdir."""


class DiskOutbox:
  """A workdir on a disk: what is written is there."""

  def __init__(
    self, workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
  ) -> None:
    self.workdir = self.folder = workdir
    self.is_chief = is_chief
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}

  def publish(self, step: int) -> None:
    """Deletes the checkpoints that are no longer kept."""
    checkpoints.prune(self.folder, **self._keep)

  def finish(self) -> bool:
    """There is nothing to wait for."""
    return True

  def check(self) -> None:
    """Nothing can be missing."""


class BucketOutbox:
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
    self.workdir, self.folder = workdir, folder
    self.is_chief = True
    self._keep = {"keep_last": keep_last, "keep_every": keep_every}
    self._retry_seconds = retry_seconds
    self._sync_seconds = sync_seconds
    self._logs = Mirror(folder, workdir, leave_out="checkpoints")
    self._logs.fetch(logs.LOG_NAME)
    self._changed = threading.Condition()
    self._waiting: collections.deque[int] = collections.deque()
    self._given_up: list[str] = []
    self._is_failing = self._is_ending = False
    self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
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
        self._given_up.append(late.name)
        remove(late)
        del self._waiting[1]
      self._waiting.append(step)
      self._changed.notify_all()

  def finish(self) -> bool:
    """Sends what waits, up to the first that fails, and ends the thread."""
    with self._changed:
      self._is_ending = True
      self._changed.notify_all()
    self._thread.join()
    return not self._waiting

  def check(self) -> None:
    """Raises SavingError if anything did not reach the bucket."""
    waiting = [checkpoints.at(self.folder, step).name for step in self._waiting]
    if lost := [*self._given_up, *waiting]:
      raise errors.SavingError(
        f"{', '.join(lost)} did not reach {self.workdir}, the log says why; mend that "
        "and start again: training goes on from the newest checkpoint that is there."
      )

  def _work(self) -> None:
    """Sends what waits, the oldest first, and the logs, until told to end."""
    is_last = False
    while not is_last:
      with self._changed:
        pause = self._retry_seconds if self._is_failing else self._sync_seconds
        self._changed.wait_for(self._is_due, pause)
        is_ending = self._is_ending
        head = self._waiting[0] if self._waiting else None
      is_good = head is None or self._send(head)
      with self._changed:
        if is_good and head is not None:
          self._waiting.popleft()
        self._is_failing = not is_good
        is_last = is_ending and (self._is_failing or not self._waiting)
        self._changed.notify_all()
      if is_good and not self._try("logs", self._logs.sync) and is_last:
        self._given_up.append("the newest logs")

  def _is_due(self) -> bool:
    """Says whether there is something to do before the pause is over."""
    return self._is_ending or (bool(self._waiting) and not self._is_failing)

  def _send(self, step: int) -> bool:
    """Brings a checkpoint to the bucket and prunes there; says whether it is there."""
    local = checkpoints.at(self.folder, step)
    if not self._try(local.name, lambda: send(local, self.workdir)):
      return False
    logging.info("step %d is in %s", step, self.workdir)
    remove(local)
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


def send(checkpoint: checkpoints.Checkpoint, workdir: str) -> None:
  """Copies a checkpoint to another workdir, so that it is seen there whole or not."""
  target = checkpoints.at(workdir, checkpoint.step)
  storage.remove(target.path + ".json")
  for name, file in checkpoints.files_of(checkpoint.path).items():
    storage.upload(file, storage.join(checkpoints.folder(workdir), name))
  storage.upload(checkpoint.path + ".json", target.path + ".json")


def remove(checkpoint: checkpoints.Checkpoint) -> None:
  """Deletes a checkpoint's files, the marker first, and what TensorFlow has begun."""
  storage.remove(checkpoint.path + ".json")
  if not storage.is_bucket(checkpoint.path):
    shutil.rmtree(checkpoint.path + "_temp", ignore_errors=True)
  for file in checkpoints.files_of(checkpoint.path).values():
    storage.remove(file)


@contextlib.contextmanager
def opened(
  workdir: str, *, is_chief: bool, keep_last: int, keep_every: int = 0
) -> Iterator[Outbox]:
  """Yields the outbox of a run; what is on its way at the end of the block arrives.

  Args:
    workdir: The run's folder, local or gs://.
    is_chief: Whether this process writes; others send nothing.
    keep_last: Newest checkpoints that stay.
    keep_every: Those at multiples of so many steps stay for good; 0: none.
  """
  keep = {"keep_last": keep_last, "keep_every": keep_every}
  if not storage.is_bucket(workdir) or not is_chief:
    yield DiskOutbox(workdir, is_chief=is_chief, **keep)
    return
  with _own_folder(workdir) as folder:
    outbox = BucketOutbox(workdir, folder, **keep)
    try:
      yield outbox
    finally:
      outbox.finish()


@contextlib.contextmanager
def _own_folder(workdir: str) -> Iterator[str]:
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
