"""Who am I, and with whom: the environment to a cluster to a TensorFlow strategy."""

import contextlib
import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import config, errors

_TF_CONFIG_SHAPE = (
  '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of one training job, and which of them this process is.

  Attributes:
    workers: `host:port` of every worker, the chief first; empty for a process that
      trains by itself.
    index: This process's place among the workers.
  """

  workers: tuple[str, ...] = ()
  index: int = 0

  @property
  def num_workers(self) -> int:
    """Number of processes that train together, at least one."""
    return max(1, len(self.workers))

  @property
  def is_chief(self) -> bool:
    """Whether this worker writes what only one may write."""
    return self.index == 0


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that the environment describes; none is a process by itself.

  Raises:
    errors.UsageError: TF_CONFIG is wrong or makes this process no worker.
  """
  if text := environment.get("TF_CONFIG"):
    return from_tf_config(text)
  return Cluster()


def from_tf_config(text: str) -> Cluster:
  """Reads TF_CONFIG as TensorFlow and Kubeflow write it.

  The chief of a cluster that names one is worker 0, its workers follow.

  Raises:
    errors.UsageError: It is wrong or makes this process no worker.
  """
  try:
    content = json.loads(text)
    jobs, task = content.get("cluster", {}), content.get("task", {})
    workers = tuple(jobs.get("chief", [])) + tuple(jobs.get("worker", []))
    kind, index = task.get("type", "worker"), int(task.get("index", 0))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.UsageError(
      f"TF_CONFIG={text!r:.120} cannot be read ({error}); write {_TF_CONFIG_SHAPE}."
    ) from error
  if kind == "evaluator":
    raise errors.UsageError(
      "TF_CONFIG makes this process an evaluator, which does not train; run "
      "python -m facedist.evaluate there."
    )
  if kind not in ("chief", "worker"):
    raise errors.UsageError(
      f"TF_CONFIG has task type {kind!r}; only chief and worker can train."
    )
  if not workers:
    return Cluster()
  _check_addresses(workers)
  if not 0 <= index < len(jobs.get(kind, [])):
    raise errors.UsageError(
      f"TF_CONFIG has task {kind} {index}, but its cluster has "
      f"{len(jobs.get(kind, []))} of that type, counted from 0."
    )
  return Cluster(workers, workers.index(jobs[kind][index]))


def _check_addresses(workers: tuple[Any, ...]) -> None:
  """Raises UsageError unless every worker has a `host:port` of its own."""
  for worker in workers:
    if not (isinstance(worker, str) and re.fullmatch(r"\S+:[0-9]+", worker)):
      raise errors.UsageError(
        f"TF_CONFIG has the worker address {worker!r}; write host:port."
      )
    if workers.count(worker) > 1:
      raise errors.UsageError(
        f"TF_CONFIG has the worker address {worker!r} twice; each worker needs a "
        "port of its own."
      )


def make_strategy(
  name: str, cluster: Cluster, *, communication: str = "auto"
) -> tf.distribute.Strategy:
  """Returns the strategy of that name, ready to make variables in its scope.

  To be called before anything else touches TensorFlow's devices, in the main thread.
  With `multiworker` it returns once every worker of the cluster is there.

  Args:
    name: `one` device, `mirrored` over this machine's GPUs, or `multiworker` over
      the GPUs of the whole cluster; the CPU where there is no GPU.
    cluster: What `from_environment` found.
    communication: How multiworker's gradients travel: `nccl` between GPUs, `ring`
      over gRPC, or `auto`, nccl where there are GPUs.

  Raises:
    errors.UsageError: An unknown name, a strategy of one machine in a cluster of
      several, or nccl without a GPU.
  """
  build = config.lookup(STRATEGIES, name, "strategy")
  if build is not _multiworker and cluster.num_workers > 1:
    raise errors.UsageError(
      f"--strategy={name} trains in one process, but TF_CONFIG has "
      f"{cluster.num_workers} workers; use --strategy=multiworker or unset TF_CONFIG."
    )
  for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)
  strategy = build(cluster, communication)
  restore_signals()
  return strategy


def restore_signals() -> None:
  """Gives SIGTERM and SIGINT back to Python.

  MultiWorkerMirroredStrategy installs a native handler that swallows SIGTERM, so
  that no process could be stopped politely.
  """
  for number in (signal.SIGTERM, signal.SIGINT):
    handler = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def local_replicas(strategy: tf.distribute.Strategy) -> int:
  """Returns how many of the strategy's replicas run in this process."""
  return len(strategy.extended.worker_devices)


def barrier(strategy: tf.distribute.Strategy) -> None:
  """Waits until every worker has called this as often; a collective like any other."""
  ones = strategy.experimental_distribute_values_from_function(lambda _: tf.ones([]))
  strategy.reduce("SUM", ones, axis=None).numpy()


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
  """Turns what TensorFlow raises when another worker is lost into one line.

  Raises:
    errors.PeerLostError: A collective failed because a worker is gone.
  """
  try:
    yield
  except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
    reason = str(error.message).partition("\n")[0]
    raise errors.PeerLostError(
      "another worker of the cluster was lost; all workers started again go on from "
      f"the newest checkpoint ({reason})."
    ) from error


def describe(strategy: tf.distribute.Strategy, cluster: Cluster) -> str:
  """Returns one line: the strategy, its replicas, and this worker's place."""
  replicas = local_replicas(strategy)
  kind = strategy.extended.worker_devices[0].split(":")[-2]
  name = _NAMES.get(type(strategy).__name__, "multiworker")
  text = (
    f"--strategy={name}: {strategy.num_replicas_in_sync} replicas = "
    f"{cluster.num_workers} workers x {replicas} {kind}"
  )
  if not cluster.workers:
    return text
  role = "the chief" if cluster.is_chief else f"chief at {cluster.workers[0]}"
  return (
    f"{text}; this is worker {cluster.index} at {cluster.workers[cluster.index]}"
    f" ({role})"
  )


def _one(cluster: Cluster, communication: str) -> tf.distribute.Strategy:
  """One replica on the first GPU or the CPU."""
  gpus = tf.config.list_physical_devices("GPU")
  return tf.distribute.OneDeviceStrategy("GPU:0" if gpus else "CPU:0")


def _mirrored(cluster: Cluster, communication: str) -> tf.distribute.Strategy:
  """A replica on each of this machine's GPUs or logical CPUs."""
  if tf.config.list_physical_devices("GPU"):
    return tf.distribute.MirroredStrategy()
  cpus = [f"CPU:{i}" for i in range(len(tf.config.list_logical_devices("CPU")))]
  # The default would try NCCL and warn that there is none.
  reduction = tf.distribute.ReductionToOneDevice()
  return tf.distribute.MirroredStrategy(cpus, cross_device_ops=reduction)


def _multiworker(cluster: Cluster, communication: str) -> tf.distribute.Strategy:
  """A replica on each GPU of the cluster, or one on each worker's CPU."""
  gpus = tf.config.list_physical_devices("GPU")
  chosen = config.lookup(COMMUNICATIONS, communication, "communication")
  if chosen == "AUTO":  # TensorFlow's own AUTO does not choose NCCL wherever it can
    chosen = "NCCL" if gpus else "RING"
  if chosen == "NCCL" and not gpus:
    raise errors.UsageError(
      "--communication=nccl needs GPUs and there are none; use --communication=ring."
    )
  if cluster.num_workers == 1:
    logging.info("No other workers in TF_CONFIG: a cluster of one.")
  # A cluster of one gets no addresses: TensorFlow then opens no port.
  job = {"worker": list(cluster.workers)} if cluster.num_workers > 1 else {}
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec(job),
    task_type="worker",
    task_id=cluster.index,
    num_accelerators={"GPU": len(gpus)},
    rpc_layer="grpc",
  )
  options = tf.distribute.experimental.CommunicationOptions(
    implementation=tf.distribute.experimental.CommunicationImplementation[chosen]
  )
  return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


STRATEGIES: dict[str, Callable[[Cluster, str], tf.distribute.Strategy]] = {
  "one": _one,
  "mirrored": _mirrored,
  "multiworker": _multiworker,
}

_NAMES = {"OneDeviceStrategy": "one", "MirroredStrategy": "mirrored"}

COMMUNICATIONS = {"auto": "AUTO", "ring": "RING", "nccl": "NCCL"}
