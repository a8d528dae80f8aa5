"""Workers exchange reports over real sockets; the checks judge what came of it."""

import contextlib
import socket
import threading
from concurrent import futures

import pytest

from facedist import errors
from facedist.distributed.cluster import Cluster
from facedist.distributed.failure_detector import FailureDetector, Timeouts
from facedist.preflight import cluster as cluster_checks
from facedist.preflight.checks import Finding
from facedist.preflight.cluster import Answers

REPORT = {
  "config": "c",
  "data": "d",
  "facedist": "0.1.0",
  "tensorflow": "2.15.1",
  "python": "3.11.7",
  "numpy": "1.26",
  "devices": ["H100 (9.0, 85 GB)"] * 2,
  "workers": ["a:1", "b:2"],
  "exit_code": 0,
}
PAIR = Cluster(("a:1", "b:2"), 0)


def addresses(count: int) -> tuple[str, ...]:
  with contextlib.ExitStack() as held:
    sockets = [
      held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
    ]
    return tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in sockets)


def call_all(workers: tuple[str, ...], reports: dict[int, dict]) -> dict[int, Answers]:
  """Runs the roll call of some workers at once."""
  answers = {}

  def call_one(index: int) -> None:
    cluster = Cluster(workers, index)
    answers[index] = cluster_checks.call(cluster, reports[index], seconds=20)

  threads = [threading.Thread(target=call_one, args=(index,)) for index in reports]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return answers


def found_in(answers: Answers, cluster: Cluster = PAIR) -> dict[str, Finding]:
  """Returns what the checks find in the answers, by check."""
  findings = cluster_checks.check_answers(cluster, answers)
  return {finding.check: finding for finding in findings}


def answered(**changes: object) -> dict[str, Finding]:
  """Returns what worker 0 finds where worker 1's report differs so."""
  return found_in(Answers({0: REPORT, 1: REPORT | changes}, {1: 0.0}, {}, {1}))


def test_three_workers_hear_all_reports():
  workers = addresses(3)
  reports = {
    index: REPORT | {"own": index, "workers": list(workers)} for index in range(3)
  }
  answers = call_all(workers, reports)
  for index, heard in answers.items():
    assert {peer: report["own"] for peer, report in heard.reports.items()} == {
      0: 0,
      1: 1,
      2: 2,
    }
    assert heard.callers == {0, 1, 2} - {index}
    assert all(abs(offset) < 1 for offset in heard.clock_offsets.values())
    found = found_in(heard, Cluster(workers, index))
    assert {finding.state for finding in found.values()} == {"ok"}


def test_one_that_is_not_there_is_named():
  workers = addresses(2)
  cluster = Cluster(workers, 0)
  answers = cluster_checks.call(cluster, REPORT, seconds=1)
  ports = found_in(answers, cluster)["ports"]
  assert ports.state == "bad"
  assert ports.exit_code == errors.ExitCode.PEER_LOST
  assert ports.text.startswith(f"worker 1 at {workers[1]} cannot be reached (")
  assert ports.mend == "start it, or open its TCP and UDP port for the other workers"


def test_a_port_open_one_way_only_is_named():
  answers = Answers({0: REPORT, 1: REPORT}, {1: 0.0}, {}, set())
  ports = found_in(answers)["ports"]
  assert ports.state == "bad"
  assert ports.text == "worker 1 at b:2 does not reach this worker at a:1"


def test_a_clock_that_is_far_off_is_a_warning():
  answers = Answers({0: REPORT, 1: REPORT}, {1: -7.5}, {}, {1})
  clocks = found_in(answers)["clocks"]
  assert clocks.state == "warning"
  assert "worker 1's is -7.50 s from this one's" in clocks.text
  assert clocks.mend == "run NTP on all machines"


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("facedist", "0.2.0"),
    ("tensorflow", "2.16.1"),
    ("python", "3.11.8"),
    ("numpy", "1.27"),
    ("config", "x"),
    ("data", "y"),
    ("devices", ["H100 (9.0, 85 GB)"]),  # one fewer
    ("devices", ["H100 (9.0, 85 GB)", "H100 (9.0, 42 GB)"]),
  ],
)
def test_a_worker_that_is_unlike_the_others_is_named(name: str, value: object):
  found = answered(**{name: value})
  bad = found.pop(name)
  assert bad.state == "bad"
  assert bad.text.startswith("worker 1 has ")
  assert bad.mend
  assert bad.exit_code == errors.ExitCode.CONFIG
  assert {finding.state for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
  ("told", "difference"),
  [
    (["b:2", "a:1"], "worker 0 is b:2, this one that it is a:1"),
    (["a:1", "b:2", "c:3"], "worker 2 is c:3, this one that it is nobody"),
  ],
)
def test_a_worker_that_was_told_of_another_cluster_is_named(
  told: list[str], difference: str
):
  cluster = answered(workers=told)["cluster"]
  assert cluster.state == "bad"
  assert cluster.text == f"worker 1 was told that {difference}"
  assert cluster.mend.startswith("give all workers the same description")


def test_what_another_worker_found_of_its_own_counts_for_all():
  peers = answered(exit_code=4)["peers"]
  assert peers.text == "worker 1 at b:2 found what keeps it from training"
  assert peers.exit_code == errors.ExitCode.DATA


def test_heartbeats_that_pass_one_way_only_are_found_on_both_sides():
  """As over a network whose firewall lets TCP through both ways, and UDP one way."""
  workers = addresses(2)
  timeouts = Timeouts(start=2.0, peer=20.0, step=3600.0)
  heard, mute = (
    FailureDetector(Cluster(workers, i), facts={}, timeouts=timeouts) for i in (0, 1)
  )
  mute._transport.send = lambda *_, **__: None
  found = checked(heard, mute)
  assert [finding.state for finding in found] == ["bad", "bad"]
  assert found[0].text == f"UDP: worker 1 at {workers[1]} did not start within 2 s"
  assert f"worker 0 at {workers[0]} " in found[1].text
  assert found[0].mend == "open the UDP port of the same number as the TCP port"


def test_heartbeats_that_pass_are_said_to():
  workers = addresses(2)
  timeouts = Timeouts(start=20.0, peer=20.0, step=3600.0)
  pair = (
    FailureDetector(Cluster(workers, i), facts={}, timeouts=timeouts) for i in (0, 1)
  )
  assert [finding.state for finding in checked(*pair)] == ["ok", "ok"]


def checked(*detectors: FailureDetector) -> list[Finding]:
  """Returns what each of some detectors finds, all at once."""
  for detector in detectors:
    detector.start()
  try:
    with futures.ThreadPoolExecutor() as pool:
      return list(pool.map(cluster_checks.check_heartbeats, detectors))
  finally:
    for detector in detectors:
      detector.leave(errors.ExitCode.DONE)


def test_names_that_do_not_resolve_are_listed():
  cluster = Cluster(("127.0.0.1:1", "nowhere.invalid:2"), 0)
  found = cluster_checks.check_names(cluster)
  assert found.state == "bad"
  assert found.text.startswith("nowhere.invalid of ")


def test_a_stranger_s_words_do_not_end_the_roll_call():
  workers = addresses(2)
  host, _, port = workers[0].partition(":")
  address = (host, int(port))

  def disturb() -> None:
    for _ in range(20):
      with (
        contextlib.suppress(OSError),
        socket.create_connection(address) as it,
      ):
        it.sendall(b"GET / HTTP/1.1\r\n\r\n")
        it.shutdown(socket.SHUT_WR)

  noise = threading.Thread(target=disturb)
  noise.start()
  answers = call_all(workers, {0: REPORT, 1: REPORT})
  noise.join()
  assert set(answers[0].reports) == set(answers[1].reports) == {0, 1}


def test_a_proxy_is_a_finding_that_names_its_variables():
  cluster = Cluster(("127.0.0.1:1", "127.0.0.1:2"), 0)
  given = {"https_proxy": "http://p:1", "http_proxy": "http://p:1", "no_proxy": "a"}
  (found,) = cluster_checks.check_proxies(cluster, given)
  assert found.state == "ok"
  assert found.text.startswith("https_proxy, http_proxy set: the workers talk past ")
  assert not list(cluster_checks.check_proxies(cluster, {"no_proxy": "a"}))
  assert not list(cluster_checks.check_proxies(Cluster(), given))
