"""The lock of a workdir: one process at a time is the chief of a run.

Workers that know nothing of each other all believe to be the chief, whatever made them
think so, and would overwrite each other's checkpoints. So the chief takes the lock
before it writes anything.

The lock is the file with the highest number in `lock/`. Whoever makes the next number
has it; to make a file unless it is there is atomic on a disk, on a shared file system
and in a bucket (a generation precondition). flock would not do: several shared file
systems keep it to one host, and a bucket has none. The holder rewrites its file every
REFRESH_SECONDS, so a newcomer sees without a clock whether the holder lives:

- the file says that its holder has ended: the lock is free;
- the holder was a process of this machine that is gone: the lock is free, so a restart
  after a kill loses no time;
- the file stays the same for SILENT_SECONDS: the holder is gone, as where its node was
  lost. If it was only halted for so long, it finds the higher number and ends itself;
- it changes, and still does once a holder that was asked to stop would have ended: the
  holder trains, and the newcomer ends.
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
  """Holds the lock while the body runs; waits a while where it may be free soon.

  Args:
    workdir: The run's folder, on a disk or in a bucket.
    on_loss: Called from another thread when a process has taken the lock since, for
      this one did not refresh it in time; to end this process.
    grace_seconds: That a holder may take to save once it was asked to stop: the
      scheduler may start its successor meanwhile.
    refresh_seconds: Between two flags of life.
    silent_seconds: Without a sign of life, after which a holder is gone.

  Raises:
    errors.ConfigError: Another process holds the lock and lives; names it.
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
  """The files of one workdir's lock, as one process sees them."""

  def __init__(self, workdir: str, *, refresh_seconds: float) -> None:
    self._workdir = workdir
    self._folder = storage.join(workdir, FOLDER_NAME)
    self._refresh_seconds = refresh_seconds
    self._own: dict[str, Any] = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "pids_of": _pids_of(),
      "started": _start_time(os.getpid()),
      "refreshed": 0,
      "ended": False,
    }
    self._number = 0  # of this process's file
    self._is_failing = False

  def take(self, grace_seconds: float, silent_seconds: float) -> None:
    """Makes the file of the next number; waits for a holder that may be gone."""
    first_look = last_change = time.monotonic()
    watched: tuple[int, bytes] | None = None
    while True:
      newest = self._newest()
      content = self._read(newest) if newest else b""
      now = time.monotonic()
      if content is None:  # another has the lock since, and removed that file
        continue
      is_free = newest == 0 or _is_over(content)
      if not is_free and watched is None:
        logging.info(
          "%s holds the lock of %s; waiting until it ends or falls silent",
          _name(content),
          self._workdir,
        )
      if watched != (newest, content):
        if watched and not is_free and now - first_look > grace_seconds:
          raise errors.ConfigError(
            f"--workdir={self._workdir} is in use: {_name(content)} trains there; stop "
            "that process, or give another --workdir."
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
    """Refreshes this process's file until told to stop, then says that it has ended.

    A holder that cannot say so is found out by its silence.
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
      except errors.FacedistError as error:  # training goes on; a save says more
        if not self._is_failing:
          logging.warning("the lock of %s is not refreshed: %s", self._workdir, error)
        self._is_failing = True
    self._own["ended"] = True
    with contextlib.suppress(errors.FacedistError):
      if self._newest() == self._number:
        self._write(self._number)

  def _loss(self, newest: int) -> errors.ConfigError:
    """Returns what to say when another process has the lock."""
    holder = _name(self._read(newest) or b"")
    return errors.ConfigError(
      f"--workdir={self._workdir} was taken by {holder}, since this process did not "
      "answer for a while; give one of the two another --workdir."
    )

  def _newest(self) -> int:
    """Returns the highest number; 0 where nobody has held the lock yet."""
    return max(self._numbers(), default=0)

  def _numbers(self) -> list[int]:
    """Returns the numbers of all files."""
    names = map(_NAME.fullmatch, storage.list_names(self._folder))
    return [int(name[1]) for name in names if name]

  def _read(self, number: int) -> bytes | None:
    """Returns a file's content; none for a file that is not there any more."""
    path = self._path(number)
    try:
      return storage.read_bytes(path) if storage.exists(path) else None
    except errors.DataError:
      return None

  def _write(self, number: int, *, if_absent: bool = False) -> bool:
    """Writes this process's file; says whether it did."""
    content = json.dumps(self._own).encode()
    return storage.write_bytes(self._path(number), content, if_absent=if_absent)

  def _path(self, number: int) -> str:
    return storage.join(self._folder, f"{number:08d}.json")


def _is_over(content: bytes) -> bool:
  """Says whether a file's holder has said that it ended, or is known to be gone.

  Nothing is known of one whose file is still being made.
  """
  holder = _parse(content)
  if holder.get("ended"):
    return True
  pid = holder.get("pid")
  is_here = bool(_pids_of()) and holder.get("pids_of") == _pids_of()
  if not is_here or not isinstance(pid, int) or pid < 1:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except (PermissionError, OverflowError):  # another user's, or no process's number
    pass
  return _start_time(pid) not in (holder.get("started"), "")


def _parse(content: bytes) -> dict[str, Any]:
  """Returns what a holder says of itself; nothing where that cannot be read."""
  try:
    holder = json.loads(content)
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def _name(content: bytes) -> str:
  """Returns `process 17 on node4`."""
  holder = _parse(content)
  return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _pids_of() -> str:
  """Returns what names the processes that this one's numbers count; empty if unknown.

  Two containers on a machine count their own, and so does a machine after a restart.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _start_time(pid: int) -> str:
  """Returns when a process started, in the kernel's ticks.

  `ended` for one that has ended and is not collected yet; empty where it is unknown,
  as where other users' processes are hidden.
  """
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "ended" if fields[0] in "ZX" else fields[19]
