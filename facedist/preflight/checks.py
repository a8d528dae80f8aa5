"""Checks of what one worker sees: its flags, its data, its workdir and its disk.

A check yields findings: one line each, with what to do about it. The doctor prints
them; a run logs them at its start and ends at the first that is bad.
"""

import dataclasses
import functools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import tensorflow as tf

from facedist import config, errors, storage
from facedist.data.shards import integrity, manifest
from facedist.distributed import strategies
from facedist.distributed.cluster import Cluster
from facedist.models.backbones import registry
from facedist.training import inputs, metric_losses, schedules, train_state
from facedist.training.checkpoint import checkpoints, manager, sharded
from facedist.training.checkpoint.checkpoints import Checkpoint
from facedist.training.config import NO_HEAD, SLOTS, TrainConfig

GOOD, WARNING, BAD = "ok", "warning", "bad"


@dataclasses.dataclass(frozen=True)
class Finding:
  """The outcome of one check.

  Attributes:
    check: Its name, such as clocks.
    state: GOOD, WARNING or BAD.
    text: What was found, in a line.
    fix: What to do; empty where all is well.
    exit_code: What a BAD one ends the command with.
  """

  check: str
  state: str
  text: str
  fix: str = ""
  exit_code: errors.ExitCode = errors.ExitCode.USAGE

  def __str__(self) -> str:
    fix = f" -> {self.fix}" if self.fix else ""
    return f"{self.state:7s} {self.check}: {self.text}{fix}"


def ok_finding(check: str, text: str) -> Finding:
  """Returns the finding of a check that found nothing wrong."""
  return Finding(check, GOOD, text)


def attempt(check: str, run: Callable[[], str | Finding]) -> Finding:
  """Runs a check that returns what it found, or raises what is wrong."""
  try:
    found = run()
    return found if isinstance(found, Finding) else ok_finding(check, found)
  except errors.FacedistError as error:
    return finding_of_error(check, error)


def caught(check: str, found: Iterable[Finding]) -> Iterator[Finding]:
  """Yields findings; an error raised on the way becomes the last one."""
  try:
    yield from found
  except errors.FacedistError as error:
    yield finding_of_error(check, error)


def finding_of_error(check: str, error: errors.FacedistError) -> Finding:
  """Returns a BAD finding.

  The errors of this project say what to do after the last semicolon of their line.
  """
  text, _, fix = str(error).rpartition("; ")
  text, fix = (text, fix) if text else (fix, "")
  return Finding(check, BAD, text, fix, errors.ExitCode(error.exit_code))


def exit_code(found: Iterable[Finding]) -> errors.ExitCode:
  """Returns DONE, or the exit code of the first BAD finding."""
  bad = first_bad(found)
  return errors.ExitCode.DONE if bad is None else bad.exit_code


def first_bad(found: Iterable[Finding]) -> Finding | None:
  """Returns the first BAD finding; None if there is none."""
  return next((finding for finding in found if finding.state == BAD), None)


def error_of(finding: Finding) -> errors.FacedistError:
  """Returns a finding as an error with its exit code."""
  fix = f"; {finding.fix}" if finding.fix else ""
  error = errors.FacedistError(f"{finding.text}{fix}")
  error.exit_code = finding.exit_code
  return error


def to_json(found: Iterable[Finding]) -> str:
  """Returns a JSON object: `ready`, `exit_code` and the `findings`.

  Each finding has check, state, text, mend (the fix) and exit_code: 0 unless BAD.
  """
  found = tuple(found)
  rows = [
    {
      "check": finding.check,
      "state": finding.state,
      "text": finding.text,
      "mend": finding.fix,
      "exit_code": int(exit_code([finding])),
    }
    for finding in found
  ]
  code = int(exit_code(found))
  ready = code == errors.ExitCode.DONE
  return json.dumps({"ready": ready, "exit_code": code, "findings": rows}, indent=1)


_FLOAT_BYTES = 4
_THREADS = 32  # that ask for shards: a bucket answers each in tens of milliseconds


def check_run(
  settings: TrainConfig, cluster: Cluster | None = None, *, is_quick: bool
) -> Iterator[Finding]:
  """Checks flags, data, workdir, disk space and the newest checkpoint.

  Args:
    settings: The run's, as `resolve` returns it.
    cluster: The cluster that the strategy must fit; None if it is not known.
    is_quick: Skip what reads all shards or a whole checkpoint.
  """
  yield check_flags(settings, cluster)
  yield attempt("data", lambda: _data(settings, is_quick=is_quick))
  yield check_workdir(settings)
  yield from check_room(settings, is_quick=is_quick)
  yield attempt("checkpoint", lambda: _checkpoint(settings, is_quick=is_quick))


def check_workdir(settings: TrainConfig) -> Finding:
  """Checks that the workdir can be written."""
  return attempt("workdir", lambda: _workdir(settings))


def check_flags(settings: TrainConfig, cluster: Cluster | None = None) -> Finding:
  """Checks that a run can start with these flags."""
  return attempt("flags", lambda: _flags(settings, cluster))


def _flags(settings: TrainConfig, cluster: Cluster | None) -> str | Finding:
  """Checks the flags against each other, the cluster and this machine."""
  config.validate(settings)
  config.lookup(registry.BACKBONES, settings.backbone, "backbone")
  schedules.boundaries(settings)
  schedules.plan_phases(settings, max(settings.global_batch, 1))
  metric_losses.check_metric_loss(settings)
  inputs.check_sampling(settings)
  train_state.check_starting_weights(settings)
  if cluster is not None:
    strategies.check_strategy(
      settings.strategy, cluster, communication=settings.communication
    )
  has_gpus = bool(tf.config.list_physical_devices("GPU"))
  if settings.policy == "mixed_float16" and not has_gpus:
    text = "--policy=mixed_float16 is very slow on a CPU, and no GPU is visible"
    fix = "give --policy=float32, or mixed_bfloat16 where the CPU supports it"
    return Finding("flags", WARNING, text, fix)
  return "valid"


def _data(settings: TrainConfig, *, is_quick: bool) -> str | Finding:
  """Describes the data; unless quick, checks the CRC of every shard."""
  folder = _required(settings, "data_dir")
  content = manifest.load(folder)
  train = content.split("train", folder)
  plan = schedules.plan_phases(settings, train.records)
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
    return Finding("data", WARNING, f"{'; '.join(unusual)} ({text})")
  return text


def _check_shard(folder: str, shard: manifest.Shard, *, with_crc: bool) -> None:
  """Raises DataError unless a shard has its size and, if asked for, its CRC."""
  path = shard.path(folder)
  with integrity.missing_is_named(path):
    integrity.check_size(path, storage.size(path), shard.bytes)
  if not with_crc:
    return
  if integrity.stored_crc32c(path) != shard.crc32c:
    raise errors.DataError(f"{path} is corrupt (CRC-32C); copy it again.")


def _workdir(settings: TrainConfig) -> str:
  """Writes a file to the workdir and removes it."""
  workdir = _required(settings, "workdir")
  storage.check_folder(workdir, flag="workdir")
  path = storage.join(workdir, f"doctor-{uuid.uuid4().hex}")
  storage.write_bytes(path, b"facedist.doctor was here\n")
  storage.remove(path)
  return f"{workdir} can be written"


def _checkpoint(settings: TrainConfig, *, is_quick: bool) -> str | Finding:
  """Names the checkpoint that the run would continue from, and the corrupt ones."""
  workdir = _required(settings, "workdir")
  if not manager.check_config(settings, workdir):
    return "a new run: there is no config.json"
  found = checkpoints.list_checkpoints(workdir)
  if not found:
    return "a new run: there is no checkpoint"
  data = manifest.load(_required(settings, "data_dir"))
  corrupt: list[str] = []
  for checkpoint in reversed(found):
    if problem := _corruption(checkpoint, is_quick=is_quick):
      corrupt.append(problem)
      continue
    manager.check_data(checkpoint.path, checkpoint.marker(), data.fingerprint)
    state = "is there" if is_quick else "is whole"
    text = f"{checkpoint.name} {state}; the run continues from it"
    if not corrupt:
      return text
    named = "; ".join(one.partition("; ")[0] for one in corrupt)
    return Finding("checkpoint", WARNING, f"{named}; {text}")
  raise errors.DataError(corrupt[0])


def _corruption(checkpoint: checkpoints.Checkpoint, *, is_quick: bool) -> str | None:
  """Returns what is wrong with a checkpoint; if quick, with its marker alone."""
  try:
    if is_quick:
      checkpoint.marker()
    else:
      sharded.verify(checkpoint)
  except errors.DataError as error:
    return str(error)
  return None


def check_room(settings: TrainConfig, *, is_quick: bool) -> Iterator[Finding]:
  """Checks that the disk has room for checkpoints; yields nothing if that is unknown.

  A save without room fails and training continues. So lack of room is only a warning
  for a run that has checkpoints already, and at the start of any run.

  Args:
    settings: The run's.
    is_quick: This is the start of a run.
  """
  workdir = settings.workdir
  if not workdir or storage.is_bucket(workdir):
    return
  try:
    free = shutil.disk_usage(workdir).free
    found = checkpoints.list_checkpoints(workdir)
    size = saved_bytes(found[-1]) if found else expected_bytes(settings)
  except (OSError, errors.FacedistError):  # another check reports it
    return
  count = max(1, settings.keep_last + 1 - len(found))
  text = (
    f"{workdir} has {_shown(free)} left, and {count} more checkpoints of "
    f"{_shown(size)} want {_shown(count * size)}"
  )
  if free >= count * size:
    yield ok_finding("room", text)
    return
  state = WARNING if found or is_quick else BAD
  fix = "make room, lower --keep_last, or choose another --workdir"
  yield Finding("room", state, text, fix)


def saved_bytes(checkpoint: Checkpoint) -> int:
  """Returns the size of a checkpoint's files, with a sharded head's rows."""
  marker = checkpoint.marker()
  files = [*marker["files"].values(), *marker.get("rows", {}).get("files", {}).values()]
  return sum(int(file.get("bytes", 0)) for file in files)


def expected_bytes(settings: TrainConfig) -> int:
  """Estimates the size of a new run's checkpoint: weights, slots and averages.

  It is the same for a sharded head, whose rows lie beside TensorFlow's files.

  Raises:
    errors.FacedistError: The flags are wrong, or there is no manifest.
  """
  backbone = config.lookup(registry.BACKBONES, settings.backbone, "backbone")
  copies = 1 + SLOTS[settings.optimizer]
  network = round(1e6 * backbone.millions)
  floats = network * (copies + bool(settings.ema_decay))
  if settings.head != NO_HEAD:
    identities = manifest.load(str(settings.data_dir)).num_identities
    row = settings.embedding_size * (settings.sub_centres or 1)
    floats += identities * row * copies
  return _FLOAT_BYTES * floats


def _shown(size: int) -> str:
  """Returns bytes as text."""
  return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _required(settings: TrainConfig, flag: str) -> str:
  """Returns a flag's value; UsageError if it was not given."""
  value = getattr(settings, flag)
  if not value:
    raise errors.UsageError(f"--{flag} is not given; give it.")
  return str(value)
