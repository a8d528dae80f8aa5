"""Two workers on two hosts while the network fails, loses packets or is slow."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from facedist import errors
from tests import networks
from tests.facedist.two_workers import (
  ENDLESS,
  FLAGS,
  LIMIT,
  Process,
  Run,
  launch,
  losses,
)

pytestmark = pytest.mark.slow

HOSTS = {"left": "10.77.0.11", "right": "10.77.0.12"}
NAMES = tuple(HOSTS)
WORKERS = [f"{address}:2222" for address in HOSTS.values()]
START_FLAGS = ("--start_timeout=60",)
# from a fault to the end of both: 5 s of silence, as many to explain, and the exit
MAX_SECONDS = 30.0
SLOW_STEPS = 4
HEARTBEAT_SECONDS = 0.5  # a tenth of --peer_timeout

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def hosts() -> Iterator[networks.Hosts]:
  """Two hosts on a bridge."""
  if reason := networks.missing():
    pytest.skip(reason)
  with networks.Hosts(HOSTS) as made:
    yield made


@contextlib.contextmanager
def running(
  hosts: networks.Hosts,
  shards: str,
  folder: pathlib.Path,
  *flags: str,
  fault: tuple[str, int] = ("none", 0),
  own_flags: Mapping[int, tuple[str, ...]] | None = None,
) -> Iterator[Run]:
  """Starts a worker on each host; both are killed in the end."""
  paths = [folder / f"log-{index}.txt" for index in range(2)]
  processes: list[Process] = []
  try:
    for index, name in enumerate(NAMES):
      processes.append(
        launch(
          WORKERS,
          index,
          *(f"--data_dir={shards}", f"--workdir={folder / 'run'}"),
          *(*START_FLAGS, *flags, *(own_flags or {}).get(index, ())),
          log=paths[index],
          network=hosts.network(name),
          fault=fault,
        )
      )
    yield Run(WORKERS, processes, paths)
  finally:
    for process in processes:
      process.kill()
      process.wait(30)
    for name in NAMES:
      hosts.plug(name)
      hosts.open(name)
      hosts.unshape(name)


@pytest.fixture
def start(
  hosts: networks.Hosts, noise_shards: str, tmp_path: pathlib.Path
) -> Iterator[Start]:
  """Starts a worker on each host; in the end both are gone and the network is whole."""
  with contextlib.ExitStack() as runs:

    def start_run(*flags: str, **more) -> Run:
      return runs.enter_context(running(hosts, noise_shards, tmp_path, *flags, **more))

    yield start_run


def wait_for_training(run: Run) -> None:
  """Waits until both have trained, and know that of each other."""
  run.wait_for("step 6/")
  time.sleep(2 * HEARTBEAT_SECONDS)


def codes_in_time(run: Run) -> list[int]:
  """Waits for the end of both, but no longer than it may take."""
  deadline = time.monotonic() + MAX_SECONDS
  return [
    process.wait(max(0.0, deadline - time.monotonic())) for process in run.processes
  ]


def error_of(run: Run, index: int) -> str:
  """Returns the line that a worker ended with."""
  lines = [line for line in run.log(index).splitlines() if line.startswith("error: ")]
  assert lines, run.log(index)
  return lines[-1]


def test_a_link_that_goes_down_ends_both_and_each_names_the_other(
  hosts: networks.Hosts, start: Start
):
  run = start(*ENDLESS)
  wait_for_training(run)
  hosts.shut("left")  # its packets cannot be sent, those of the other are lost
  assert codes_in_time(run) == [errors.ExitCode.PEER_LOST] * 2, run.log(0) + run.log(1)
  for own, other in ((0, 1), (1, 0)):
    silence = f"worker {other} at {WORKERS[other]} has been silent for "
    assert silence in error_of(run, own)
    assert re.search(r"; last heard of at step [1-9]\d* \(", error_of(run, own))


def test_a_short_outage_is_waited_for(
  hosts: networks.Hosts,
  start: Start,
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
):
  run = start("--peer_timeout=20")
  run.wait_for("step 6/")
  hosts.pull("right")
  time.sleep(1.0)
  stood_at = max(losses(tmp_path / "run"))
  time.sleep(2.0)
  assert max(losses(tmp_path / "run")) == stood_at  # it was a fault
  hosts.plug("right")
  assert run.codes() == [0, 0], run.log(0) + run.log(1)
  assert losses(tmp_path / "run") == losses(undisturbed)


def test_where_packets_are_lost_one_way_both_find_a_lost_peer(
  hosts: networks.Hosts, start: Start
):
  run = start(*ENDLESS)
  wait_for_training(run)
  hosts.drop_incoming("left")
  assert codes_in_time(run) == [errors.ExitCode.PEER_LOST] * 2, run.log(0) + run.log(1)
  silence = f"worker 1 at {WORKERS[1]} has been silent for "
  assert error_of(run, 0).startswith(f"error: {silence}")
  reported = error_of(run, 1)
  assert reported.startswith(f"error: worker 0 at {WORKERS[0]} left at step ")
  assert silence in reported


def test_a_slow_link_changes_no_loss(
  hosts: networks.Hosts,
  start: Start,
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
):
  with hosts.far("right", milliseconds=20, megabits_per_second=50):
    started = time.monotonic()
    run = start(f"--stop_after_steps={SLOW_STEPS}")
    assert run.codes() == [0, 0], run.log(0) + run.log(1)
    seconds = time.monotonic() - started
  everything = losses(undisturbed)
  expected = {step: everything[step] for step in range(SLOW_STEPS)}
  assert losses(tmp_path / "run") == expected
  assert seconds > SLOW_STEPS * 0.04  # a way there and back in every step


def test_packets_lost_one_way_from_the_start_end_both(
  hosts: networks.Hosts, start: Start
):
  hosts.drop_incoming("right")
  run = start("--start_timeout=5")
  assert run.codes() == [errors.ExitCode.PEER_LOST] * 2, run.log(0) + run.log(1)
  assert error_of(run, 1).startswith(
    f"error: worker 0 at {WORKERS[0]} did not start within 5 s"
  )
  # because its time was up, or because the other has left
  assert error_of(run, 0).startswith(f"error: worker 1 at {WORKERS[1]} ")


def test_the_doctor_says_on_both_hosts_that_one_way_is_shut(
  hosts: networks.Hosts, noise_shards: str, tmp_path: pathlib.Path
):
  hosts.drop_incoming("right")
  doctors = []
  try:
    for index, name in enumerate(NAMES):
      task = {
        "cluster": {"worker": WORKERS},
        "task": {"type": "worker", "index": index},
      }
      words = ("-m", "facedist.doctor", *FLAGS, "--start_timeout=5", "--json")
      folders = (f"--data_dir={noise_shards}", f"--workdir={tmp_path}/run")
      doctors.append(
        subprocess.Popen(
          [*hosts.enter(name), sys.executable, *words, *folders],
          env=os.environ | {"TF_CONFIG": json.dumps(task)},
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
        )
      )
    outputs = [doctor.communicate(timeout=LIMIT)[0] for doctor in doctors]
  finally:
    hosts.unshape("right")
    for doctor in doctors:
      doctor.kill()
      doctor.wait()
  for own, other in ((0, 1), (1, 0)):
    content = json.loads(outputs[own])
    assert doctors[own].returncode == content["exit_code"] == errors.ExitCode.PEER_LOST
    (found,) = [one for one in content["findings"] if one["check"] == "heartbeats"]
    assert f"worker {other} at {WORKERS[other]} " in found["text"]
    assert "open its TCP and UDP port" in found["mend"]
    assert content["findings"][-1]["text"].startswith("not tried")  # nobody hangs


def test_a_peer_of_another_version_and_config_is_refused_by_name(start: Start):
  run = start(fault=("other version", 0), own_flags={1: ("--full_rate=0.5",)})
  assert run.codes() == [errors.ExitCode.CONFIG] * 2, run.log(0) + run.log(1)
  for own, other in ((0, 1), (1, 0)):
    refusal = f"worker {other} at {WORKERS[other]} does not belong to this run: "
    assert error_of(run, own).startswith(f"error: {refusal}version ")
    assert re.search(r"; config \w+ there, \w+ here;", error_of(run, own))
