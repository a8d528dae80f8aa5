import os
import socket
import subprocess
import sys

import pytest

from tfrecords_tools.builder import state

HERE = socket.gethostname()


def dead_process():
  """The number of a process that was there and is not any more."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


@pytest.mark.parametrize(
  ("host", "process", "hours_old", "is_removed"),
  [
    (HERE, dead_process, 0, True),
    (HERE, os.getppid, 0, False),  # lives
    (HERE, os.getpid, 0, True),  # a container's first process has this number each time
    ("pod-7-x2c", dead_process, 1, False),  # may live over there
    ("pod-7-x2c", os.getppid, 25, True),
  ],
)
def test_only_what_the_dead_left_is_removed(
  tmp_path, host, process, hours_old, is_removed
):
  path = tmp_path / f"train-00000-of-00002.tfrecord.partial-{host}-{process()}-0a1b2c3d"
  path.touch()
  changed = path.stat().st_mtime - hours_old * 3600
  os.utime(path, (changed, changed))
  state.remove_leftovers([str(tmp_path), str(tmp_path / "none"), "gs://faces/shards"])
  assert path.exists() != is_removed


def test_what_a_killed_writer_leaves_is_found(tmp_path):
  program = (
    "import os, sys; from facedist import storage\n"
    "with storage.partial_file(sys.argv[1]) as partial:\n"
    "  open(partial, 'w').close(); os.kill(os.getpid(), 9)\n"
  )
  subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.npy")], check=False)
  assert len(os.listdir(tmp_path)) == 1
  state.remove_leftovers([str(tmp_path)])
  assert os.listdir(tmp_path) == []


def test_whole_files_and_others_names_stay(tmp_path):
  names = {"train-00000-of-00002.tfrecord", "notes.partial", "a.partial-x-1-0a1b2c3"}
  for name in names:
    (tmp_path / name).touch()
  state.remove_leftovers([str(tmp_path)])
  assert set(os.listdir(tmp_path)) == names
