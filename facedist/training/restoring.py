"""Checkpoints read back: every file checked, from a disk or from a bucket."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import tensorflow as tf

from facedist import errors, storage
from facedist.training.checkpoints import Checkpoint


def find_damage(checkpoint: Checkpoint) -> str | None:
  """Returns what is wrong with a checkpoint's files; None if nothing is."""
  try:
    with _on_disk(checkpoint):
      return None
  except errors.DataError as error:
    return str(error)


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
  with _on_disk(checkpoint) as path:
    _read(state, path, checkpoint, is_whole=is_whole)


@contextlib.contextmanager
def _on_disk(checkpoint: Checkpoint) -> Iterator[str]:
  """Yields the prefix of its files on a local disk, all as the marker says.

  A bucket's are brought to the folder for temporary files (TMPDIR).

  Raises:
    errors.DataError: A file is missing or damaged.
  """
  parent = os.path.dirname(checkpoint.path)
  with contextlib.ExitStack() as stack:
    local = parent
    if storage.is_bucket(parent):
      scratch = tempfile.TemporaryDirectory(prefix="facedist-load-")
      local = stack.enter_context(scratch)
    for name, facts in checkpoint.marker()["files"].items():
      source, file = storage.join(parent, name), os.path.join(local, name)
      if local != parent:
        storage.download(source, file)
      if storage.crc32c(file) != facts["crc32c"]:
        if kind := storage.kind_of_file(file):
          raise errors.DataError(f"{source} is {kind}.")
        raise errors.DataError(
          f"{source} is damaged: its CRC-32C is not the one in {checkpoint.name}.json; "
          "remove that marker to go on from the checkpoint before."
        )
    local = stack.enter_context(storage.plain_name(local))
    yield os.path.join(local, checkpoint.name)


def _read(
  state: tf.train.Checkpoint, path: str, checkpoint: Checkpoint, *, is_whole: bool
) -> None:
  """Reads TensorFlow's files with the prefix `path` into `state`."""
  try:
    status = state.read(path)
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
