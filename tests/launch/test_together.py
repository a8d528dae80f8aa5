"""launch/together.py, in a process of its own, on commands of a line each."""

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "launch"
HEAD = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import together

def python(program, prefix=""):
  return together.Command((sys.executable, "-c", program), prefix)

together.exit_on_signals()
"""
NOTE = """
import os, pathlib, signal, sys, time
def told(number, frame):
  pathlib.Path("told").write_text(signal.Signals(number).name)
  sys.exit()
signal.signal(signal.SIGTERM, told)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
Start = Callable[[str], subprocess.Popen]


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
  """Starts a program that calls together.run, in a folder of its own."""
  processes = []

  def start_program(program: str) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, "-c", HEAD + program],
      cwd=tmp_path,
      stdout=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    return process

  yield start_program
  for process in processes:
    process.kill()
    process.communicate()


def wait_for(path: pathlib.Path) -> str:
  deadline = time.monotonic() + 30
  while not path.exists() or not path.read_text():
    assert time.monotonic() < deadline, f"{path.name} did not appear"
    time.sleep(0.02)
  return path.read_text()


def test_lines_of_a_command_with_a_prefix_carry_it(start: Start):
  lines = "python('print(1); print(2)', '[a] ')"
  process = start(f"sys.exit(together.run([{lines}, python('')]))")
  assert process.communicate(timeout=30)[0] == "[a] 1\n[a] 2\n"  # waits for both
  assert process.returncode == 0


def test_the_first_failure_stops_the_others_and_gives_the_exit_code(
  start: Start, tmp_path: pathlib.Path
):
  fail = "import os, sys, time\nwhile not os.path.exists('pid'): time.sleep(0.01)\n"
  process = start(
    f"sys.exit(together.run([python({NOTE!r}), python({fail + 'sys.exit(4)'!r})]))"
  )
  assert process.wait(timeout=30) == 4
  assert wait_for(tmp_path / "told") == "SIGTERM"


def test_a_command_that_a_signal_ended_gives_128_and_its_number(start: Start):
  program = "import os; os.kill(os.getpid(), 9)"
  process = start(f"sys.exit(together.run([python({program!r})]))")
  assert process.wait(timeout=30) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_commands_first(
  number: signal.Signals, start: Start, tmp_path: pathlib.Path
):
  process = start(f"sys.exit(together.run([python({NOTE!r})]))")
  wait_for(tmp_path / "pid")
  process.send_signal(number)
  assert process.wait(timeout=30) == 128 + number
  assert (tmp_path / "told").read_text() == "SIGTERM"


def test_commands_do_not_outlive_a_runner_that_was_killed(
  start: Start, tmp_path: pathlib.Path
):
  process = start(f"sys.exit(together.run([python({NOTE!r})]))")
  wait_for(tmp_path / "pid")
  process.kill()
  assert wait_for(tmp_path / "told") == "SIGTERM"
