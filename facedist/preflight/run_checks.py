"""Checks of what one worker sees: its flags, its data, its workdir."""

import functools
import uuid
from collections.abc import Iterator
from concurrent import futures

from facedist import config, errors, storage, strategies
from facedist.cluster import Cluster
from facedist.data import damage, manifest
from facedist.models import backbones
from facedist.preflight import findings, room
from facedist.preflight.findings import Finding
from facedist.training import (
  checkpoints,
  inputs,
  metric_learning,
  phases,
  restoring,
  row_store,
  run_folder,
  sampling,
  starting_weights,
)
from facedist.training.config import TrainConfig, with_usual_values

_THREADS = 32  # that ask for shards: a bucket answers each in tens of milliseconds


def check_run(
  settings: TrainConfig, crew: Cluster | None = None, *, is_quick: bool
) -> Iterator[Finding]:
  """Yields what flags, data and workdir are like.

  Args:
    settings: The run's.
    crew: The cluster that the strategy must fit; none if it is not known.
    is_quick: Whether to leave out what reads all shards or a whole checkpoint.
  """
  yield check_flags(settings, crew)
  yield findings.attempt("data", lambda: _data(settings, is_quick=is_quick))
  yield findings.attempt("workdir", lambda: _workdir(settings))
  yield from room.check_room(settings, is_quick=is_quick)
  yield findings.attempt("checkpoint", lambda: _checkpoint(settings, is_quick=is_quick))


def check_flags(settings: TrainConfig, crew: Cluster | None = None) -> Finding:
  """Says whether the flags are such that a run with them can start."""
  return findings.attempt("flags", lambda: _flags(settings, crew))


def _flags(settings: TrainConfig, crew: Cluster | None) -> str:
  """Says whether the flags make sense together, and for this cluster and machine."""
  config.validate(settings)
  config.lookup(backbones.BACKBONES, settings.backbone, "backbone")
  with_usual_values(settings)
  phases.boundaries(settings)
  phases.plan(settings, max(settings.global_batch, 1))
  metric_learning.check(settings)
  sampling.check(settings)
  starting_weights.check(settings)
  if crew is not None:
    strategies.check(settings.strategy, crew, communication=settings.communication)
  return "valid"


def _data(settings: TrainConfig, *, is_quick: bool) -> str | Finding:
  """Says what the data are; with time, whether every shard is as its manifest says."""
  folder = _required(settings, "data_dir")
  content = manifest.load(folder)
  train = content.split("train", folder)
  plan = phases.plan(settings, train.records)
  unusual = inputs.check_train_set(settings, content)
  text = (
    f"{train.records:,} images of {content.num_identities:,} identities, "
    f"{content.image_size} px, fingerprint {content.fingerprint}; "
    f"{plan[-1].end_step:,} steps of {settings.global_batch}"
  )
  shards = content.shards  # of validation, too
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    check = functools.partial(_check_shard, folder, with_crc=not is_quick)
    list(pool.map(check, shards))  # raises what is wrong with the first bad one
  text += f"; all {len(shards)} shards have their size"
  if not is_quick:
    text += " and CRC"
  if unusual:
    return Finding("data", findings.WARNING, f"{'; '.join(unusual)} ({text})")
  return text


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
  """Says whether the workdir can be written, by doing so."""
  workdir = _required(settings, "workdir")
  storage.check_folder(workdir, flag="workdir")
  path = storage.join(workdir, f"doctor-{uuid.uuid4().hex}")
  storage.write_bytes(path, b"facedist.doctor was here\n")
  storage.remove(path)
  return f"{workdir} can be written"


def _checkpoint(settings: TrainConfig, *, is_quick: bool) -> str | Finding:
  """Says where the run would go on from; names those that are damaged."""
  workdir = _required(settings, "workdir")
  if not run_folder.check_config(with_usual_values(settings), workdir):
    return "a new run: there is no config.json"
  found = checkpoints.list_checkpoints(workdir)
  if not found:
    return "a new run: there is no checkpoint"
  data = manifest.load(_required(settings, "data_dir"))
  damages: list[str] = []
  for checkpoint in reversed(found):
    if damage := _damage(checkpoint, is_quick=is_quick):
      damages.append(damage)
      continue
    run_folder.check_data(checkpoint, data.fingerprint)
    state = "is there" if is_quick else "is whole"
    text = f"{checkpoint.name} {state}; the run goes on from it"
    if not damages:
      return text
    named = "; ".join(one.partition("; ")[0] for one in damages)
    return Finding("checkpoint", findings.WARNING, f"{named}; {text}")
  raise errors.DataError(damages[0])


def _damage(checkpoint: checkpoints.Checkpoint, *, is_quick: bool) -> str | None:
  """Returns what is wrong with a checkpoint; if quick, with its marker."""
  try:
    checkpoint.marker()
  except errors.DataError as error:
    return str(error)
  if is_quick:
    return None
  return restoring.find_damage(checkpoint) or row_store.find_damage(checkpoint)


def _required(settings: TrainConfig, flag: str) -> str:
  """Returns a flag's value; UsageError if it was not given."""
  value = getattr(settings, flag)
  if not value:
    raise errors.UsageError(f"--{flag} is not given; give it.")
  return str(value)
