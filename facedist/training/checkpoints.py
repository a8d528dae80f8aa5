"""Checkpoints on disk: whole or ignored, written by all workers, kept while in use.

A checkpoint is TensorFlow's `step-00000100.index` and `.data-*` files and a marker,
`step-00000100.json`, written last by the chief with every file's size and CRC-32C.
Without its marker a checkpoint does not exist.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from typing import Any

import tensorflow as tf

from facedist import config, errors, storage
from facedist.training.config import TrainConfig

LEASE_SECONDS = 600.0
_PREFIX = "step-"


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
    """Reads the marker: step, image_size, num_identities, data_fingerprint, files."""
    return dict(json.loads(storage.read_bytes(self.path + ".json")))


def folder(workdir: str) -> str:
  """Returns the folder of a run's checkpoints."""
  return storage.join(workdir, "checkpoints")


def list_checkpoints(workdir: str) -> list[Checkpoint]:
  """Returns the complete checkpoints in step order; reads the disk anew each time."""
  names = [
    name.removesuffix(".json")
    for name in storage.list_names(folder(workdir))
    if name.startswith(_PREFIX) and name.endswith(".json")
  ]
  found = [
    Checkpoint(int(name.removeprefix(_PREFIX)), storage.join(folder(workdir), name))
    for name in names
  ]
  return sorted(found, key=lambda checkpoint: checkpoint.step)


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
    workdir: The run's folder.
    step: Number of finished steps, part of the name.
    is_chief: The chief's files count; the others write theirs to a throw-away folder.
    facts: Written to the marker beside step and files.
  """
  name = f"{_PREFIX}{step:08d}"
  if not is_chief:
    with tempfile.TemporaryDirectory(prefix="facedist-save-") as scratch:
      state.write(os.path.join(scratch, name))
    return
  path = storage.join(folder(workdir), name)
  os.makedirs(folder(workdir), exist_ok=True)
  storage.remove(path + ".json")
  state.write(path)
  files = {
    name: {"bytes": os.path.getsize(file), "crc32c": storage.crc32c(file)}
    for name, file in _files(path).items()
  }
  content = {"step": step, **facts, "files": files}
  storage.write_bytes(path + ".json", (json.dumps(content, indent=1) + "\n").encode())


def restore(
  state: tf.train.Checkpoint, checkpoint: Checkpoint, *, is_whole: bool
) -> None:
  """Restores `state`; every worker must call it, with the chief's checkpoint.

  Args:
    state: What to restore.
    checkpoint: A complete checkpoint.
    is_whole: Whether `state` is all that was saved, or a part of it.

  Raises:
    errors.DataError: The files are damaged or of another network.
  """
  for name, facts in checkpoint.marker()["files"].items():
    file = storage.join(os.path.dirname(checkpoint.path), name)
    if storage.crc32c(file) != facts["crc32c"]:
      raise errors.DataError(
        f"{file} is damaged: its CRC-32C is not the one in {checkpoint.name}.json; "
        "remove that marker to go on from the checkpoint before."
      )
  try:
    status = state.read(checkpoint.path)
    status.assert_existing_objects_matched()
    if is_whole:
      status.assert_consumed()
    else:
      status.expect_partial()
  except (AssertionError, ValueError, tf.errors.OpError) as error:
    raise errors.DataError(
      f"{checkpoint.path} does not fit this network "
      f"({str(error).strip().splitlines()[0]}); use the config it was trained with."
    ) from error


def prune(workdir: str, *, keep_last: int) -> None:
  """Deletes all but the newest `keep_last` checkpoints, save those being held."""
  held = _held_steps(workdir)
  for checkpoint in list_checkpoints(workdir)[:-keep_last]:
    if checkpoint.step not in held:
      storage.remove(checkpoint.path + ".json")
      _remove_files(checkpoint.path)


def remove_unfinished(workdir: str) -> None:
  """Deletes what a killed save left behind: files without a marker."""
  complete = {checkpoint.name for checkpoint in list_checkpoints(workdir)}
  for name in storage.list_names(folder(workdir)):
    stem = name.split(".")[0]
    if stem.startswith(_PREFIX) and stem not in complete:
      path = storage.join(folder(workdir), name)
      if os.path.isdir(path):
        shutil.rmtree(path)
      else:
        storage.remove(path)


def hold(workdir: str, holder: str, steps: Collection[int]) -> None:
  """Keeps checkpoints from being deleted for LEASE_SECONDS; call again to renew.

  Args:
    workdir: The run's folder.
    holder: A name for who holds, unique among readers.
    steps: Steps of all checkpoints that `holder` needs; none ends its hold.
  """
  path = storage.join(folder(workdir), "holds", f"{holder}.json")
  if not steps:
    storage.remove(path)
    return
  storage.write_bytes(path, json.dumps(sorted(steps)).encode())


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
  """Reads the run's config.json.

  Raises:
    errors.DataError: There is none.
    errors.ConfigError: It is not a configuration of this version.
  """
  path = storage.join(workdir, "config.json")
  return config.from_json(TrainConfig, storage.read_bytes(path).decode(), path)


def _done(workdir: str) -> str:
  return storage.join(workdir, "done.json")


def _held_steps(workdir: str) -> set[int]:
  """Returns the steps in all leases that have not run out."""
  holds = storage.join(folder(workdir), "holds")
  steps: set[int] = set()
  for name in storage.list_names(holds):
    path = storage.join(holds, name)
    try:
      if (
        name.endswith(".json") and time.time() - os.path.getmtime(path) < LEASE_SECONDS
      ):
        steps |= set(json.loads(storage.read_bytes(path)))
    except (errors.DataError, FileNotFoundError):
      continue  # released between listing and reading
  return steps


def _files(path: str) -> dict[str, str]:
  """Returns the paths of TensorFlow's files with the prefix `path`, by name."""
  parent, stem = os.path.split(path)
  return {
    name: os.path.join(parent, name)
    for name in storage.list_names(parent)
    if name.startswith((stem + ".index", stem + ".data-"))
  }


def _remove_files(path: str) -> None:
  for file in _files(path).values():
    storage.remove(file)
