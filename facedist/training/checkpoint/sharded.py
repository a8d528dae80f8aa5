"""The rows of a run's checkpoints, which all workers save and restore together.

Every worker brings its own rows to the workdir, or reads those it needs; then all tell
each other how it went, so that the chief writes no marker of what is not whole and no
worker goes on from what another found damaged.

A table of rows in files by identity: written by who holds them, read by who needs.

Beside TensorFlow's files a checkpoint of a class-sharded head has a file for every
column and every `--head_shard_rows` identities of a replica's block, such as
`step-00000100.rows-centres-00000000-00065536.npy`: float32, as NumPy reads it too.
Files are written and read a piece at a time, so no process holds more than its blocks
and a piece. The checkpoint's marker names the files with rows, size and CRC-32C, so who
reads checks what it reads, and no more.
"""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from facedist import errors, storage
from facedist.distributed import strategies
from facedist.models.heads import class_weights
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.checkpoints import Checkpoint, StagedCheckpoint

_FLOAT32 = np.dtype("<f4")
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class RowFile:
  """What a file holds: the rows of identities [first, stop), of one column."""

  name: str
  column: str
  first: int
  stop: int

  def overlaps(self, first: int, stop: int) -> bool:
    """Says whether it holds any of the identities [first, stop)."""
    return self.first < stop and first < self.stop


@dataclasses.dataclass(frozen=True)
class WrittenRows(RowFile):
  """A file as a marker names it."""

  bytes: int
  crc32c: int


def plan_files(table: RowTable, stem: str, *, piece_rows: int) -> list[RowFile]:
  """Returns the files of all replicas, which every process knows in the same order.

  Args:
    table: Of any of the processes that share it.
    stem: The checkpoint's name, with which the names begin.
    piece_rows: The most identities of a file.
  """
  blocks = [
    (first, min(first + table.rows_each, table.num_rows))
    for first in range(0, table.num_rows, table.rows_each)
  ]
  return [
    RowFile(f"{stem}.rows-{column}-{start:08d}-{stop:08d}.npy", column, start, stop)
    for block in blocks
    for start, stop in class_weights.pieces(*block, piece_rows)
    for column in table.columns
  ]


def is_here(table: RowTable, file: RowFile) -> bool:
  """Says whether this process holds the rows of a file that is planned."""
  return any(file.overlaps(shard.first, shard.stop) for shard in table.shards)


def write_file_rows(table: RowTable, file: RowFile, folder: str) -> int:
  """Writes a file of this process's rows, whole or not at all; returns its CRC-32C.

  Args:
    table: Holds the rows.
    file: One of `plan`, with the piece size that bounds what is held of it here.
    folder: A local folder or one in a bucket.

  Raises:
    errors.DataError: The disk is full.
    errors.UnreachableError: The bucket does not answer.
  """
  (shard,) = [one for one in table.shards if file.overlaps(one.first, one.stop)]
  rows = class_weights.read_rows(shard, file.column, file.first, file.stop)
  content = np.ascontiguousarray(rows.numpy(), _FLOAT32)
  data = content.reshape(-1).view(np.uint8)
  header = _header(content.shape)
  checksum = storage.crc32c_of(header)
  path = storage.join(folder, file.name)
  with storage.new_file(path) as partial, open(partial, "wb") as stream:
    stream.write(header)
    for start in range(0, len(data), _CHUNK_BYTES):
      chunk = data[start : start + _CHUNK_BYTES].tobytes()
      stream.write(chunk)
      checksum = storage.extend_crc32c(checksum, chunk)
  return checksum


def describe_file(
  table: RowTable, planned: Iterable[RowFile], checksums: Iterable[int]
) -> dict[str, Any]:
  """Returns what a marker says of the files: of which table, and each one's size."""
  return {
    "num_rows": table.num_rows,
    "row_shape": list(table.row_shape),
    "columns": list(table.columns),
    "files": {
      file.name: {
        "column": file.column,
        "first": file.first,
        "stop": file.stop,
        "bytes": _num_bytes((file.stop - file.first, *table.row_shape)),
        "crc32c": int(checksum),
      }
      for file, checksum in zip(planned, checksums, strict=True)
    },
  }


def check_fits(table: RowTable, content: Mapping[str, Any], path: str) -> None:
  """Raises DataError if a marker's rows are not those of the table.

  Args:
    table: What is to be read into.
    content: What `describe` returned; empty if the marker has no rows.
    path: The checkpoint's, for the message.
  """
  wanted = describe_file(table, (), ())
  for fact in ("num_rows", "row_shape", "columns"):
    if content.get(fact) != wanted[fact]:
      raise errors.DataError(
        f"{path} does not fit this head (rows: {fact} is {content.get(fact)}, not "
        f"{wanted[fact]}); use the config it was trained with."
      )


def read_file_rows(
  table: RowTable, content: Mapping[str, Any], folder: str, *, piece_rows: int
) -> None:
  """Reads this process's rows from the files that have any of them; all are checked.

  Args:
    table: With any number of replicas; `check_fits` has found nothing.
    content: What the marker says of the rows.
    folder: Where the files are, a local folder or one in a bucket.
    piece_rows: The most rows that are held at a time.

  Raises:
    errors.DataError: A file is missing or damaged, or rows are in none. Some rows may
      have been set by then.
  """
  missing = len(table.columns) * sum(shard.count for shard in table.shards)
  for file in _files(content):
    if not is_here(table, file):
      continue
    for first, rows in _stream(folder, file, table.row_shape, piece_rows=piece_rows):
      for shard in table.shards:
        start, stop = max(first, shard.first), min(first + len(rows), shard.stop)
        if start < stop:
          part = tf.constant(rows[start - first : stop - first])
          class_weights.write_rows(shard, file.column, start, part)
          missing -= stop - start
  if missing:
    raise errors.DataError(
      f"a marker of {folder} lacks {missing} of this worker's rows; remove the marker "
      "to go on from the checkpoint before."
    )


def find_corrupt_file(
  content: Mapping[str, Any], folder: str, *, piece_rows: int = class_weights.PIECE_ROWS
) -> str | None:
  """Reads all files; returns what is wrong with the first that is damaged, if any."""
  try:
    for file in _files(content):
      for _ in _stream(folder, file, content["row_shape"], piece_rows=piece_rows):
        pass
  except errors.DataError as error:
    return str(error)
  return None


def _files(content: Mapping[str, Any]) -> list[WrittenRows]:
  """Returns the files that a marker names."""
  return [WrittenRows(name, **facts) for name, facts in content["files"].items()]


def _stream(
  folder: str, file: WrittenRows, row_shape: Sequence[int], *, piece_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first identity, float32[rows, ...]) piece by piece, then checks the CRC.

  Raises:
    errors.DataError: The file is missing, or not what was written.
  """
  path = storage.join(folder, file.name)
  damage = errors.DataError(
    f"{path} is damaged: its size or CRC-32C is not the one in "
    f"{file.name.split('.')[0]}.json; remove that marker to go on from the checkpoint "
    "before."
  )
  size, generation = storage.status(path)
  if size != file.bytes:
    raise damage
  row_bytes = _FLOAT32.itemsize * math.prod(row_shape)
  header_bytes = file.bytes - (file.stop - file.first) * row_bytes
  position = checksum = 0
  for first, stop in class_weights.pieces(file.first, file.stop, piece_rows):
    end = header_bytes + (stop - file.first) * row_bytes
    piece = storage.read_range(path, position, end - position, generation=generation)
    checksum = storage.extend_crc32c(checksum, piece)
    rows = np.frombuffer(piece, _FLOAT32, offset=0 if position else header_bytes)
    position = end
    yield first, rows.reshape(-1, *row_shape)
  if checksum != file.crc32c:
    raise damage


def _header(shape: tuple[int, ...]) -> bytes:
  """Returns the start of a .npy file of float32 in row order."""
  stream = io.BytesIO()
  facts = {"descr": _FLOAT32.str, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(stream, facts)
  return stream.getvalue()


def _num_bytes(shape: tuple[int, ...]) -> int:
  """Returns the size of a .npy file of float32."""
  return len(_header(shape)) + _FLOAT32.itemsize * math.prod(shape)


_FACTS = "rows"
"""What a marker calls them; its `files` are TensorFlow's, all that a reader of the
network alone needs."""

_WRITING_FAILED = (OSError, errors.FacedistError, tf.errors.OpError)


class RowStore:
  """A run's table of rows and where it is saved."""

  def __init__(
    self,
    table: RowTable,
    strategy: tf.distribute.Strategy,
    *,
    workdir: str,
    is_chief: bool,
    piece_rows: int,
  ) -> None:
    """Touches nothing yet.

    Args:
      table: This process's part of it.
      strategy: Of all workers that share it.
      workdir: The run's folder, local or gs://.
      is_chief: Whether this worker writes the markers.
      piece_rows: Rows that are read or written at a time.
    """
    self._table = table
    self._strategy = strategy
    self._workdir = workdir
    self._is_chief = is_chief
    self._piece_rows = piece_rows

  def save(self, step: int) -> dict[str, Any]:
    """Writes every worker's rows; every worker must call it.

    Returns:
      What the marker has to say of them.

    Raises:
      errors.SavingError: On all workers, if one of them could not.
    """
    checkpoint = checkpoints.at(self._workdir, step)
    planned = plan_files(self._table, checkpoint.name, piece_rows=self._piece_rows)

    def unmark() -> list[int]:
      if self._is_chief:
        storage.remove(checkpoint.path + ".json")
      return []

    def write() -> list[int]:
      return [
        write_file_rows(self._table, file, checkpoints.folder(self._workdir))
        if is_here(self._table, file)
        else 0
        for file in planned
      ]

    # a step saved anew: nobody may take the new rows for those that the marker means
    self._together(unmark, 0)
    checksums = self._together(write, len(planned)).sum(axis=0)
    return {_FACTS: describe_file(self._table, planned, checksums)}

  def restore(self, staged: StagedCheckpoint) -> str | None:
    """Reads the rows that this worker holds; every worker must call it.

    Returns:
      What is damaged on this or another worker; none if nothing is.

    Raises:
      errors.DataError: The rows are of another head.
    """
    content: dict[str, Any] = staged.marker.get(_FACTS, {})
    check_fits(self._table, content, staged.checkpoint.path)
    folder = checkpoints.folder(self._workdir)

    def read() -> list[int]:
      read_file_rows(self._table, content, folder, piece_rows=self._piece_rows)
      return []

    try:
      self._together(read, 0, catches=(errors.DataError,))
    except errors.SavingError as error:
      return str(error)
    return None

  def _together(
    self,
    action: Callable[[], list[int]],
    num_values: int,
    *,
    catches: tuple[type[Exception], ...] = _WRITING_FAILED,
  ) -> np.ndarray:
    """Runs this worker's part and waits for that of all others.

    Args:
      action: Returns `num_values` numbers.
      num_values: The same on every worker.
      catches: What the others are told of; all else ends this worker.

    Returns:
      int64[workers, num_values], the numbers of all.

    Raises:
      errors.SavingError: On all workers, if the action failed on one of them.
    """
    reason, values = None, [0] * num_values
    try:
      values = action()
    except catches as error:
      reason = errors.first_line(error)
    told = strategies.from_workers(self._strategy, [reason is not None, *values])
    if reason is not None:
      raise errors.SavingError(reason)
    if told[:, 0].any():
      culprits = ", ".join(f"worker {one}" for one in np.flatnonzero(told[:, 0]))
      raise errors.SavingError(f"the rows of {culprits}: see its log")
    return told[:, 1:]


def find_corruption(checkpoint: Checkpoint) -> str | None:
  """Reads all rows; returns what is wrong with the first file that is damaged."""
  content = checkpoint.marker().get(_FACTS)
  if content is None:
    return None
  return find_corrupt_file(content, os.path.dirname(checkpoint.path))
