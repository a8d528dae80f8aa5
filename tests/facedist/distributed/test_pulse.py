"""Heartbeats as datagrams."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from facedist.distributed import heartbeat

OWN = heartbeat.Heartbeat(
  run="r",
  index=1,
  life="a",
  facts={"version": "1"},
  step=3,
  arrivals=4,
  idle=0.5,
  activity="training",
  exit_code=143,
  reason="asked to stop",
)


def test_a_heartbeat_arrives_as_it_was_sent():
  assert heartbeat.decode(heartbeat.encode(OWN)) == OWN


def test_what_is_long_is_cut_to_fit_a_datagram():
  facts = {"version": "10.11.12", "config": "a" * 16}
  numbers = {"index": 9999, "step": 10**8, "arrivals": 10**8, "idle": 9999.9}
  long = heartbeat.Heartbeat(
    run="a" * 16,
    life="a" * 32,
    facts=facts,
    activity="x" * 9999,
    exit_code=144,
    reason="x" * 9999,
    **numbers,
  )
  assert len(heartbeat.encode(long)) <= heartbeat.MOST_BYTES


@pytest.mark.parametrize(
  "change", [{"index": "1"}, {"facts": None}, {"step": 1.5}, {"more": 1}]
)
def test_what_has_another_shape_is_no_heartbeat(change: dict):
  content = json.loads(heartbeat.encode(OWN)) | change
  assert heartbeat.decode(json.dumps(content).encode()) is None


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_may_come_in(datagram: bytes):
  assert heartbeat.decode(datagram) is None


def test_a_deep_nest_is_no_heartbeat():
  assert heartbeat.decode(b"[" * 2000) is None


def test_another_order_of_workers_is_another_run():
  assert heartbeat.run_name(["a:1", "b:1"]) != heartbeat.run_name(["b:1", "a:1"])
