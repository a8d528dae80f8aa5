"""Checkpoints on disk: whole or ignored, written by all workers, kept while in use.

A checkpoint is TensorFlow's `step-00000100.index` and `.data-*` files and a marker,
`step-00000100.json`, written last by the chief with every file's size and CRC-32C.
Without its marker a checkpoint does not exist. TensorFlow reads and writes on local
disks only; a bucket's files go through `storage`.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from facedist import config, errors, storage
from facedist.training import leases
from facedist.training.config import TrainConfig, with_usual_values

_PREFIX = "step-"
_TENSORFLOWS = (".data-", ".index")
_ENDINGS = (*_TENSORFLOWS, ".rows-")
_OWN_CRC = "marker_crc32c"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A complete checkpoint; `path` is TensorFlow's prefix, without an ending."""

  step: int
  path: str

  @property
  def name(self) -> str:
    """The last part of the path, such as step-00000100."""
    return os.path.basename(self.path)

  def marker(self) -> dict[str, Any]:
    """Reads the marker: step, files, and what `run_folder.facts` says of the data.

    Raises:
      errors.DataError: There is none, or it is damaged.
    """
    path = self.path + ".json"
    try:
      return _parse_marker(storage.read_bytes(path))
    except ValueError as error:
      raise errors.DataError(
        f"{path} is damaged: {error}; remove it to go on from the checkpoint before."
      ) from error


def folder(workdir: str) -> str:
  """Returns the folder of a run's checkpoints."""
  return storage.join(workdir, "checkpoints")


def at(workdir: str, step: int) -> Checkpoint:
  """Returns the checkpoint of that step, whether it is there or not."""
  return Checkpoint(step, storage.join(folder(workdir), f"{_PREFIX}{step:08d}"))


def list_checkpoints(workdir: str) -> list[Checkpoint]:
  """Returns the complete checkpoints in step order; lists the folder anew each time."""
  names = storage.list_names(folder(workdir))
  steps = [step_of(name[: -len(".json")]) for name in names if name.endswith(".json")]
  return [at(workdir, step) for step in sorted(one for one in steps if one is not None)]


def step_of(name: str) -> int | None:
  """Returns the step of a checkpoint's name, such as step-00000100; none of others."""
  digits = name.removeprefix(_PREFIX)
  if not (digits.isascii() and digits.isdecimal()):
    return None
  step = int(digits)
  return step if name == f"{_PREFIX}{step:08d}" else None


def save(
  state: tf.train.Checkpoint,
  workdir: str,
  *,
  step: int,
  is_chief: bool,
  facts: Mapping[str, Any],
) -> None:
  """Saves `state`; every worker must call it, since variables are read in sync.

  Args:
    state: What to save.
    workdir: A local folder.
    step: Number of finished steps, part of the name.
    is_chief: The chief's files count; the others write theirs to a throw-away folder.
    facts: Written to the marker beside step and TensorFlow's files.
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
    for name, file in files_of(path, _TENSORFLOWS).items()
  }
  _write_marker(path, {"step": step, **facts, "files": files})


def annotate(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
  """Adds facts to a checkpoint's marker, or changes them."""
  _write_marker(checkpoint.path, checkpoint.marker() | dict(facts))


def send(checkpoint: Checkpoint, workdir: str) -> None:
  """Copies a checkpoint to another workdir, so that it is seen there whole or not."""
  target = at(workdir, checkpoint.step)
  storage.remove(target.path + ".json")
  for name, file in files_of(checkpoint.path).items():
    storage.upload(file, storage.join(folder(workdir), name))
  storage.upload(checkpoint.path + ".json", target.path + ".json")


def remove(checkpoint: Checkpoint) -> None:
  """Deletes a checkpoint's files, the marker first, and what TensorFlow has begun."""
  storage.remove(checkpoint.path + ".json")
  if not storage.is_bucket(checkpoint.path):
    shutil.rmtree(checkpoint.path + "_temp", ignore_errors=True)
  for file in files_of(checkpoint.path).values():
    storage.remove(file)


def prune(workdir: str, *, keep_last: int, keep_every: int = 0) -> None:
  """Deletes all but the newest `keep_last` checkpoints, save those being held.

  Those at multiples of `keep_every` steps stay for good; 0 keeps none of them.

  A reader lists, holds, and lists again before it reads. So markers go first and the
  leases are read once more: what a reader took hold of in between gets its marker back.
  """
  old = [
    checkpoint
    for checkpoint in list_checkpoints(workdir)[:-keep_last]
    if not keep_every or checkpoint.step % keep_every
  ]
  if not old:
    return
  held = leases.held_steps(workdir)
  taken = {}
  for checkpoint in old:
    if checkpoint.step not in held:
      taken[checkpoint] = storage.read_bytes(checkpoint.path + ".json")
      storage.remove(checkpoint.path + ".json")
  held = leases.held_steps(workdir) if taken else set()
  for checkpoint, marker in taken.items():
    if checkpoint.step in held:
      storage.write_bytes(checkpoint.path + ".json", marker)
    else:
      for file in files_of(checkpoint.path).values():
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


def mark_done(workdir: str, *, step: int) -> None:
  """Says that training has finished all its steps."""
  storage.write_bytes(_done(workdir), json.dumps({"step": step}).encode())


def unmark_done(workdir: str) -> None:
  """Takes `mark_done` back, when a run goes on."""
  storage.remove(_done(workdir))


def is_done(workdir: str) -> bool:
  """Says whether training has finished all its steps."""
  return storage.exists(_done(workdir))


def load_config(workdir: str) -> TrainConfig:
  """Reads the run's config.json; what it lacks of head and optimizer is usual.

  Raises:
    errors.DataError: There is none.
    errors.ConfigError: It is not a configuration of this version.
  """
  path = storage.join(workdir, "config.json")
  found = config.from_json(TrainConfig, storage.read_bytes(path).decode(), path)
  return with_usual_values(found)


def _write_marker(path: str, content: Mapping[str, Any]) -> None:
  """Writes a marker with its own checksum, at once."""
  plain = json.loads(json.dumps(content))  # its keys are what a reader finds
  plain[_OWN_CRC] = _crc32c_of(plain)
  storage.write_bytes(path + ".json", (json.dumps(plain, indent=1) + "\n").encode())


def _parse_marker(content: bytes) -> dict[str, Any]:
  """Returns what a marker says; ValueError, with why, unless it is whole."""
  try:
    found = json.loads(content)
  except ValueError as error:
    kind = storage.kind_of(content)
    raise ValueError(f"it is {kind or 'not JSON'}") from error
  if not isinstance(found, dict):
    raise ValueError("it is no JSON object")
  if found.pop(_OWN_CRC, None) not in (None, _crc32c_of(found)):  # none: older versions
    raise ValueError("its CRC-32C is not the one it names")
  files = found.get("files")
  if not isinstance(files, dict) or not files:
    raise ValueError("it names no files")
  if not all(isinstance(one, dict) and "crc32c" in one for one in files.values()):
    raise ValueError("it names files without a CRC-32C")
  return found


def _crc32c_of(marker: Mapping[str, Any]) -> int:
  """Returns the checksum of what a marker says, however it is laid out."""
  return storage.crc32c_of(json.dumps(marker, sort_keys=True).encode())


def _done(workdir: str) -> str:
  return storage.join(workdir, "done.json")


def files_of(path: str, endings: tuple[str, ...] = _ENDINGS) -> dict[str, str]:
  """Returns the paths of a checkpoint's files but for the marker, by name.

  In the order in which they may be copied: the data first, then the index, then rows.
  """
  parent, stem = os.path.split(path)
  return {
    name: storage.join(parent, name)
    for name in storage.list_names(parent)
    if name.startswith(tuple(stem + ending for ending in endings))
  }
