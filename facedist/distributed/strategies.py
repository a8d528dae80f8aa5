"""Makes the TensorFlow strategy of a cluster and forms TensorFlow's own cluster."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TypeAlias

import tensorflow as tf

from facedist import config, deadline, errors
from facedist.distributed.cluster import Cluster, split_address

CommunicationOptions: TypeAlias = tf.distribute.experimental.CommunicationOptions
_Build: TypeAlias = Callable[[Cluster, CommunicationOptions], tf.distribute.Strategy]

COMMUNICATIONS = {"auto": "AUTO", "ring": "RING", "nccl": "NCCL"}
DEFAULT_PACK_MB = {"NCCL": 25.0, "RING": 4.0}
"""Gradients that are reduced together, so that those of the last layers are sent while
those of the first layers are computed. NCCL's is the default of PyTorch's DDP, which
does the same (arXiv:2006.15704); over gRPC on a CPU, packs that fit a core's cache were
fastest."""

PEER_ERRORS = (
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.UnavailableError,
)
"""What a collective raises when another worker is lost."""

# Workers talk by gRPC, which would look for their addresses at a proxy.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY = "no_grpc_proxy"
_PREEMPTION_KEY = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"  # of TensorFlow's own store
_NAMES = {"OneDeviceStrategy": "one", "MirroredStrategy": "mirrored"}


def make_strategy(
  name: str,
  cluster: Cluster,
  *,
  communication: str = "auto",
  pack_mb: float | None = None,
  peer_timeout: float = 60.0,
) -> tf.distribute.Strategy:
  """Returns the strategy of that name, ready to make variables in its scope.

  To be called before anything else uses TensorFlow's devices, in the main thread.
  With `multiworker` it returns once every worker of the cluster is there.

  Args:
    name: `one` device, `mirrored` over this machine's GPUs, or `multiworker` over
      the GPUs of the whole cluster; the CPU where there is no GPU.
    cluster: What `from_environment` found.
    communication: How multiworker reduces gradients: `nccl` between GPUs, `ring`
      over gRPC, or `auto`, nccl where there are GPUs.
    pack_mb: Megabytes of multiworker's gradients that are reduced together; 0 for all
      of them, none for the default of the collectives.
    peer_timeout: Seconds of silence after which TensorFlow gives up a worker.

  Raises:
    errors.UsageError: An unknown name, a strategy of one machine in a cluster of
      several, multiworker where nothing describes a cluster, or nccl without a GPU.
    errors.NotFormedError: The cluster could not be formed.
  """
  build = check_strategy(name, cluster, communication=communication)
  share_gpus()
  options = communication_options(communication, pack_mb)
  if cluster.num_workers == 1:
    strategy = build(cluster, options)
  else:
    with forming(cluster, seconds=peer_timeout):
      strategy = build(cluster, options)
  restore_signals()
  return strategy


def check_strategy(
  name: str, cluster: Cluster, *, communication: str = "auto"
) -> _Build:
  """Returns what builds the strategy of that name, after checking that it can.

  Uses no device, so it can be called long before the strategy is made.

  Raises:
    errors.UsageError: As `make_strategy`.
  """
  build = config.lookup(STRATEGIES, name, "strategy")
  if build is not _multiworker:
    if cluster.num_workers > 1:
      raise errors.UsageError(
        f"--strategy={name} trains in one process, but {cluster.origin} has "
        f"{cluster.num_workers} workers; use --strategy=multiworker or start one "
        "process."
      )
    return build
  has_gpus = bool(tf.config.list_physical_devices("GPU"))
  if choose_collectives(communication) == "NCCL" and not has_gpus:
    raise errors.UsageError(
      "--communication=nccl needs GPUs and there are none; use --communication=ring."
    )
  if cluster.left_out:
    raise errors.UsageError(f"--strategy=multiworker: {cluster.left_out}.")
  if not cluster.workers:
    raise errors.UsageError(
      "--strategy=multiworker needs to know the workers, and nothing describes them: "
      "neither TF_CONFIG nor the variables of a Slurm step or of a Kubernetes job "
      "(docs/launch.md); give one of the three, or --strategy=mirrored to train in one "
      "process."
    )
  return build


def _one(cluster: Cluster, options: CommunicationOptions) -> tf.distribute.Strategy:
  """One replica on the first GPU or the CPU."""
  gpus = tf.config.list_physical_devices("GPU")
  return tf.distribute.OneDeviceStrategy("GPU:0" if gpus else "CPU:0")


def _mirrored(
  cluster: Cluster, options: CommunicationOptions
) -> tf.distribute.Strategy:
  """A replica on each of this machine's GPUs or logical CPUs."""
  if tf.config.list_physical_devices("GPU"):
    return tf.distribute.MirroredStrategy()
  cpus = [f"CPU:{i}" for i in range(len(tf.config.list_logical_devices("CPU")))]
  # The default would try NCCL and warn that there is none.
  reduction = tf.distribute.ReductionToOneDevice()
  return tf.distribute.MirroredStrategy(cpus, cross_device_ops=reduction)


def _multiworker(
  cluster: Cluster, options: CommunicationOptions
) -> tf.distribute.Strategy:
  """A replica on each GPU of the cluster, or one on each worker's CPU."""
  gpus = tf.config.list_physical_devices("GPU")
  # A cluster of one gets no addresses: TensorFlow then opens no port.
  job = {"worker": list(cluster.workers)} if cluster.num_workers > 1 else {}
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec(job),
    task_type="worker",
    task_id=cluster.index,
    num_accelerators={"GPU": len(gpus)},
    rpc_layer="grpc",
  )
  return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


STRATEGIES: dict[str, _Build] = {
  "one": _one,
  "mirrored": _mirrored,
  "multiworker": _multiworker,
}


def choose_collectives(communication: str) -> str:
  """Returns what `--communication` means on this machine: NCCL or RING."""
  chosen = config.lookup(COMMUNICATIONS, communication, "communication")
  if chosen != "AUTO":
    return chosen
  # TensorFlow's own AUTO does not always choose NCCL where it could.
  return "NCCL" if tf.config.list_physical_devices("GPU") else "RING"


def communication_options(
  communication: str, pack_mb: float | None
) -> CommunicationOptions:
  """Returns how multiworker reduces gradients; see `make_strategy`."""
  chosen = choose_collectives(communication)
  megabytes = DEFAULT_PACK_MB[chosen] if pack_mb is None else pack_mb
  return CommunicationOptions(
    bytes_per_pack=round(megabytes * 1e6),
    implementation=tf.distribute.experimental.CommunicationImplementation[chosen],
  )


def share_gpus() -> None:
  """Allocates GPU memory as needed, since other processes may use the same GPU."""
  for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)


@contextlib.contextmanager
def forming(cluster: Cluster, *, seconds: float) -> Iterator[None]:
  """Lets the body form TensorFlow's cluster; ends the process if it takes longer.

  A cluster that loses a worker while it forms waits for ever, in native code that
  holds the interpreter's lock, so only the kernel can end the process. A restart helps.

  Raises:
    errors.NotFormedError: It could not be formed, as where a port is taken.
  """
  bypass_proxies(cluster, os.environ)
  _set_heartbeat(cluster, seconds)
  try:
    with deadline.ended_after(seconds):
      yield
  except (*PEER_ERRORS, tf.errors.UnknownError) as error:
    reason = errors.first_line(error)
    raise errors.NotFormedError(
      f"TensorFlow could not form the cluster as worker {cluster.index} at "
      f"{cluster.workers[cluster.index]} ({reason}); see that this TCP port is free "
      "and that the other workers live, then start all again."
    ) from error


def _set_heartbeat(cluster: Cluster, seconds: float) -> None:
  """Sets how long TensorFlow's own service waits for a heartbeat of a worker.

  A private interface of TensorFlow 2.15 and 2.21; its default of 10 s would end a job
  before --peer_timeout does.
  """
  from tensorflow.python.eager import context

  # each version keeps this module elsewhere, and imports it here
  config_of_jobs = context.coordination_config_pb2
  jobs = [config_of_jobs.CoordinatedJob(name="worker", num_tasks=cluster.num_workers)]
  context.context().configure_coordination_service(
    service_type="standalone",
    service_leader="/job:worker/replica:0/task:0",
    heartbeat_timeout_in_ms=round(1000 * seconds),
    coordinated_jobs=jobs,
  )


def proxies(environment: Mapping[str, str]) -> list[str]:
  """Returns the variables that name a proxy which gRPC would use."""
  return [name for name in _PROXIES if environment.get(name)]


def bypass_proxies(cluster: Cluster, environment: MutableMapping[str, str]) -> None:
  """Lets the workers of a cluster connect to each other without a proxy.

  Only gRPC reads the variable that is set; buckets are still reached by the proxy.
  """
  if not proxies(environment):
    return
  hosts = {split_address(worker)[0]: None for worker in cluster.workers}
  before = [environment[_NO_PROXY]] if environment.get(_NO_PROXY) else []
  environment[_NO_PROXY] = ",".join([*before, *hosts])


def restore_signals() -> None:
  """Gives SIGTERM and SIGINT back to Python.

  MultiWorkerMirroredStrategy installs a native handler that ignores SIGTERM, so that
  no process could save before it ends.
  """
  for number in (signal.SIGTERM, signal.SIGINT):
    handler = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def swallowed_sigterm() -> int | None:
  """Waits until TensorFlow reports a SIGTERM that arrived while the cluster formed.

  Its native handler received the signal, and writes which worker's it was to a store
  that all workers read. A private interface of TensorFlow 2.15.

  Returns:
    The worker's place; None where the cluster ends without such a signal.
  """
  from tensorflow.python.eager import context

  try:
    told = context.context().get_config_key_value(_PREEMPTION_KEY)
  except (tf.errors.OpError, RuntimeError):  # the cluster is gone
    return None
  found = re.search(r"task:(\d+)", str(told))
  return int(found[1]) if found else None


def local_replicas(strategy: tf.distribute.Strategy) -> int:
  """Returns how many of the strategy's replicas run in this process."""
  return len(strategy.extended.worker_devices)


def places(strategy: tf.distribute.Strategy) -> dict[int, str]:
  """Returns the replicas of this process by number, with the device of each."""
  numbers: list[int] = []

  def note(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
    numbers.append(context.replica_id_in_sync_group)
    return tf.zeros([])

  strategy.experimental_distribute_values_from_function(note)
  return dict(zip(numbers, strategy.extended.worker_devices, strict=True))


def describe_strategy(strategy: tf.distribute.Strategy, cluster: Cluster) -> str:
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
