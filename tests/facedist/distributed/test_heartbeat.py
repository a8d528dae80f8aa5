"""Heartbeats as datagrams, and their transport over loopback."""

import contextlib
import json
import socket
import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from facedist import errors
from facedist.distributed import heartbeat
from facedist.distributed.cluster import Cluster
from facedist.distributed.heartbeat import Transport

OWN = heartbeat.Heartbeat(
  cluster="r",
  index=1,
  process="a",
  facts={"version": "1"},
  step=3,
  sync_points=4,
  idle=0.5,
  activity="training",
  exit_code=143,
  reason="asked to stop",
)


def test_a_heartbeat_arrives_as_it_was_sent():
  assert heartbeat.decode(heartbeat.encode(OWN)) == OWN


def test_long_texts_are_cut_to_fit_a_datagram():
  long = heartbeat.Heartbeat(
    cluster="a" * 16,
    index=9999,
    process="a" * 32,
    facts={"version": "10.11.12", "config": "a" * 16},
    step=10**8,
    sync_points=10**8,
    idle=9999.9,
    activity="x" * 9999,
    exit_code=144,
    reason="x" * 9999,
  )
  assert len(heartbeat.encode(long)) <= heartbeat.MAX_BYTES


@pytest.mark.parametrize(
  "change", [{"index": "1"}, {"facts": None}, {"step": 1.5}, {"more": 1}]
)
def test_a_datagram_of_another_shape_is_no_heartbeat(change: dict):
  content = json.loads(heartbeat.encode(OWN)) | change
  assert heartbeat.decode(json.dumps(content).encode()) is None


@hypothesis.given(st.binary(max_size=200))
@hypothesis.example(b"[" * 2000)
def test_random_bytes_are_no_heartbeat(datagram: bytes):
  assert heartbeat.decode(datagram) is None


def test_another_order_of_workers_is_another_cluster():
  assert heartbeat.cluster_id(["a:1", "b:1"]) != heartbeat.cluster_id(["b:1", "a:1"])


def test_datagrams_that_have_arrived_are_received_even_if_time_is_up(
  workers: tuple[str, ...],
):
  first, second = (Transport(Cluster(workers, index)) for index in (0, 1))
  with contextlib.closing(first), contextlib.closing(second):
    for word in (b"a", b"b", b"c"):
      second.send(word, look_up=[0])
    assert list(first.receive(until=time.monotonic() - 1.0)) == [b"a", b"b", b"c"]
    assert list(first.receive(until=time.monotonic() - 1.0)) == []


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_taken_port_is_an_error_that_names_it(
  workers: tuple[str, ...], kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(heartbeat, "_PORT_SECONDS", 0.3)
  with taken(workers[0], kind), pytest.raises(errors.NotFormedError, match=workers[0]):
    Transport(Cluster(workers, 0))


def test_a_port_that_is_freed_soon_is_waited_for(workers: tuple[str, ...]):
  holder = taken(workers[0], socket.SOCK_STREAM)
  threading.Timer(0.5, holder.close).start()
  Transport(Cluster(workers, 0)).close()
  assert holder.fileno() == -1


def taken(address: str, kind: socket.SocketKind) -> socket.socket:
  """Returns a socket that holds a port."""
  holder = socket.socket(socket.AF_INET, kind)
  holder.bind(("127.0.0.1", int(address.rpartition(":")[2])))
  if kind == socket.SOCK_STREAM:
    holder.listen()
  return holder
