"""A worker whose heartbeats the test writes."""

import time

from facedist.distributed import heartbeat as heartbeats
from facedist.distributed.cluster import Cluster
from facedist.distributed.heartbeat import Heartbeat, Transport

_MAX_SECONDS = 120.0


class Peer:
  """Worker 1 of two on loopback, which sends what the test says, by UDP alone."""

  def __init__(self, workers: tuple[str, ...]) -> None:
    self._cluster = heartbeats.cluster_id(workers)
    self._transport = Transport(Cluster(workers, 1))
    self.close = self._transport.close

  def send(self, **fields) -> None:
    given = {"process": "p", "facts": {}, "receives_all": True} | fields
    heartbeat = Heartbeat(cluster=self._cluster, index=1, **given)
    self._transport.send(heartbeats.encode(heartbeat), look_up=[])

  def last_words(self) -> Heartbeat:
    """Waits for the heartbeat with which the other worker leaves."""
    for datagram in self._transport.receive(until=time.monotonic() + _MAX_SECONDS):
      heartbeat = heartbeats.decode(datagram)
      if heartbeat is not None and heartbeat.has_left:
        return heartbeat
    raise AssertionError("it has not left")
