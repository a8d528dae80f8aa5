"""launch/local.py, as a process with workers of a few lines each."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
HEAD = """
import json, os, pathlib, signal, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
folder = pathlib.Path(os.environ["NOTES"])
def ready():
  (folder / f"pid-{index}.new").write_text(str(os.getpid()))
  (folder / f"pid-{index}.new").rename(folder / f"pid-{index}")
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Start]:
  """Starts the launcher on workers that run the given program."""
  launchers = []

  def start_launcher(program: str, *arguments: str, **environment: str):
    (tmp_path / "toy_worker.py").write_text(HEAD + program)
    variables = {"PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path)} | environment
    command = [sys.executable, str(LAUNCHER), "--module=toy_worker", *arguments]
    launchers.append(
      subprocess.Popen(
        command,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return launchers[-1]

  yield start_launcher
  for launcher in launchers:
    launcher.kill()
    launcher.communicate()


def wait_for(is_so: Callable[[], bool], seconds: float, message: str) -> None:
  deadline = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < deadline, message
    time.sleep(0.02)


def worker_pids(folder: pathlib.Path, *names: str) -> list[int]:
  """Waits until these workers have called ready(); returns their process ids."""
  paths = [folder / f"pid-{name}" for name in names or ("0", "1")]
  wait_for(lambda: all(path.exists() for path in paths), 30, "no worker started")
  return [int(path.read_text()) for path in paths]


def wait_until_gone(pids: list[int]) -> None:
  """Waits until no process has one of these ids; fails after ten seconds."""
  for pid in pids:
    path = pathlib.Path(f"/proc/{pid}")
    wait_for(lambda path=path: not path.exists(), 10, f"process {pid} is still there")


def ended(launcher: subprocess.Popen) -> tuple[int, str, str]:
  """Waits for the launcher; returns its exit code, output and log."""
  output, log = launcher.communicate(timeout=60)
  return launcher.returncode, output, log


def test_workers_get_a_cluster_the_flags_and_equal_threads(start: Start):
  program = """
print(json.dumps([config, sys.argv[1:], os.environ["TF_NUM_INTRAOP_THREADS"]]))
"""
  code, output, _ = ended(start(program, "--workers=3", "--", "--a=1", "--b"))
  assert code == 0
  lines = (line.split(" ", 1) for line in output.splitlines())
  seen = {prefix: json.loads(text) for prefix, text in lines}
  assert set(seen) == {"[worker-0]", "[worker-1]", "[worker-2]"}
  addresses = seen["[worker-0]"][0]["cluster"]["worker"]
  assert len(set(addresses)) == 3
  assert all(address.startswith("127.0.0.1:") for address in addresses)
  threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
  for index in range(3):
    cluster, flags, worker_threads = seen[f"[worker-{index}]"]
    assert cluster["cluster"] == {"worker": addresses}
    assert cluster["task"] == {"type": "worker", "index": index}
    assert flags == ["--strategy=multiworker", "--a=1", "--b"]
    assert worker_threads == threads


def test_both_streams_come_out_whole_behind_the_prefix(start: Start):
  program = """
sys.stdout.buffer.write(b"caf\\xc3\\xa9\\n")
sys.stdout.flush()
sys.stderr.write("no newline at the end")
"""
  _, output, _ = ended(start(program, "--workers=1"))
  assert output == "[worker-0] café\n[worker-0] no newline at the end\n"


def test_a_worker_that_does_not_react_is_killed_after_the_grace(
  start: Start, tmp_path: pathlib.Path
):
  program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
if index == 1:
  while not (folder / "pid-0").exists(): time.sleep(0.02)
  sys.exit(144)
time.sleep(60)
"""
  started = time.monotonic()
  launcher = start(program, "--grace_seconds=0.5")
  pids = worker_pids(tmp_path)
  code, _, log = ended(launcher)
  assert code == 144  # and not that of the kill
  assert "worker-1 ended with exit code 144" in log
  assert time.monotonic() - started < 30
  wait_until_gone(pids)


@pytest.mark.parametrize(
  ("program", "code"),
  [
    (  # worker 0 sees the connection close, and ends, before worker 1 has ended
      """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
while not (folder / "pid-1").exists(): time.sleep(0.02)
if index == 0: sys.exit(144)
time.sleep(0.5)
sys.exit(6)
""",
      6,
    ),
    (
      """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
ready()
while not (folder / "pid-0").exists(): time.sleep(0.02)
if index == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""",
      137,
    ),
  ],
  ids=["its peer was lost", "others fail after a kill"],
)
def test_the_exit_code_is_that_of_the_cause(start: Start, program: str, code: int):
  assert ended(start(program))[0] == code


@pytest.mark.parametrize(
  ("number", "flags", "code"),
  [
    (signal.SIGINT, ("--max_restarts=1",), 143),  # it is not started again
    (signal.SIGTERM, ("--max_restarts=1",), 143),
    (signal.SIGUSR1, ("--grace_seconds=0",), 0),  # it stops none
  ],
)
def test_a_signal_reaches_every_worker(
  start: Start,
  tmp_path: pathlib.Path,
  number: signal.Signals,
  flags: tuple[str, ...],
  code: int,
):
  program = f"""
def note(number, frame):
  print("noted", flush=True)
  sys.exit({code})
signal.signal({int(number)}, note)
ready()
time.sleep(60)
"""
  launcher = start(program, *flags)
  pids = worker_pids(tmp_path)
  launcher.send_signal(number)
  output, _ = launcher.communicate(timeout=30)
  assert sorted(output.splitlines()) == ["[worker-0] noted", "[worker-1] noted"]
  assert launcher.returncode == code
  wait_until_gone(pids)


def test_a_killed_launcher_leaves_no_worker_behind(
  start: Start, tmp_path: pathlib.Path
):
  launcher = start("ready()\ntime.sleep(60)")
  pids = worker_pids(tmp_path)
  launcher.kill()
  launcher.communicate(timeout=30)
  wait_until_gone(pids)


def test_what_a_worker_started_ends_with_it(start: Start, tmp_path: pathlib.Path):
  program = """
child = os.fork()
if child == 0:
  index = "child"
  ready()
  time.sleep(60)
while not (folder / "pid-child").exists(): time.sleep(0.02)
"""
  launcher = start(program, "--workers=1")
  assert ended(launcher)[0] == 0
  wait_until_gone(worker_pids(tmp_path, "child"))


def test_each_attempt_is_a_line_and_the_pause_before_the_next_doubles(start: Start):
  program = """
print(len(config["cluster"]["worker"]))
sys.exit(144)
"""
  flags = ("--workers=2", "--max_restarts=2", "--backoff_seconds=0.1")
  code, output, log = ended(start(program, *flags))
  assert code == 144
  lines = re.findall(r"attempt \d ended with exit code .*", log)
  assert [re.sub(r"after [\w. ]+;", "after …;", line) for line in lines] == [
    "attempt 1 ended with exit code 144 after …; starting again in 0.1 s",
    "attempt 2 ended with exit code 144 after …; starting again in 0.2 s",
    "attempt 3 ended with exit code 144 after …; no restart",
  ]
  assert len(output.splitlines()) > 3  # both workers, more than once
  assert len(set(re.findall(r"threads each: (.*)", log))) == 3  # other ports each time


def test_back_off_doubles_up_to_a_minute_and_starts_anew_after_a_long_attempt(
  monkeypatch: pytest.MonkeyPatch,
):
  monkeypatch.syspath_prepend(str(LAUNCHER.parent))
  local = importlib.import_module("local")
  waits = [20.0]
  for seconds in (1, 1, 600, 601, 1):
    waits.append(local.next_backoff(waits[-1], first=0.5, seconds=seconds))
  assert waits[1:] == [40, 60, 60, 0.5, 1]


def test_a_worker_that_stops_as_asked_lets_the_others_finish_saving(
  start: Start, tmp_path: pathlib.Path
):
  # one worker alone hears of it, and tells the others by way of its steps
  program = """
signal.signal(signal.SIGTERM, lambda *_: print("asked again", flush=True))
signal.signal(signal.SIGUSR1, lambda *_: None)
ready()
if index == 0:
  signal.pause()
  sys.exit(143)
while not (folder / "ended").exists(): time.sleep(0.02)
print("saved", flush=True)
sys.exit(143)
"""
  launcher = start(program)
  first, _ = worker_pids(tmp_path)
  os.kill(first, signal.SIGUSR1)
  assert launcher.stderr is not None
  while "worker-0 ended with exit code 143" not in launcher.stderr.readline():
    pass
  time.sleep(0.2)  # some of the launcher's polls
  (tmp_path / "ended").touch()
  output, _ = launcher.communicate(timeout=30)
  assert output == "[worker-1] saved\n"
  assert launcher.returncode == 143


@pytest.mark.skipif(
  len(os.sched_getaffinity(0)) < 2, reason="two workers need two CPU cores"
)
def test_pinned_workers_have_cores_of_their_own(start: Start):
  _, output, _ = ended(start("print(*os.sched_getaffinity(0))", "--pin_cpus"))
  lines = dict(line.split(" ", 1) for line in output.splitlines())
  first, second = (set(lines[f"[worker-{i}]"].split()) for i in range(2))
  assert first
  assert second
  assert not first & second


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (("--pin_cpus", "--workers=1024"), "drop --pin_cpus"),
    (
      ("--workers=3",),
      "error: --workers=3 but there are 2 GPUs; start fewer workers, or train on the "
      "CPU with CUDA_VISIBLE_DEVICES= before the command.\n",
    ),
    (("--data_dir=x",), "data_dir"),  # for the workers, before the dashes
  ],
)
def test_flags_that_cannot_be_are_refused(start: Start, flags: tuple, says: str):
  code, _, log = ended(start("", *flags, CUDA_VISIBLE_DEVICES="0,1"))
  assert code == 2
  assert says in log


def test_gpus_are_shared_out_equally(start: Start):
  program = 'print(os.environ["CUDA_VISIBLE_DEVICES"])'
  _, output, _ = ended(start(program, CUDA_VISIBLE_DEVICES="4,5,6,7,8"))
  assert sorted(output.splitlines()) == ["[worker-0] 4,5", "[worker-1] 6,7"]
