"""The checkpoints of a run: how one is saved, found, verified, restored and deleted.

A checkpoint is TensorFlow's files, `step-00000100.index` and `.data-*`, and a marker,
`step-00000100.json`, with the size and CRC-32C of every file. The chief writes the
marker last: a checkpoint without its marker does not exist. A class-sharded head adds
files of rows, see `sharded`. TensorFlow reads and writes local files only; files in a
bucket are copied by `storage`.

A process that reads checkpoints holds a lease on them, and training deletes no
checkpoint under a lease, nor the one that `best.json` names (facedist.evaluate
--keep_best).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from facedist import config, errors, storage
from facedist.training.config import TrainConfig, resolve

LEASE_SECONDS = 600.0
LEASES_FOLDER = "checkpoints/holds"

_PREFIX = "step-"
_TENSORFLOW_SUFFIXES = (".data-", ".index")
_SUFFIXES = (*_TENSORFLOW_SUFFIXES, ".rows-")
_OWN_CRC = "marker_crc32c"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint; `path` is TensorFlow's prefix, without a suffix."""

  step: int
  path: str

  @property
  def name(self) -> str:
    """The last part of the path, such as step-00000100."""
    return os.path.basename(self.path)

  def marker(self) -> dict[str, Any]:
    """Reads the marker: step, files, and the facts that `save` was given.

    Raises:
      errors.DataError: There is no marker, or it is corrupt.
    """
    path = self.path + ".json"
    try:
      return _parse_marker(storage.read_bytes(path))
    except ValueError as error:
      raise errors.DataError(
        f"{path} is corrupt: {error}; remove it to continue from the checkpoint before."
      ) from error


def folder(workdir: str) -> str:
  """Returns the folder of a run's checkpoints."""
  return storage.join(workdir, "checkpoints")


def at(workdir: str, step: int) -> Checkpoint:
  """Returns the checkpoint of that step, whether it exists or not."""
  return Checkpoint(step, storage.join(folder(workdir), f"{_PREFIX}{step:08d}"))


def step_of(name: str) -> int | None:
  """Returns the step of a checkpoint's name, such as step-00000100; None for others."""
  digits = name.removeprefix(_PREFIX)
  if not (digits.isascii() and digits.isdecimal()):
    return None
  step = int(digits)
  return step if name == f"{_PREFIX}{step:08d}" else None


def list_checkpoints(workdir: str) -> list[Checkpoint]:
  """Returns the complete checkpoints by increasing step; lists the folder each time."""
  names = storage.list_names(folder(workdir))
  steps = [step_of(name[: -len(".json")]) for name in names if name.endswith(".json")]
  return [at(workdir, step) for step in sorted(one for one in steps if one is not None)]


def save(
  state: tf.train.Checkpoint,
  workdir: str,
  *,
  step: int,
  is_chief: bool,
  facts: Mapping[str, Any],
) -> None:
  """Saves `state`; every worker must call it, since reading variables is collective.

  Args:
    state: What to save.
    workdir: A local folder.
    step: Number of finished steps, part of the name.
    is_chief: Only the chief's files are kept; another worker writes its files to a
      temporary folder.
    facts: Written to the marker beside the step and the files.
  """
  if not is_chief:
    with tempfile.TemporaryDirectory(prefix="facedist-save-") as scratch:
      state.write(os.path.join(scratch, "unused"))
    return
  path = at(workdir, step).path
  os.makedirs(folder(workdir), exist_ok=True)
  storage.remove(path + ".json")
  state.write(path)
  files = {
    name: {"bytes": os.path.getsize(file), "crc32c": storage.crc32c(file)}
    for name, file in _files_of(path, _TENSORFLOW_SUFFIXES).items()
  }
  write_marker(path, {"step": step, **facts, "files": files})


def write_marker(path: str, content: Mapping[str, Any]) -> None:
  """Writes or replaces a checkpoint's marker, with its own checksum, atomically.

  Args:
    path: The checkpoint's, without a suffix.
    content: All that the marker says.
  """
  plain = json.loads(json.dumps(content))  # its keys are what a reader finds
  plain[_OWN_CRC] = _crc32c_of(plain)
  storage.write_bytes(path + ".json", (json.dumps(plain, indent=1) + "\n").encode())


def _parse_marker(content: bytes) -> dict[str, Any]:
  """Returns what a marker says; raises ValueError with the reason if it is corrupt."""
  try:
    found = json.loads(content)
  except ValueError as error:
    kind = storage.kind_of(content)
    raise ValueError(f"it is {kind or 'not JSON'}") from error
  if not isinstance(found, dict):
    raise ValueError("it is no JSON object")
  # older versions wrote no checksum
  if found.pop(_OWN_CRC, None) not in (None, _crc32c_of(found)):
    raise ValueError("its CRC-32C is not the one it names")
  files = found.get("files")
  if not isinstance(files, dict) or not files:
    raise ValueError("it names no files")
  if not all(isinstance(one, dict) and "crc32c" in one for one in files.values()):
    raise ValueError("it names files without a CRC-32C")
  return found


def _crc32c_of(marker: Mapping[str, Any]) -> int:
  """Returns the checksum of a marker's content, whatever its layout and key order."""
  return storage.crc32c_of(json.dumps(marker, sort_keys=True).encode())


def upload(checkpoint: Checkpoint, workdir: str) -> None:
  """Copies a checkpoint to another workdir, where it appears whole or not at all."""
  target = at(workdir, checkpoint.step)
  storage.remove(target.path + ".json")
  for name, file in _files_of(checkpoint.path).items():
    storage.upload(file, storage.join(folder(workdir), name))
  storage.upload(checkpoint.path + ".json", target.path + ".json")


@dataclasses.dataclass(frozen=True)
class StagedCheckpoint:
  """A checkpoint whose files were verified and lie on a local disk.

  Attributes:
    checkpoint: Where it comes from.
    marker: The content of its marker.
    prefix: TensorFlow's prefix of the local files.
  """

  checkpoint: Checkpoint
  marker: dict[str, Any]
  prefix: str

  def restore(self, state: tf.train.Checkpoint, *, is_whole: bool) -> None:
    """Restores `state` from the local files.

    Args:
      state: What to restore.
      is_whole: Whether `state` is all that was saved, or a part of it.

    Raises:
      errors.DataError: The files are of another network.
    """
    try:
      status = state.read(self.prefix)
      status.assert_existing_objects_matched()
      if is_whole:
        status.assert_consumed()
      else:
        status.expect_partial()
    except (AssertionError, ValueError, tf.errors.OpError) as error:
      raise errors.DataError(
        f"{self.checkpoint.path} does not fit this network "
        f"({errors.first_line(error)}); use the config it was trained with."
      ) from error


@contextlib.contextmanager
def stage(checkpoint: Checkpoint) -> Iterator[StagedCheckpoint]:
  """Yields a checkpoint whose files lie on a local disk until the body ends.

  Files in a bucket are downloaded once, to the folder for temporary files (TMPDIR);
  files on a disk stay where they are. Each is compared with its CRC-32C in the marker.
  The rows of a class-sharded head are left out.

  Raises:
    errors.DataError: The marker or a file is missing or corrupt.
  """
  marker = checkpoint.marker()
  parent = os.path.dirname(checkpoint.path)
  with contextlib.ExitStack() as stack:
    local = parent
    if storage.is_bucket(parent):
      scratch = tempfile.TemporaryDirectory(prefix="facedist-load-")
      local = stack.enter_context(scratch)
    for name, facts in marker["files"].items():
      source, file = storage.join(parent, name), os.path.join(local, name)
      if local != parent:
        storage.download(source, file)
      if storage.crc32c(file) != facts["crc32c"]:
        if kind := storage.kind_of_file(file):
          raise errors.DataError(f"{source} is {kind}.")
        raise errors.DataError(
          f"{source} is corrupt: its CRC-32C is not the one in {checkpoint.name}.json; "
          "remove that marker to continue from the checkpoint before."
        )
    local = stack.enter_context(storage.plain_name(local))
    yield StagedCheckpoint(checkpoint, marker, os.path.join(local, checkpoint.name))


def restore(
  state: tf.train.Checkpoint, checkpoint: Checkpoint, *, is_whole: bool
) -> None:
  """Verifies a checkpoint and restores `state` from it.

  Args:
    state: What to restore.
    checkpoint: A complete checkpoint.
    is_whole: Whether `state` is all that was saved, or a part of it.

  Raises:
    errors.DataError: The files are corrupt or of another network.
  """
  with stage(checkpoint) as staged:
    staged.restore(state, is_whole=is_whole)


def remove(checkpoint: Checkpoint) -> None:
  """Deletes a checkpoint's files, the marker first, and those of an unfinished save."""
  storage.remove(checkpoint.path + ".json")
  if not storage.is_bucket(checkpoint.path):
    shutil.rmtree(checkpoint.path + "_temp", ignore_errors=True)
  for file in _files_of(checkpoint.path).values():
    storage.remove(file)


def remove_unfinished(workdir: str) -> None:
  """Deletes what a killed save left behind: files without a marker."""
  complete = {checkpoint.name for checkpoint in list_checkpoints(workdir)}
  for name in storage.list_names(folder(workdir)):
    stem = name.split(".")[0].removesuffix("_temp")
    if step_of(stem) is not None and stem not in complete:
      path = storage.join(folder(workdir), name)
      delete = shutil.rmtree if os.path.isdir(path) else storage.remove
      delete(path)


def prune(workdir: str, *, keep_last: int, keep_every: int = 0) -> None:
  """Deletes all but the newest `keep_last` checkpoints, the best, and those in use.

  Those at multiples of `keep_every` steps are never deleted; with 0 there are none.
  The best is the one of `best.json`, and those in use are under a lease. If `best.json`
  is corrupt, nothing is deleted.

  A reader lists checkpoints, writes its lease, and lists them again before it reads. So
  `prune` removes the markers, reads the leases again, and restores the marker of each
  checkpoint that came under a lease meanwhile.
  """
  old = [
    checkpoint
    for checkpoint in list_checkpoints(workdir)[:-keep_last]
    if not keep_every or checkpoint.step % keep_every
  ]
  if not old:
    return
  try:
    held = _steps_to_keep(workdir)
  except errors.DataError as error:
    logging.error("no old checkpoint is deleted: %s", error)
    return
  markers = {}
  for checkpoint in old:
    if checkpoint.step not in held:
      markers[checkpoint] = storage.read_bytes(checkpoint.path + ".json")
      storage.remove(checkpoint.path + ".json")
  held = _steps_to_keep(workdir) if markers else set()
  for checkpoint, marker in markers.items():
    if checkpoint.step in held:
      storage.write_bytes(checkpoint.path + ".json", marker)
    else:
      for file in _files_of(checkpoint.path).values():
        storage.remove(file)


def _steps_to_keep(workdir: str) -> set[int]:
  """Returns the steps under a lease and the best one."""
  held = held_steps(workdir)  # first: an evaluator names the best, then ends its lease
  best = read_best(workdir)
  return held if best is None else held | {int(best["step"])}


def _files_of(path: str, suffixes: tuple[str, ...] = _SUFFIXES) -> dict[str, str]:
  """Returns the paths of a checkpoint's files by name, without the marker.

  They are in the order in which they are uploaded: data, index, rows.
  """
  parent, stem = os.path.split(path)
  return {
    name: storage.join(parent, name)
    for name in storage.list_names(parent)
    if name.startswith(tuple(stem + suffix for suffix in suffixes))
  }


def hold(workdir: str, holder: str, steps: Collection[int]) -> None:
  """Writes or renews a lease: the checkpoints are not deleted for LEASE_SECONDS.

  The lease contains the holder's time, because a bucket has no clock to ask. The clocks
  of the reader and of the trainer may differ by minutes, not by more.

  Args:
    workdir: The run's folder.
    holder: A name of the reader, unique among readers.
    steps: Steps of all checkpoints that the reader needs; an empty collection ends the
      lease.
  """
  path = storage.join(workdir, LEASES_FOLDER, f"{holder}.json")
  if not steps:
    storage.remove(path)
    return
  lease = {"steps": sorted(steps), "renewed": time.time()}
  storage.write_bytes(path, json.dumps(lease).encode())


def held_steps(workdir: str) -> set[int]:
  """Returns the steps of all leases that have not expired."""
  names = storage.list_names(storage.join(workdir, LEASES_FOLDER))
  holders = [name.removesuffix(".json") for name in names if name.endswith(".json")]
  leases = [_read_lease(workdir, holder) for holder in holders]
  now = time.time()
  return {
    step for renewed, steps in leases if now - renewed < LEASE_SECONDS for step in steps
  }


def leased_steps(workdir: str, holder: str) -> set[int]:
  """Returns the steps of one holder's lease, expired or not; none if it has none."""
  if not storage.exists(storage.join(workdir, LEASES_FOLDER, f"{holder}.json")):
    return set()
  return _read_lease(workdir, holder)[1]


def _read_lease(workdir: str, holder: str) -> tuple[float, set[int]]:
  """Returns when a lease was renewed, in seconds since 1970, and its steps."""
  path = storage.join(workdir, LEASES_FOLDER, f"{holder}.json")
  try:
    lease = json.loads(storage.read_bytes(path))
    return float(lease["renewed"]), set(map(int, lease["steps"]))
  except errors.DataError:
    pass  # the lease ended between listing and reading
  except (ValueError, TypeError, KeyError):
    logging.warning("%s is no lease and is ignored; remove it.", path)
  return 0.0, set()


def best_path(workdir: str) -> str:
  """Returns the path of best.json."""
  return storage.join(workdir, "best.json")


def read_best(workdir: str) -> dict[str, Any] | None:
  """Returns what best.json says of the best checkpoint, with its `step`.

  Returns:
    None if there is no such file, because no evaluator had --keep_best.

  Raises:
    errors.DataError: The file is corrupt.
  """
  path = best_path(workdir)
  if not storage.exists(path):
    return None
  try:
    best = json.loads(storage.read_bytes(path))
    return {**best, "step": int(best["step"])}
  except (ValueError, TypeError, KeyError) as error:
    raise errors.DataError(
      f"{path} is corrupt: {errors.first_line(error)}; remove it, and "
      "facedist.evaluate --keep_best writes it again."
    ) from error


def write_best(workdir: str, best: Mapping[str, Any]) -> None:
  """Writes best.json; the checkpoint of its `step` is no longer deleted."""
  content = (json.dumps(best, indent=1, allow_nan=False) + "\n").encode()
  storage.write_bytes(best_path(workdir), content)


def mark_done(workdir: str, *, step: int) -> None:
  """Records in `done.json` that training has finished all its steps."""
  storage.write_bytes(_done(workdir), json.dumps({"step": step}).encode())


def unmark_done(workdir: str) -> None:
  """Removes the record of `mark_done`, when a run continues."""
  storage.remove(_done(workdir))


def is_done(workdir: str) -> bool:
  """Says whether training has finished all its steps."""
  return storage.exists(_done(workdir))


def _done(workdir: str) -> str:
  return storage.join(workdir, "done.json")


def load_config(workdir: str) -> TrainConfig:
  """Reads the run's config.json; fields that it lacks get their defaults.

  Raises:
    errors.DataError: There is no config.json.
    errors.ConfigError: It is not a configuration of this version.
  """
  path = storage.join(workdir, "config.json")
  found = config.from_json(TrainConfig, storage.read_bytes(path).decode(), path)
  return resolve(found)
