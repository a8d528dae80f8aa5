"""Heartbeats as datagrams."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from facedist.peers import pulse

OWN = pulse.Pulse(
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
  assert pulse.decode(pulse.encode(OWN)) == OWN


def test_long_texts_are_cut_to_fit_a_datagram():
  long = pulse.Pulse(
    run="r", index=1, life="a" * 32, facts={"version": "1"}, reason="x" * 9999
  )
  assert len(pulse.encode(long)) <= pulse.MOST_BYTES


@pytest.mark.parametrize(
  "change", [{"index": "1"}, {"facts": None}, {"step": 1.5}, {"more": 1}]
)
def test_what_has_another_shape_is_no_heartbeat(change: dict):
  content = json.loads(pulse.encode(OWN)) | change
  assert pulse.decode(json.dumps(content).encode()) is None


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_may_come_in(datagram: bytes):
  assert pulse.decode(datagram) is None


def test_a_deep_nest_is_no_heartbeat():
  assert pulse.decode(b"[" * 2000) is None


def test_another_order_of_workers_is_another_run():
  assert pulse.run_name(["a:1", "b:1"]) != pulse.run_name(["b:1", "a:1"])
