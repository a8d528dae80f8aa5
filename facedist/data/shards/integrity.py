"""Finds out and says what is wrong with a shard, its index or one of its records.

A corrupt record has its own error class, because a run may continue without it
(`data/readers/bad_records.py`). Corruption of whole files always ends the run: a shard
that is missing, empty or cut off, an index of another shard, a manifest of another
build, a shard that was replaced while it was read. Each has its own message.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from facedist import errors, storage
from facedist.data.shards import manifest, tfrecord

_INDEX_ENDING = ".npy"

Token = tuple[int, int, int]
"""Identifies a local file's content: inode, bytes, modification time in ns."""


class BadRecordError(errors.DataError):
  """A record is corrupt; the text names shard, record and byte.

  Attributes:
    record: The record's number in its split.
  """

  def __init__(self, record: int, text: str) -> None:
    super().__init__(text)
    self.record = record


def bad_record(
  path: str, *, record: int, number: int, offset: int, shard: int, reason: str
) -> BadRecordError:
  """Returns the error of a record that cannot be used.

  Args:
    path: The shard.
    record: The record's number in the split.
    number: Its number in the shard.
    offset: Byte of the shard at which it starts.
    shard: The shard's number in the split, for the fix.
    reason: What is wrong.
  """
  return BadRecordError(
    record,
    f"{path}, record {number} at byte {offset}: {reason}; rebuild this shard with "
    f"--only_shards={shard}.",
  )


def describe_corruption(header: bytes, payload_bytes: int) -> str:
  """Says why a record's CRC does not match, from the header before it.

  Args:
    header: The `tfrecord.HEADER_BYTES` before the payload.
    payload_bytes: The payload's length by the index.
  """
  length = int.from_bytes(header[:8], "little")
  if int.from_bytes(header[8:], "little") != tfrecord.masked_crc(header[:8]):
    return (
      "no record starts here: the index does not match the shard, or the record's "
      "length is corrupt"
    )
  if length != payload_bytes:
    return (
      f"the index does not match the shard: it says {payload_bytes} bytes, the record "
      f"has {length}"
    )
  return "CRC mismatch"


def token(status: os.stat_result) -> Token:
  """Returns what distinguishes a file from another one at the same path."""
  return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: str, opened: Token) -> None:
  """Checks that a local shard is still the file that was opened.

  Raises:
    errors.DataError: It was replaced, written to or removed since.
  """
  try:
    if token(os.stat(path)) == opened:
      return
  except FileNotFoundError:
    pass
  raise errors.DataError(
    f"{path} was replaced while it was being read; stop what writes there, then start "
    "again."
  )


def missing(path: str) -> errors.DataError:
  """Returns the error of a shard, or an index, that does not exist."""
  fix = "copy it again or rebuild it."
  if path.endswith(_INDEX_ENDING):
    fix = "copy it again, or run python -m tfrecords_tools.rebuild_index on the folder."
  return errors.DataError(f"{path} does not exist, but the manifest names it; {fix}")


@contextlib.contextmanager
def missing_is_named(path: str) -> Iterator[None]:
  """Turns a failed read of a missing file into an error that the manifest names it."""
  try:
    yield
  except errors.DataError as error:
    if storage.exists(path):
      raise
    raise missing(path) from error


def stored_crc32c(path: str) -> int:
  """Returns a file's CRC-32C; a bucket keeps it, a local file is read."""
  return (storage.stored_crc32c if storage.is_bucket(path) else storage.crc32c)(path)


def check_size(path: str, size: int, expected: int) -> None:
  """Raises DataError unless a shard has as many bytes as the manifest says."""
  if size == expected:
    return
  if kind := tfrecord.kind_of_shard(path):
    raise errors.DataError(f"{path} is {kind}.")
  if not size:
    state = "is empty"
  elif size < expected:
    state = f"is cut off: it has {size} bytes"
  else:
    state = f"is too long: it has {size} bytes"
  raise errors.DataError(
    f"{path} {state}, the manifest says {expected}; copy it again or rebuild it."
  )


def check_index(
  path: str, rows: np.ndarray, described: manifest.Shard, *, checksum: int, size: int
) -> None:
  """Compares an index with the manifest, and finds out which of the two is wrong.

  Args:
    path: The index.
    rows: Its INDEX_DTYPE[records].
    described: The manifest's entry of the shard.
    checksum: CRC-32C of the index file.
    size: Bytes that the shard has.

  Raises:
    errors.DataError: The index is not its shard's, or the manifest is of another build.
  """
  if checksum == described.index_crc32c and len(rows) == described.records:
    return
  end = int(rows[-1]["offset"]) + int(rows[-1]["length"]) if len(rows) else 0
  is_selection = described.folder is not None  # whose index may leave records out
  if end > size or (end < size and not is_selection):
    raise errors.DataError(
      f"{path} does not match its shard: its {len(rows)} records end at byte {end}, "
      f"the shard at {size}; run python -m tfrecords_tools.rebuild_index "
      "--overwrite on the folder."
    )
  if (len(rows), size) == (described.records, described.bytes):
    raise errors.DataError(
      f"{path} is corrupt: CRC mismatch; run python -m tfrecords_tools.rebuild_index "
      "--overwrite on the folder, or copy it again."
    )
  beside = storage.join(os.path.dirname(path), manifest.MANIFEST_NAME)
  raise errors.DataError(
    f"{beside} is from another build than {os.path.basename(path)}: it says "
    f"{described.records} records in {described.bytes} bytes, the index and its shard "
    f"{len(rows)} in {size}; copy the folder again or rebuild it."
  )
