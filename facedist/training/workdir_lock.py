"""The lock of a workdir: only one process at a time is the chief of a run.

Workers that were started without a description of their cluster each believe to be the
chief, and would overwrite each other's checkpoints. So the chief takes the lock before
it writes anything.

The lock is the file with the highest number in `lock/`; the process that created it
holds the lock. Creating a file only if it does not exist is atomic on a disk, on a
shared file system and in a bucket (a generation precondition). flock would not do:
several shared file systems keep it to one host, and a bucket has none. The holder
rewrites its file every REFRESH_SECONDS, so another process can see without comparing
clocks whether the holder lives:

- The file says that its holder has ended: the lock is free.
- The holder was a process of this machine that no longer exists: the lock is free, so a
  restart after a kill loses no time.
- The file does not change for SILENT_SECONDS: the holder is gone, as when its node was
  lost. If it was only halted for so long, it finds the higher number and ends itself.
- The file changes, and still does after the time that a holder takes to end once it was
  asked to stop: the holder is training, and the new process ends.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from facedist import errors, storage

FOLDER_NAME = "lock"
REFRESH_SECONDS = 10.0
SILENT_SECONDS = 30.0
_POLLS_A_REFRESH = 10
_NAME = re.compile(r"([0-9]{8})\.json")


@contextlib.contextmanager
def held(
  workdir: str,
  *,
  on_loss: Callable[[errors.ConfigError], None],
  grace_seconds: float,
  refresh_seconds: float = REFRESH_SECONDS,
  silent_seconds: float = SILENT_SECONDS,
) -> Iterator[None]:
  """Holds the lock while the body runs; waits for a lock that may be free soon.

  Args:
    workdir: The run's folder, on a disk or in a bucket.
    on_loss: Called from another thread when another process has taken the lock, because
      this one did not refresh it in time; has to end this process.
    grace_seconds: Time that a holder may take to save once it was asked to stop; the
      scheduler may start its successor meanwhile.
    refresh_seconds: Time between two refreshes.
    silent_seconds: Time without a refresh after which a holder is considered gone.

  Raises:
    errors.ConfigError: Another process, named in the message, holds the lock and lives.
    errors.UsageError: The folder cannot be written.
    errors.DataError: The disk is full, or the bucket cannot be written.
  """
  lock = _Lock(workdir, refresh_seconds=refresh_seconds)
  lock.take(grace_seconds, silent_seconds)
  stopping = threading.Event()
  keeper = threading.Thread(
    target=lock.keep, args=(stopping, on_loss), name="workdir lock", daemon=True
  )
  keeper.start()
  try:
    yield
  finally:
    stopping.set()
    keeper.join(refresh_seconds)  # a bucket may let it wait for long


class _Lock:
  """One process's view of the files of a workdir's lock."""

  def __init__(self, workdir: str, *, refresh_seconds: float) -> None:
    self._workdir = workdir
    self._folder = storage.join(workdir, FOLDER_NAME)
    self._refresh_seconds = refresh_seconds
    self._own = process_record()
    self._number = 0  # of this process's file
    self._is_failing = False

  def take(self, grace_seconds: float, silent_seconds: float) -> None:
    """Creates the file of the next number; waits for a holder that may be gone."""
    first_look = last_change = time.monotonic()
    watched: tuple[int, bytes] | None = None
    while True:
      newest = self._newest()
      content = self._read(newest) if newest else b""
      now = time.monotonic()
      if content is None:  # another process took the lock and removed that file
        continue
      is_free = newest == 0 or is_over(content)
      if not is_free and watched is None:
        logging.info(
          "%s holds the lock of %s; waiting until it ends or stops refreshing it",
          holder_name(content),
          self._workdir,
        )
      if watched != (newest, content):
        if watched and not is_free and now - first_look > grace_seconds:
          raise errors.ConfigError(
            f"--workdir={self._workdir} is in use: {holder_name(content)} trains "
            "there; stop that process, or give another --workdir."
          )
        watched, last_change = (newest, content), now
      if is_free or now - last_change > silent_seconds:
        if self._write(newest + 1, if_absent=True):
          self._number = newest + 1
          break
        continue
      time.sleep(self._refresh_seconds / _POLLS_A_REFRESH)
    for number in self._numbers():
      if number < self._number:
        storage.remove(self._path(number))

  def keep(
    self, stopping: threading.Event, on_loss: Callable[[errors.ConfigError], None]
  ) -> None:
    """Refreshes this process's file until told to stop, then records that it ended.

    If the record cannot be written, others find that the file no longer changes.
    """
    while not stopping.wait(self._refresh_seconds):
      try:
        newest = self._newest()
        if newest > self._number:
          on_loss(self._loss(newest))
          return
        self._own["refreshed"] += 1
        self._write(self._number)
        self._is_failing = False
      except (
        errors.FacedistError
      ) as error:  # training continues, and a save reports more
        if not self._is_failing:
          logging.warning("the lock of %s is not refreshed: %s", self._workdir, error)
        self._is_failing = True
    self._own["ended"] = True
    with contextlib.suppress(errors.FacedistError):
      if self._newest() == self._number:
        self._write(self._number)

  def _loss(self, newest: int) -> errors.ConfigError:
    """Returns the error for when another process has taken the lock."""
    holder = holder_name(self._read(newest) or b"")
    return errors.ConfigError(
      f"--workdir={self._workdir} was taken by {holder}, since this process did not "
      "refresh its lock for a while; give one of the two another --workdir."
    )

  def _newest(self) -> int:
    """Returns the highest number; 0 if no process has held the lock yet."""
    return max(self._numbers(), default=0)

  def _numbers(self) -> list[int]:
    """Returns the numbers of all files."""
    names = map(_NAME.fullmatch, storage.list_names(self._folder))
    return [int(name[1]) for name in names if name]

  def _read(self, number: int) -> bytes | None:
    """Returns a file's content; None if it no longer exists."""
    path = self._path(number)
    try:
      return storage.read_bytes(path) if storage.exists(path) else None
    except errors.DataError:
      return None

  def _write(self, number: int, *, if_absent: bool = False) -> bool:
    """Writes this process's file; returns whether it did."""
    content = json.dumps(self._own).encode()
    return storage.write_bytes(self._path(number), content, if_absent=if_absent)

  def _path(self, number: int) -> str:
    return storage.join(self._folder, f"{number:08d}.json")


def process_record() -> dict[str, Any]:
  """Returns the fields of this process's file; `refreshed` is to change each time."""
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "pids_of": _pid_namespace(),
    "started": _start_time(os.getpid()),
    "refreshed": 0,
    "ended": False,
  }


def is_over(content: bytes) -> bool:
  """Returns whether a file's holder has recorded its end, or is known to be gone.

  A file that is still being written tells neither.
  """
  holder = _parse(content)
  if holder.get("ended"):
    return True
  pid = holder.get("pid")
  is_here = bool(_pid_namespace()) and holder.get("pids_of") == _pid_namespace()
  if not is_here or not isinstance(pid, int) or pid < 1:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except (PermissionError, OverflowError):  # another user's, or not a process number
    pass
  return _start_time(pid) not in (holder.get("started"), "")


def _parse(content: bytes) -> dict[str, Any]:
  """Returns the fields of a holder's file; none if it cannot be parsed."""
  try:
    holder = json.loads(content)
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def holder_name(content: bytes) -> str:
  """Returns `process 17 on node4`."""
  holder = _parse(content)
  return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _pid_namespace() -> str:
  """Returns an identifier of what numbers the processes; empty if unknown.

  Each container numbers its own processes, and a machine starts again after a restart.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _start_time(pid: int) -> str:
  """Returns when a process started, in the kernel's ticks.

  It is `ended` for a process that has ended and was not collected yet, and empty if it
  is unknown, as where other users' processes are hidden.
  """
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "ended" if fields[0] in "ZX" else fields[19]
