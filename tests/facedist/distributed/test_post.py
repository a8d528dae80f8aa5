"""Datagrams between workers, over loopback."""

import time

from facedist.distributed.cluster import Cluster
from facedist.distributed.detect import free_addresses
from facedist.distributed.heartbeat import Transport


def test_what_has_come_in_is_taken_in_however_late_it_is():
  workers = free_addresses(2)
  first, second = (Transport(Cluster(workers, index)) for index in (0, 1))
  try:
    for word in (b"a", b"b", b"c"):
      second.send(word, look_up_again=[0])
    assert list(first.receive(until=time.monotonic() - 1.0)) == [b"a", b"b", b"c"]
    assert list(first.receive(until=time.monotonic() - 1.0)) == []
  finally:
    first.close()
    second.close()
