"""Checks of a worker's devices: GPU code, collectives, and whether a batch fits."""

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import tensorflow as tf

from facedist import errors
from facedist.data import augment
from facedist.data.samplers.epoch_sampler import BatchShard
from facedist.data.shards.manifest import Manifest
from facedist.distributed import strategies
from facedist.preflight import checks
from facedist.preflight.checks import Finding
from facedist.training import schedules, step_health, train_state, train_step
from facedist.training.checkpoint import manager
from facedist.training.checkpoint.uploader import DiskUploader
from facedist.training.config import TrainConfig
from facedist.training.train_state import TrainState

_DRIVER = "libcuda.so.1"


def describe_devices() -> list[str]:
  """Returns a name for each of this worker's devices, with a GPU's kind and memory."""
  gpus = tf.config.list_physical_devices("GPU")
  if not gpus:
    return ["CPU"]
  names = []
  for place, gpu in enumerate(gpus):
    details = tf.config.experimental.get_device_details(gpu)
    capability = ".".join(map(str, details.get("compute_capability", ())))
    memory = _memory_bytes(place)
    size = f", {memory / 1e9:.0f} GB" if memory else ""
    names.append(f"{details.get('device_name', 'GPU')} ({capability}{size})")
  return names


def _memory_bytes(place: int) -> int | None:
  """Returns the memory of a GPU that is visible to this process; None if unknown.

  The driver says so at once; TensorFlow would have to set up the GPU first, for good.
  """
  try:
    driver = ctypes.CDLL(_DRIVER)
  except OSError:
    return None
  device, total = ctypes.c_int(), ctypes.c_size_t()
  failed = (
    driver.cuInit(0)
    or driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(place))
    or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
  )
  return None if failed else total.value


def check_machine_code() -> Iterator[Finding]:
  """Yields whether this TensorFlow holds machine code for each kind of GPU here."""
  built = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", [])
  kinds = {}
  for gpu in tf.config.list_physical_devices("GPU"):
    details = tf.config.experimental.get_device_details(gpu)
    if len(capability := details.get("compute_capability", ())) == 2:
      kinds[capability] = details.get("device_name", "GPU")
  for capability, name in sorted(kinds.items()):
    yield compare_machine_code(name, capability, built, version=tf.__version__)


def compare_machine_code(
  name: str, capability: tuple[int, int], built: Sequence[str], *, version: str
) -> Finding:
  """Says whether a GPU runs the machine code of a TensorFlow, and what to do if not.

  Code for X.y runs on X.z with z >= y (CUDA programming guide, "binary compatibility").
  For other GPUs, the driver compiles the intermediate code that is there too.

  Args:
    name: The GPU's.
    capability: Its compute capability.
    built: Such as `sm_70` (machine code alone) or `compute_80` (both kinds of code).
    version: TensorFlow's.
  """
  codes = [tuple(divmod(int(each.rpartition("_")[2]), 10)) for each in built]
  text = f"{name} has compute capability {capability[0]}.{capability[1]}"
  if any(major == capability[0] and minor <= capability[1] for major, minor in codes):
    return checks.ok_finding(
      "gpu code", f"{text}, for which TensorFlow {version} holds machine code"
    )
  held = ", ".join(f"{major}.{minor}" for major, minor in codes) or "no GPU"
  text += f", and TensorFlow {version} holds machine code for {held}"
  if codes and capability < min(codes):
    text += ", so the GPU does not run"
    return Finding("gpu code", checks.WARNING, text, "use TensorFlow 2.15")
  text += (
    ": the driver compiles each kernel at its first use, about a minute at the first "
    "step, or the GPU does not run at all"
  )
  lane = "" if version.startswith("2.21") else "use TensorFlow 2.21, or "
  fix = f"{lane}keep what is compiled with CUDA_CACHE_PATH (docs/launch.md)"
  return Finding("gpu code", checks.WARNING, text, fix)


_SIZES_MB = (1, 16, 100)
_ROUNDS = 5
_STEPS = 2


def check_collectives(
  strategy: tf.distribute.Strategy, settings: TrainConfig
) -> Iterator[Finding]:
  """Yields what gradients travel by, and how fast."""
  if settings.strategy != "multiworker":
    yield checks.ok_finding(
      "collectives", f"--strategy={settings.strategy}: within this process"
    )
    return
  chosen = strategies.choose_collectives(settings.communication)
  whys = {"NCCL": "there are GPUs", "RING": "there is no GPU here"}
  is_automatic = settings.communication == "auto"
  why = whys[chosen] if is_automatic else "--communication says so"
  yield checks.ok_finding("collectives", f"{chosen}, since {why}")
  for size in _SIZES_MB:
    seconds = _time_all_reduce(strategy, size)
    replicas = strategy.num_replicas_in_sync
    # A ring sends 2 (n - 1) / n of the size over each link (arXiv:1802.05799).
    rate = size / 1000 * 2 * (replicas - 1) / replicas / seconds
    text = f"{size} MB in {1000 * seconds:.1f} ms, {rate:.2f} GB/s a link"
    yield checks.ok_finding("all-reduce", text)


def check_training(
  strategy: tf.distribute.Strategy,
  settings: TrainConfig,
  *,
  content: Manifest,
  is_chief: bool,
) -> Iterator[Finding]:
  """Yields whether a step of the full phase fits the memory, by training two.

  A new network with random weights is trained on random pixels; nothing is saved. Then
  the newest checkpoint, where there is one, is restored into it.

  Args:
    strategy: Of all workers, each of which must call this.
    settings: The run's.
    content: The data's manifest.
    is_chief: Whether this worker chooses the checkpoint.
  """
  sizes = (content.image_size, content.num_identities)
  try:
    text, built = _try_batch(strategy, settings, sizes)
  except errors.FacedistError as error:
    yield checks.finding_of_error("batch", error)
    return
  yield checks.ok_finding("batch", text)
  checkpoint_manager = manager.CheckpointManager(
    built.checkpoint(),
    strategy,
    # in a bucket too: nothing is saved
    uploader=DiskUploader(str(settings.workdir), is_chief=is_chief, keep_last=1),
    facts=manager.data_facts(content),
    rows=built.rows,
    piece_rows=settings.head_shard_rows,
  )
  yield checks.attempt("restore", lambda: _restore(checkpoint_manager))


def _restore(checkpoint_manager: manager.CheckpointManager) -> str:
  """Says what was restored; DataError if there are checkpoints and none can be."""
  found = checkpoint_manager.restore()
  if found is None:
    return "there is no checkpoint yet"
  return f"{found.name} fits this network"


def _try_batch(
  strategy: tf.distribute.Strategy, settings: TrainConfig, sizes: tuple[int, int]
) -> tuple[str, TrainState]:
  """Says what fits, or raises UsageError; `sizes` are of images and identities."""
  local = strategies.local_replicas(strategy)
  workers = strategy.num_replicas_in_sync // local
  share = BatchShard(settings.global_batch, 0, workers, local).batch
  at_once = train_step.micro_batch(settings, strategy.num_replicas_in_sync)
  text = f"{share} images of {sizes[0]} px a replica"
  if at_once < share:
    text += f", {at_once} at a time,"
  try:
    built = _train(strategy, settings, _batches(share, *sizes), sizes)
  except tf.errors.ResourceExhaustedError as error:
    reason = errors.first_line(error)
    raise errors.UsageError(
      f"{text} do not fit its memory ({reason:.120}); raise --accumulate_steps, lower "
      "--global_batch, use more replicas, or --policy=mixed_bfloat16."
    ) from error
  return f"{text}{_peak_memory()}", built


def _train(
  strategy: tf.distribute.Strategy,
  settings: TrainConfig,
  batches: tf.data.Dataset,
  sizes: tuple[int, int],
) -> TrainState:
  """Trains a few steps of the last phase; `sizes` are of images and identities."""
  fresh = dataclasses.replace(settings, backbone_weights="none")
  built = train_state.build_train_state(
    strategy, fresh, image_size=sizes[0], num_identities=sizes[1]
  )
  loop = train_step.train_loop(
    built,
    schedules.plan_phases(settings, settings.global_batch)[-1],
    train_step.settings_of(fresh),
    strategy,
    step_health.StepHealth(),
  )
  iterator = iter(strategy.distribute_datasets_from_function(lambda _: batches))
  loop(iterator, tf.constant(_STEPS))
  return built


def _time_all_reduce(strategy: tf.distribute.Strategy, megabytes: int) -> float:
  """Returns the median seconds of summing a float32 vector over all replicas."""

  def replica_sum() -> tf.Tensor:
    vector = tf.ones(megabytes * 250_000)
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, vector)[0]

  reduce = tf.function(lambda: strategy.run(replica_sum), autograph=False)
  times = []
  for turn in range(_ROUNDS + 1):
    started = time.perf_counter()
    strategy.experimental_local_results(reduce())[0].numpy()
    if turn:  # the first one compiles
      times.append(time.perf_counter() - started)
  return statistics.median(times)


def _batches(share: int, image_size: int, num_identities: int) -> tf.data.Dataset:
  """Returns endless batches of one replica, of random pixels."""
  image = tf.random.stateless_uniform(
    [share, image_size, image_size, 3], (0, 0), 0, 256, tf.int32
  )
  batch = {
    "image": tf.cast(image, tf.uint8),
    "label": tf.range(share, dtype=tf.int32) % num_identities,
    "draws": tf.fill([share, augment.NUM_DRAWS], 0.5),
    "damaged": tf.zeros([share]),
  }
  options = tf.data.Options()
  options.experimental_distribute.auto_shard_policy = (
    tf.data.experimental.AutoShardPolicy.OFF
  )
  return tf.data.Dataset.from_tensors(batch).repeat().with_options(options)


def _peak_memory() -> str:
  """Says how much of the first GPU was in use at most, where there is one."""
  if not tf.config.list_physical_devices("GPU"):
    return ", as far as a CPU can tell"
  peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
  return f", with {peak / 1e9:.1f} GB of a GPU at most"


def report_strategy(strategy: tf.distribute.Strategy) -> Finding:
  """Says that the strategy formed."""
  return checks.ok_finding(
    "strategy",
    f"{strategy.num_replicas_in_sync} replicas, "
    f"{strategies.local_replicas(strategy)} of them here",
  )
