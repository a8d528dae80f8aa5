"""How TensorFlow forms its cluster, and what it does to signals meanwhile."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping, MutableMapping

import tensorflow as tf

from facedist import deadline, errors
from facedist.cluster import Cluster, split_address

# gRPC, which TensorFlow's workers talk by, would look for their addresses at a proxy.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY = "no_grpc_proxy"

PEER_ERRORS = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.UnavailableError,
)
"""What a collective raises when another worker is lost."""


@contextlib.contextmanager
def forming(cluster: Cluster, *, seconds: float) -> Iterator[None]:
  """Lets the body form TensorFlow's cluster; ends the process if it takes longer.

  A cluster that loses a worker while it forms waits for ever, in native code that
  holds the interpreter's lock; so only the kernel can end it. A restart mends it.

  Raises:
    errors.NotFormedError: It could not be formed, as where a port is taken.
  """
  bypass_proxies(cluster, os.environ)
  _set_heartbeat(cluster, seconds)
  try:
    with deadline.ended_after(seconds):
      yield
  except (*PEER_ERRORS, tf.errors.UnknownError) as error:
    reason = str(error.message).partition("\n")[0]
    raise errors.NotFormedError(
      f"TensorFlow could not form the cluster as worker {cluster.index} at "
      f"{cluster.workers[cluster.index]} ({reason}); see that this TCP port is free "
      "and that the other workers live, then start all again."
    ) from error


def proxies(environment: Mapping[str, str]) -> list[str]:
  """Returns the variables that name a proxy which gRPC would use."""
  return [name for name in _PROXIES if environment.get(name)]


def bypass_proxies(cluster: Cluster, environment: MutableMapping[str, str]) -> None:
  """Lets the workers of a cluster talk to each other directly.

  Only gRPC reads the variable that is set, so a bucket is still reached by the proxy.
  """
  if not proxies(environment):
    return
  hosts = {split_address(worker)[0]: None for worker in cluster.workers}
  before = [environment[_NO_PROXY]] if environment.get(_NO_PROXY) else []
  environment[_NO_PROXY] = ",".join([*before, *hosts])


def restore_signals() -> None:
  """Gives SIGTERM and SIGINT back to Python.

  MultiWorkerMirroredStrategy installs a native handler that swallows SIGTERM, so
  that no process could be stopped politely.
  """
  for number in (signal.SIGTERM, signal.SIGINT):
    handler = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def swallowed_sigterm() -> int | None:
  """Waits until TensorFlow tells of a SIGTERM that came while the cluster formed.

  Its native handler had the signal then, and writes which worker's it was to a store
  that all workers read. A private interface of TensorFlow 2.15.

  Returns:
    The worker's place; None where the cluster ends without such a signal.
  """
  from tensorflow.python.eager import context

  try:
    told = context.context().get_config_key_value(_NOTICE)
  except (tf.errors.OpError, RuntimeError):  # the cluster is gone
    return None
  found = re.search(r"task:(\d+)", str(told))
  return int(found[1]) if found else None


def _set_heartbeat(cluster: Cluster, seconds: float) -> None:
  """Sets how long TensorFlow's own service does without a word of a worker.

  A private interface of TensorFlow 2.15; its default of 10 s would end a job that
  --peer_timeout has more patience with.
  """
  from tensorflow.python.eager import context
  from tensorflow.tsl.protobuf import coordination_config_pb2

  jobs = [
    coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=cluster.num_workers)
  ]
  context.context().configure_coordination_service(
    service_type="standalone",
    service_leader="/job:worker/replica:0/task:0",
    heartbeat_timeout_in_ms=round(1000 * seconds),
    coordinated_jobs=jobs,
  )


_NOTICE = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"
