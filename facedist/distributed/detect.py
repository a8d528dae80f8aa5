"""Addresses for a cluster on this machine alone.

Who am I, and with whom: the environment to a cluster of workers.
"""

import contextlib
import os
import socket
from collections.abc import Mapping

from facedist import errors
from facedist.distributed import kubernetes, slurm, tf_config
from facedist.distributed.cluster import Cluster, split_address

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


__all__ = ["Cluster", "free_addresses", "from_environment", "split_address"]


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that the environment describes; one without workers if none.

  TF_CONFIG wins. Without it, or where it is empty, the variables of a Slurm step or of
  a Kubernetes job count, which must not both describe a cluster.

  Raises:
    errors.UsageError: The variables are wrong, lack some, contradict each other or
      make this process no worker.
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
