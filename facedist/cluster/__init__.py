"""Who am I, and with whom: the environment to a cluster of workers."""

import os
from collections.abc import Mapping

from facedist import errors
from facedist.cluster import kubernetes, slurm, tf_config
from facedist.cluster.description import Cluster, split_address
from facedist.cluster.loopback import free_addresses

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
