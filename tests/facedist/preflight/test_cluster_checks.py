"""What the workers of a cluster find out about each other before training."""

import time
from collections.abc import Iterator
from concurrent import futures

import pytest

from facedist import errors
from facedist.distributed.cluster import Cluster
from facedist.distributed.detect import free_addresses
from facedist.preflight import cluster as cluster_checks
from facedist.preflight.checks import Finding
from tests.facedist.peers import Peer

FACTS = {"config": "c", "numpy": "1.26", "devices": "2 x H100 (9.0, 85 GB)"}
Found = dict[str, Finding]


def check(
  workers: tuple[str, ...],
  index: int,
  *,
  own_code: errors.ExitCode = errors.ExitCode.DONE,
  seconds: float = 20.0,
  **facts: str,
) -> Found:
  """Returns what a worker finds, by check."""
  findings = cluster_checks.check_peers(
    Cluster(workers, index), FACTS | facts, own_code=own_code, seconds=seconds
  )
  return {finding.check: finding for finding in findings}


def check_all(*unlike: dict) -> list[Found]:
  """Returns what each of some workers finds, all at once; `unlike` of each worker."""
  workers = free_addresses(len(unlike))
  with futures.ThreadPoolExecutor(len(unlike)) as pool:
    calls = [
      pool.submit(check, workers, index, **more) for index, more in enumerate(unlike)
    ]
    return [call.result() for call in calls]


def test_a_worker_that_does_not_match_is_refused_on_both_sides():
  found = check_all({}, {"numpy": "1.27"})
  for (peers,), there, here in zip(
    map(dict.values, found), ("1.27", "1.26"), ("1.26", "1.27"), strict=True
  ):
    assert (peers.check, peers.state) == ("peers", "bad")
    assert peers.text.endswith(f"to this run: numpy {there} there, {here} here")
    assert peers.exit_code == errors.ExitCode.CONFIG


def test_a_problem_that_another_worker_found_is_one_of_all():
  found, _ = check_all({}, {"own_code": errors.ExitCode.DATA})
  assert "left at step 0 with exit code 4: its own checks failed" in found["peers"].text
  assert found["peers"].fix == "see its findings."
  assert found["peers"].exit_code == errors.ExitCode.DATA


@pytest.fixture
def workers() -> tuple[str, ...]:
  """Two addresses on loopback whose ports are free."""
  return free_addresses(2)


@pytest.fixture
def peer(workers: tuple[str, ...]) -> Iterator[Peer]:
  made = Peer(workers)
  yield made
  made.close()


def test_a_worker_that_is_not_there_is_named(workers: tuple[str, ...]):
  found = check(workers, 0, seconds=1.0)["heartbeats"]
  assert found.text == f"worker 1 at {workers[1]} did not start within 1 s"
  assert "open its TCP and UDP port" in found.fix
  assert found.exit_code == errors.ExitCode.PEER_LOST


def test_a_closed_tcp_port_is_named_and_a_wrong_clock_is_a_warning(
  workers: tuple[str, ...], peer: Peer
):
  with futures.ThreadPoolExecutor() as pool:
    checking = pool.submit(check, workers, 0)
    while not checking.done():
      peer.send(facts=FACTS, sent_at=time.time() - 3600.0)
      time.sleep(0.05)
    found = checking.result()
  assert found["heartbeats"].state == "ok"
  assert found["clocks"].state == "warning"
  assert found["clocks"].text.startswith("worker 1's is -36")
  assert found["clocks"].fix == "run NTP on all machines"
  assert found["ports"].text.startswith(
    f"worker 1 at {workers[1]} cannot be reached ([Errno 111]"
  )
  assert found["ports"].exit_code == errors.ExitCode.PEER_LOST
  assert "peers" not in found
  assert peer.last_words().exit_code == errors.ExitCode.PEER_LOST


def test_names_that_do_not_resolve_are_listed():
  cluster = Cluster(("127.0.0.1:1", "nowhere.invalid:2"), 0)
  found = cluster_checks.check_names(cluster)
  assert found.state == "bad"
  assert found.text.startswith("nowhere.invalid of ")


def test_a_proxy_is_a_finding_that_names_its_variables():
  cluster = Cluster(("127.0.0.1:1", "127.0.0.1:2"), 0)
  given = {"https_proxy": "http://p:1", "http_proxy": "http://p:1", "no_proxy": "a"}
  (found,) = cluster_checks.check_proxies(cluster, given)
  assert found.state == "ok"
  assert found.text.startswith("https_proxy, http_proxy set: the workers talk past ")
  assert not list(cluster_checks.check_proxies(cluster, {"no_proxy": "a"}))
  assert not list(cluster_checks.check_proxies(Cluster(), given))
