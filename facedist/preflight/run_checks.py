"""Checks of what one worker sees: its flags, its data, its workdir."""

import functools
import shutil
import uuid
from collections.abc import Iterator
from concurrent import futures

from facedist import config, errors, storage
from facedist.data import damage, manifest
from facedist.models import backbones
from facedist.preflight import findings
from facedist.preflight.findings import Finding
from facedist.training import (
  checkpoints,
  metric_learning,
  phases,
  restoring,
  row_store,
  run_folder,
  sampling,
)
from facedist.training.config import TrainConfig, with_usual_values

_THREADS = 32  # that ask for shards: a bucket answers each in tens of milliseconds
_CHECKPOINT_BYTES = 500 << 20  # weights and momentum of ResNet50, and some room


def check_run(settings: TrainConfig, *, is_quick: bool) -> Iterator[Finding]:
  """Yields what flags, data and workdir are like.

  Args:
    settings: The run's.
    is_quick: Whether to leave out what reads all shards or a whole checkpoint.
  """
  yield findings.attempt("flags", lambda: _flags(settings))
  yield findings.attempt("data", lambda: _data(settings, is_quick=is_quick))
  yield findings.attempt("workdir", lambda: _workdir(settings))
  yield findings.attempt("checkpoint", lambda: _checkpoint(settings, is_quick=is_quick))


def _flags(settings: TrainConfig) -> str:
  """Says whether the flags make sense together, as far as no device is needed."""
  config.validate(settings)
  config.lookup(backbones.BACKBONES, settings.backbone, "backbone")
  with_usual_values(settings)
  phases.boundaries(settings)
  phases.plan(settings, max(settings.global_batch, 1))
  metric_learning.check(settings)
  sampling.check(settings)
  return "valid"


def _data(settings: TrainConfig, *, is_quick: bool) -> str:
  """Says what the data are; with time, whether every shard is as its manifest says."""
  folder = _required(settings, "data_dir")
  content = manifest.load(folder)
  train = content.split("train", folder)
  plan = phases.plan(settings, train.records)
  text = (
    f"{train.records:,} images of {content.num_identities:,} identities, "
    f"{content.image_size} px, fingerprint {content.fingerprint}; "
    f"{plan[-1].end_step:,} steps of {settings.global_batch}"
  )
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    check = functools.partial(_check_shard, folder, with_crc=not is_quick)
    list(pool.map(check, train.shards))  # raises what is wrong with the first bad one
  if is_quick:
    return f"{text}; all {len(train.shards)} shards have their size"
  return f"{text}; all {len(train.shards)} shards have their size and CRC"


def _check_shard(folder: str, shard: manifest.Shard, *, with_crc: bool) -> None:
  """Raises DataError unless a shard has its size and, if asked for, its CRC."""
  path = shard.path(folder)
  with damage.missing_is_named(path):
    damage.check_size(path, storage.size(path), shard.bytes)
  if not with_crc:
    return
  if damage.stored_crc32c(path) != shard.crc32c:
    raise errors.DataError(f"{path} is damaged (CRC-32C); copy it again.")


def _workdir(settings: TrainConfig) -> str:
  """Says whether the workdir can be written, by doing so, and has room."""
  workdir = _required(settings, "workdir")
  path = storage.join(workdir, f"doctor-{uuid.uuid4().hex}")
  try:
    storage.write_bytes(path, b"facedist.doctor was here\n")
    storage.remove(path)
  except OSError as error:
    raise errors.UsageError(
      f"--workdir={workdir} cannot be written ({error.strerror}); choose another."
    ) from error
  if storage.is_bucket(workdir):
    return f"{workdir} can be written"
  free = shutil.disk_usage(workdir).free
  wanted = (settings.keep_last + 1) * _CHECKPOINT_BYTES
  if free < wanted:
    raise errors.UsageError(
      f"--workdir={workdir} has {free / 1e9:.1f} GB left, and --keep_last="
      f"{settings.keep_last} checkpoints want up to {wanted / 1e9:.1f}; make room or "
      "choose another."
    )
  return f"{workdir} can be written; {free / 1e9:.0f} GB are free"


def _checkpoint(settings: TrainConfig, *, is_quick: bool) -> str:
  """Says where the run would go on from."""
  workdir = _required(settings, "workdir")
  if not run_folder.check_config(with_usual_values(settings), workdir):
    return "a new run: there is no config.json"
  found = checkpoints.list_checkpoints(workdir)
  if not found:
    return "a new run: there is no checkpoint"
  newest = found[-1]
  data = manifest.load(_required(settings, "data_dir"))
  run_folder.check_data(newest, data.fingerprint)
  if not is_quick:
    damage = restoring.find_damage(newest) or row_store.find_damage(newest)
    if damage:
      raise errors.DataError(damage)
  state = "is there" if is_quick else "is whole"
  return f"{newest.name} {state}; the run goes on from it"


def _required(settings: TrainConfig, flag: str) -> str:
  """Returns a flag's value; UsageError if it was not given."""
  value = getattr(settings, flag)
  if not value:
    raise errors.UsageError(f"--{flag} is not given; give it.")
  return str(value)
