"""Addresses for a cluster on this machine alone."""

import contextlib
import socket

_HOST = "127.0.0.1"


def free_addresses(count: int) -> tuple[str, ...]:
  """Returns `count` loopback addresses whose ports nobody has, neither TCP's nor UDP's.

  A worker needs both: one for TensorFlow, one for heartbeats. Until it opens them
  somebody else may.
  """
  with contextlib.ExitStack() as held:
    addresses: list[str] = []
    while len(addresses) < count:
      stream = held.enter_context(socket.create_server((_HOST, 0)))
      port = stream.getsockname()[1]
      datagrams = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
      with contextlib.suppress(OSError):  # taken; the next one then
        datagrams.bind((_HOST, port))
        addresses.append(f"{_HOST}:{port}")
    return tuple(addresses)
