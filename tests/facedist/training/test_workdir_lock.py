"""The lock of a workdir, on a disk and in a bucket."""

import contextlib
import errno
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from concurrent import futures

import pytest

from facedist import errors, storage
from facedist.training import workdir_lock

LONG = 3600.0  # seconds; no test waits so long


def never(error: errors.ConfigError) -> None:
  pytest.fail(f"the lock was lost: {error}")


def held(workdir: str, **changes) -> contextlib.AbstractContextManager[None]:
  """Holds the lock, with short times."""
  times = {"grace_seconds": 0.0, "refresh_seconds": 0.05, "silent_seconds": LONG}
  return workdir_lock.held(workdir, **{"on_loss": never} | times | changes)


def files(workdir: str) -> dict[str, dict]:
  """Returns the content of the lock's files."""
  folder = storage.join(workdir, workdir_lock.FOLDER_NAME)
  return {
    name: json.loads(storage.read_bytes(storage.join(folder, name)))
    for name in storage.list_names(folder)
  }


def leave_behind(workdir: str, number: int = 4, **changes) -> None:
  """Writes the file of a holder on another machine that was killed."""
  holder = {"host": "node4", "pid": 17, "pids_of": "elsewhere", "started": "1"}
  content = json.dumps(holder | {"refreshed": 9, "ended": False} | changes).encode()
  name = f"{number:08d}.json"
  path = storage.join(workdir, workdir_lock.FOLDER_NAME, name)
  storage.write_bytes(path, content)


def test_a_second_chief_ends_before_it_writes_and_names_the_first(workdir: str):
  with held(workdir):
    before = files(workdir).keys()
    with pytest.raises(errors.ConfigError) as caught:
      held(workdir).__enter__()
    assert str(caught.value).startswith(
      f"--workdir={workdir} is in use: process {os.getpid()} on "
    )
    assert files(workdir).keys() == before


def test_of_many_processes_that_start_at_once_one_is_the_chief(workdir: str):
  leave_behind(workdir, ended=True)
  outcomes: queue.Queue[str] = queue.Queue()
  all_decided = threading.Event()

  def start(_: int) -> None:
    try:
      with held(workdir):
        outcomes.put("chief")
        all_decided.wait(60)
    except errors.ConfigError:
      outcomes.put("refused")

  with futures.ThreadPoolExecutor(6) as pool:
    pool.map(start, range(6))
    found = sorted(outcomes.get(timeout=60) for _ in range(6))
    all_decided.set()
  assert found == ["chief", *["refused"] * 5]


def test_a_run_that_ended_or_failed_leaves_the_lock_free_and_one_file(workdir: str):
  for number in (1, 2, 3):
    with contextlib.suppress(RuntimeError), held(workdir):
      assert list(files(workdir)) == [f"{number:08d}.json"]
      if number == 2:
        raise RuntimeError
    ((_, holder),) = files(workdir).items()
    assert holder["ended"]


KILLED = """
import os, signal, sys
from facedist.training import workdir_lock
with workdir_lock.held(sys.argv[1], on_loss=print, grace_seconds=0):
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_on_this_machine_is_replaced_at_once(workdir: str):
  result = subprocess.run([sys.executable, "-c", KILLED, workdir], check=False)
  assert result.returncode == -9
  ((_, holder),) = files(workdir).items()
  assert not holder["ended"]
  with held(workdir, refresh_seconds=LONG):  # it would wait for a refresh
    pass


def test_a_new_process_with_the_number_of_the_holder_is_not_the_holder(workdir: str):
  with held(workdir):
    ((_, holder),) = files(workdir).items()
  leave_behind(workdir, **holder | {"ended": False, "started": "1"})
  with held(workdir, refresh_seconds=LONG):
    pass


def test_a_process_lost_with_its_machine_is_replaced_after_silent_seconds(workdir: str):
  leave_behind(workdir)
  with held(workdir, silent_seconds=0.3):
    assert list(files(workdir)) == ["00000005.json"]


def test_a_new_process_waits_for_a_holder_that_still_saves(workdir: str):
  first = held(workdir)
  first.__enter__()
  end = threading.Timer(0.5, first.__exit__, (None, None, None))
  end.start()
  with held(workdir, grace_seconds=LONG):
    end.join()


def test_a_holder_that_was_halted_finds_that_another_took_the_lock(workdir: str):
  losses: queue.Queue[errors.ConfigError] = queue.Queue()
  with held(workdir, on_loss=losses.put):
    leave_behind(workdir, number=2)
    loss = losses.get(timeout=60)
  assert str(loss).startswith(
    f"--workdir={workdir} was taken by process 17 on node4, since this process did "
  )
  assert not files(workdir)["00000002.json"]["ended"]


@pytest.mark.parametrize("content", [b" ", b"{", b"[1]", b'{"pid": -1}'])
def test_a_file_that_is_no_lock_is_replaced_after_silent_seconds(
  tmp_path: pathlib.Path, content: bytes
):
  workdir = str(tmp_path)
  path = storage.join(workdir, workdir_lock.FOLDER_NAME, "00000001.json")
  storage.write_bytes(path, content)
  with held(workdir, silent_seconds=0.1):
    assert list(files(workdir)) == ["00000002.json"]


def test_the_lock_is_kept_while_a_bucket_fails(bucket, monkeypatch, caplog):
  workdir = f"{bucket}/run"
  with held(workdir):
    monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "0.5")
    bucket.faults.always(status=503, method="POST")
    deadline = time.monotonic() + 60
    while "is not refreshed: gs://faces/run/lock" not in caplog.text:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    bucket.faults.clear()
    monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "60")
  ((_, holder),) = files(workdir).items()
  assert holder["ended"]


def test_the_lock_works_on_a_file_system_without_hard_links(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  def refuse(source: str, target: str) -> None:  # as a mounted bucket does
    raise OSError(errno.EPERM, "Operation not permitted", source, None, target)

  monkeypatch.setattr(os, "link", refuse)
  with held(str(tmp_path)), pytest.raises(errors.ConfigError, match="is in use"):
    held(str(tmp_path)).__enter__()
  folder = tmp_path / workdir_lock.FOLDER_NAME
  assert [path.name for path in folder.iterdir()] == ["00000001.json"]
