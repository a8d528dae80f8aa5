"""Checks that need the devices: collectives, and whether a batch fits."""

import dataclasses
import statistics
import time
from collections.abc import Iterator

import tensorflow as tf

from facedist import errors, strategies
from facedist.data import augment
from facedist.data.manifest import Manifest
from facedist.data.share import Share
from facedist.preflight import findings
from facedist.preflight.findings import Finding
from facedist.training import (
  phases,
  run_folder,
  saving,
  state,
  step_settings,
  steps,
  vitals,
)
from facedist.training.config import TrainConfig
from facedist.training.outbox import DiskOutbox
from facedist.training.state import TrainState

_SIZES_MB = (1, 16, 100)
_ROUNDS = 5
_STEPS = 2


def check_collectives(
  strategy: tf.distribute.Strategy, settings: TrainConfig
) -> Iterator[Finding]:
  """Yields what gradients travel by, and how fast."""
  if settings.strategy != "multiworker":
    yield findings.good(
      "collectives", f"--strategy={settings.strategy}: within this process"
    )
    return
  chosen = strategies.collectives(settings.communication)
  whys = {"NCCL": "there are GPUs", "RING": "there is no GPU here"}
  is_automatic = settings.communication == "auto"
  why = whys[chosen] if is_automatic else "--communication says so"
  yield findings.good("collectives", f"{chosen}, since {why}")
  for size in _SIZES_MB:
    seconds = _time_all_reduce(strategy, size)
    replicas = strategy.num_replicas_in_sync
    # A ring sends 2 (n - 1) / n of the size over each link (arXiv:1802.05799).
    rate = size / 1000 * 2 * (replicas - 1) / replicas / seconds
    text = f"{size} MB in {1000 * seconds:.1f} ms, {rate:.2f} GB/s a link"
    yield findings.good("all-reduce", text)


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
    yield findings.of_error("batch", error)
    return
  yield findings.good("batch", text)
  saver = saving.Saver(
    built.checkpoint(),
    strategy,
    # in a bucket too: nothing is saved
    outbox=DiskOutbox(str(settings.workdir), is_chief=is_chief, keep_last=1),
    facts=run_folder.facts(content),
    rows=built.rows,
    piece_rows=settings.head_shard_rows,
  )
  yield findings.attempt("restore", lambda: _restore(saver))


def _restore(saver: saving.Saver) -> str:
  """Says what was restored; DataError if there are checkpoints and none can be."""
  found = saver.restore()
  if found is None:
    return "there is no checkpoint yet"
  return f"{found.name} fits this network"


def _try_batch(
  strategy: tf.distribute.Strategy, settings: TrainConfig, sizes: tuple[int, int]
) -> tuple[str, TrainState]:
  """Says what fits, or raises UsageError; `sizes` are of images and identities."""
  local = strategies.local_replicas(strategy)
  workers = strategy.num_replicas_in_sync // local
  share = Share(settings.global_batch, 0, workers, local).batch
  at_once = step_settings.micro_batch(settings, strategy.num_replicas_in_sync)
  text = f"{share} images of {sizes[0]} px a replica"
  if at_once < share:
    text += f", {at_once} at a time,"
  try:
    built = _train(strategy, settings, _batches(share, *sizes), sizes)
  except tf.errors.ResourceExhaustedError as error:
    reason = str(error.message).partition("\n")[0]
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
  built = state.build_in(strategy, fresh, image_size=sizes[0], num_identities=sizes[1])
  loop = steps.train_loop(
    built,
    phases.plan(settings, settings.global_batch)[-1],
    step_settings.settings_of(fresh),
    strategy,
    vitals.Vitals(),
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
    "record": tf.range(share, dtype=tf.int64),
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
  return findings.good(
    "strategy",
    f"{strategy.num_replicas_in_sync} replicas, "
    f"{strategies.local_replicas(strategy)} of them here",
  )
