"""Two workers on two hosts while the network fails or loses packets."""

import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from facedist import errors
from tests import networks, processes
from tests.facedist.two_workers import (
  ENDLESS,
  FLAGS,
  LIMIT,
  Run,
  last_error,
  launch,
  losses,
)

pytestmark = pytest.mark.slow

HOSTS = {"left": "10.77.0.11", "right": "10.77.0.12"}
NAMES = tuple(HOSTS)
WORKERS = [f"{address}:2222" for address in HOSTS.values()]
# from a fault to the end of both: 5 s of silence, as many to explain, and the exit
MAX_SECONDS = 30.0
HEARTBEAT_SECONDS = 0.5  # a tenth of --peer_timeout

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def hosts() -> Iterator[networks.Hosts]:
  """Two hosts on a bridge."""
  if reason := networks.missing():
    pytest.skip(reason)
  with networks.Hosts(HOSTS) as made:
    yield made


@pytest.fixture
def start(
  hosts: networks.Hosts, noise_shards: str, tmp_path: pathlib.Path
) -> Iterator[Start]:
  """Starts a worker on each host; in the end both are gone and the network is whole."""
  started: list[processes.Process] = []

  def start_run(
    *flags: str,
    fault: tuple[str, int] = ("none", 0),
    own_flags: Mapping[int, tuple[str, ...]] | None = None,
  ) -> Run:
    paths = [tmp_path / f"log-{index}.txt" for index in range(2)]
    for index, name in enumerate(NAMES):
      started.append(
        launch(
          WORKERS,
          index,
          *(f"--data_dir={noise_shards}", f"--workdir={tmp_path / 'run'}"),
          *("--start_timeout=60", *flags, *(own_flags or {}).get(index, ())),
          log=paths[index],
          network=hosts.network(name),
          fault=fault,
        )
      )
    return Run(WORKERS, started, paths)

  yield start_run
  for process in started:
    process.kill()
    process.wait(30)
  for name in NAMES:
    hosts.plug(name)
    hosts.open(name)
    hosts.unshape(name)


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


def test_a_link_that_goes_down_ends_both_and_each_names_the_other(
  hosts: networks.Hosts, start: Start
):
  run = start(*ENDLESS)
  wait_for_training(run)
  hosts.shut("left")  # its packets cannot be sent, those of the other are lost
  assert codes_in_time(run) == [errors.ExitCode.PEER_LOST] * 2, run.log(0) + run.log(1)
  for own, other in ((0, 1), (1, 0)):
    silence = f"worker {other} at {WORKERS[other]} has been silent for "
    assert silence in last_error(run.log(own))
    assert re.search(r"; last heard of at step [1-9]\d* \(", last_error(run.log(own)))


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
  assert last_error(run.log(0)).startswith(f"error: {silence}")
  reported = last_error(run.log(1))
  assert reported.startswith(f"error: worker 0 at {WORKERS[0]} left at step ")
  assert silence in reported


def test_packets_lost_one_way_from_the_start_end_both(
  hosts: networks.Hosts, start: Start
):
  hosts.drop_incoming("right")
  run = start("--start_timeout=5")
  assert run.codes() == [errors.ExitCode.PEER_LOST] * 2, run.log(0) + run.log(1)
  assert last_error(run.log(1)).startswith(
    f"error: worker 0 at {WORKERS[0]} did not start within 5 s"
  )
  # because its time was up, or because the other has left
  assert last_error(run.log(0)).startswith(f"error: worker 1 at {WORKERS[1]} ")


def test_the_doctor_says_on_both_hosts_that_one_way_is_shut(
  hosts: networks.Hosts, noise_shards: str, tmp_path: pathlib.Path
):
  hosts.drop_incoming("right")
  logs = [tmp_path / f"log-{name}" for name in NAMES]
  doctors = []
  try:
    for index, name in enumerate(NAMES):
      task = {"type": "worker", "index": index}
      cluster = {"cluster": {"worker": WORKERS}, "task": task}
      doctors.append(
        processes.start(
          *("facedist.doctor", *FLAGS, "--start_timeout=5", "--json"),
          *(f"--data_dir={noise_shards}", f"--workdir={tmp_path}/run"),
          log=logs[index],
          environment={"TF_CONFIG": json.dumps(cluster)},
          network=hosts.network(name),
        )
      )
    codes = [doctor.wait(LIMIT) for doctor in doctors]
  finally:
    hosts.unshape("right")
    for doctor in doctors:
      doctor.kill()
  for own, other in ((0, 1), (1, 0)):
    content = json.loads("{" + logs[own].read_text().split("\n{", 1)[1])
    assert codes[own] == content["exit_code"] == errors.ExitCode.PEER_LOST
    (found,) = [one for one in content["findings"] if one["check"] == "heartbeats"]
    assert f"worker {other} at {WORKERS[other]} " in found["text"]
    assert "open its TCP and UDP port" in found["mend"]
    assert content["findings"][-1]["text"].startswith("not tried")  # nobody hangs


def test_a_peer_of_another_version_and_config_is_refused_by_name(start: Start):
  run = start(fault=("other version", 0), own_flags={1: ("--full_rate=0.5",)})
  assert run.codes() == [errors.ExitCode.CONFIG] * 2, run.log(0) + run.log(1)
  for own, other in ((0, 1), (1, 0)):
    refusal = f"worker {other} at {WORKERS[other]} does not belong to this run: "
    assert last_error(run.log(own)).startswith(f"error: {refusal}version ")
    assert re.search(r"; config \w+ there, \w+ here;", last_error(run.log(own)))
