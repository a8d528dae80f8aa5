import functools
import itertools
import os
import pathlib
import subprocess
import sys
import time

import cv2
import pytest

from facedist import errors
from tfrecords_tools import parallel


def _threads_of_opencv(_):
  return cv2.getNumThreads()


def _power_of_3(exponent):
  if exponent < 0:
    raise ValueError(f"{exponent} is negative")
  return 3**exponent


def test_one_process_is_this_one():
  before = cv2.getNumThreads()
  threads = parallel.ordered_map(_threads_of_opencv, [0], num_processes=1)
  assert list(threads) == [1]
  assert cv2.getNumThreads() == before


def test_tasks_are_taken_only_as_they_are_needed():
  taken = []
  results = parallel.ordered_map(
    abs, (taken.append(number) or number for number in range(99)), num_processes=1
  )
  assert [next(results), next(results)] == [0, 1]
  assert len(taken) <= 3
  results.close()


@pytest.mark.slow
def test_results_come_in_the_order_of_the_tasks_up_to_the_first_error():
  exponents = [300_000, 1, 2, 200_000, 3] * 8  # some take long, some do not
  results = parallel.ordered_map(_power_of_3, [*exponents, -1], num_processes=3)
  found = itertools.islice(results, len(exponents))
  assert list(found) == [3**exponent for exponent in exponents]
  with pytest.raises(ValueError, match="-1 is negative"):
    next(results)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_no_hanging():
  with pytest.raises(errors.FacedistError, match="a worker process died"):
    list(parallel.ordered_map(os._exit, range(9), num_processes=2))


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(tmp_path):
  script = tmp_path / "parent.py"
  script.write_text(
    "import os, pathlib, time\n"
    "from tfrecords_tools import parallel\n"
    "def work(folder):\n"
    "  pathlib.Path(folder, str(os.getpid())).touch()\n"
    "  time.sleep(60)\n"
    "if __name__ == '__main__':\n"
    f"  list(parallel.ordered_map(work, [{str(tmp_path / 'pids')!r}] * 2,"
    " num_processes=2))\n"
  )
  (tmp_path / "pids").mkdir()
  parent = subprocess.Popen([sys.executable, script])
  _wait_until(lambda: len(os.listdir(tmp_path / "pids")) == 2)
  parent.kill()
  parent.wait()
  for pid in os.listdir(tmp_path / "pids"):
    _wait_until(functools.partial(_is_gone, int(pid)))


def _is_gone(pid):
  """Whether the process ended; one that nobody waits for stays as a zombie."""
  stat = pathlib.Path(f"/proc/{pid}/stat")
  try:
    return stat.read_text().rpartition(")")[2].split()[0] == "Z"
  except (FileNotFoundError, ProcessLookupError):
    return True


def _wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
