"""Addresses for a cluster on this machine alone."""

import socket

import pytest

from facedist.distributed import detect


def test_addresses_are_those_whose_two_ports_are_both_free(
  monkeypatch: pytest.MonkeyPatch,
):
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heartbeats:
    heartbeats.bind(("127.0.0.1", 0))
    taken = heartbeats.getsockname()[1]
    ports = [taken, 0, 0]  # that the kernel gives out, 0 for any
    create = socket.create_server
    monkeypatch.setattr(
      socket, "create_server", lambda address: create((address[0], ports.pop(0)))
    )
    addresses = detect.free_addresses(2)
  assert not ports
  assert len(set(addresses)) == 2
  assert f"127.0.0.1:{taken}" not in addresses
  for address in addresses:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
      again.bind(("127.0.0.1", int(address.rpartition(":")[2])))
