"""Datagrams between workers, over loopback."""

import time

from facedist.cluster import Cluster, free_addresses
from facedist.peers.post import Post


def test_what_has_come_in_is_taken_in_however_late_it_is():
  workers = free_addresses(2)
  first, second = (Post(Cluster(workers, index)) for index in (0, 1))
  try:
    for word in (b"a", b"b", b"c"):
      second.send(word, look_up_again=[0])
    assert list(first.receive(until=time.monotonic() - 1.0)) == [b"a", b"b", b"c"]
    assert list(first.receive(until=time.monotonic() - 1.0)) == []
  finally:
    first.close()
    second.close()
