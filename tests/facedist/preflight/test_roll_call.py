"""Workers exchange reports over real sockets; the checks judge what came of it."""

import contextlib
import socket
import threading

import pytest

from facedist import errors
from facedist.cluster import Cluster
from facedist.preflight import cluster_checks, roll_call
from facedist.preflight.roll_call import Answers

REPORT = {
  "config": "c",
  "data": "d",
  "facedist": "0.1.0",
  "tensorflow": "2.15.1",
  "python": "3.11.7",
  "numpy": "1.26",
  "devices": ["H100 (9.0)"] * 2,
  "sound": True,
}


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
    crew = Cluster(workers, index)
    answers[index] = roll_call.call(crew, reports[index], seconds=20)

  threads = [threading.Thread(target=call_one, args=(index,)) for index in reports]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return answers


def states(crew: Cluster, answers: Answers) -> dict[str, str]:
  return {
    finding.check: finding.state
    for finding in cluster_checks.check_answers(crew, answers)
  }


def test_three_workers_hear_all_reports():
  workers = addresses(3)
  reports = {index: REPORT | {"own": index} for index in range(3)}
  answers = call_all(workers, reports)
  for index, heard in answers.items():
    assert {peer: report["own"] for peer, report in heard.reports.items()} == {
      0: 0,
      1: 1,
      2: 2,
    }
    assert heard.callers == {0, 1, 2} - {index}
    assert all(abs(offset) < 1 for offset in heard.clock_offsets.values())
    assert set(states(Cluster(workers, index), heard).values()) == {"ok"}


def test_one_that_is_not_there_is_named():
  workers = addresses(2)
  crew = Cluster(workers, 0)
  answers = roll_call.call(crew, REPORT, seconds=1)
  (ports,) = [
    finding
    for finding in cluster_checks.check_answers(crew, answers)
    if finding.check == "ports"
  ]
  assert ports.state == "bad"
  assert ports.exit_code == errors.ExitCode.PEER_LOST
  assert ports.text.startswith(f"worker 1 at {workers[1]} cannot be reached (")
  assert ports.mend == "start it, or open its TCP and UDP port for the other workers"


def test_a_port_open_one_way_only_is_named():
  answers = Answers({0: REPORT, 1: REPORT}, {1: 0.0}, {}, set())
  crew = Cluster(("a:1", "b:2"), 0)
  ports = next(iter(cluster_checks.check_answers(crew, answers)))
  assert ports.state == "bad"
  assert ports.text == "worker 1 at b:2 does not reach this worker at a:1"


def test_a_clock_that_is_far_off_is_a_warning():
  answers = Answers({0: REPORT, 1: REPORT}, {1: -7.5}, {}, {1})
  found = list(cluster_checks.check_answers(Cluster(("a:1", "b:2"), 0), answers))
  assert found[1].state == "warning"
  assert "worker 1's is -7.50 s from this one's" in found[1].text


@pytest.mark.parametrize(
  ("name", "value"),
  [("tensorflow", "2.16.1"), ("config", "x"), ("devices", ["H100 (9.0)"])],
)
def test_a_worker_that_is_unlike_the_others_is_named(name: str, value: object):
  answers = Answers({0: REPORT, 1: REPORT | {name: value}}, {1: 0.0}, {}, {1})
  found = {
    finding.check: finding
    for finding in cluster_checks.check_answers(Cluster(("a:1", "b:2"), 0), answers)
  }
  bad = found.pop(name)
  assert bad.state == "bad"
  assert bad.text.startswith("worker 1 has ")
  assert bad.exit_code == errors.ExitCode.CONFIG
  assert {finding.state for finding in found.values()} == {"ok"}


def test_names_that_do_not_resolve_are_listed():
  crew = Cluster(("127.0.0.1:1", "nowhere.invalid:2"), 0)
  found = cluster_checks.check_names(crew)
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
