"""Reads the cluster that the environment describes, or makes one on this machine."""

import contextlib
import os
import secrets
import socket
from collections.abc import Mapping

from facedist import errors
from facedist.distributed import kubernetes, slurm, tf_config
from facedist.distributed.cluster import Cluster

_FIRST_PORT, _END_PORT = 10_000, 32_768  # Linux gives others to connections
_HOST = "127.0.0.1"


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that the environment describes; one without workers if none.

  TF_CONFIG wins. If it is missing or empty, the variables of a Slurm step or of a
  Kubernetes job are read, which must not both describe a cluster.

  Raises:
    errors.UsageError: Variables are wrong or missing, contradict each other, or do not
      make this process a worker.
  """
  by_tf_config = tf_config.read(environment.get("TF_CONFIG", ""))
  if by_tf_config.workers:
    return by_tf_config
  by_slurm = slurm.read(environment)
  by_kubernetes = kubernetes.read(environment)
  if by_slurm.workers and by_kubernetes.workers:
    raise errors.UsageError(
      f"the variables of {by_slurm.origin} and of {by_kubernetes.origin} both describe "
      f"a cluster; unset {kubernetes.WORKERS} or set TF_CONFIG, which wins."
    )
  return by_kubernetes if by_kubernetes.workers else by_slurm


def free_addresses(count: int) -> tuple[str, ...]:
  """Returns `count` loopback addresses whose TCP and UDP ports are both free.

  A worker needs TCP for TensorFlow and UDP for heartbeats. Until it opens the ports,
  another process may take them, so they are not among those that Linux gives to
  outgoing connections.
  """
  with contextlib.ExitStack() as held:
    addresses: list[str] = []
    while len(addresses) < count:
      port = _FIRST_PORT + secrets.randbelow(_END_PORT - _FIRST_PORT)
      with contextlib.suppress(OSError):  # taken; another one then
        held.enter_context(socket.create_server((_HOST, port)))
        datagrams = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind((_HOST, port))
        addresses.append(f"{_HOST}:{port}")
    return tuple(addresses)
