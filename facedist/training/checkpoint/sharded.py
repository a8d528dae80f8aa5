"""Saves and restores the rows of a class-sharded head, on any number of replicas.

Beside TensorFlow's files, a checkpoint of a class-sharded head has a `.npy` file for
each column (the class weights, then each of the optimizer's slots) and for each
`--head_shard_rows` identities of a replica's block, such as
`step-00000100.rows-centres-00000000-00065536.npy`. The file contains float32, and NumPy
can read it.

Each worker writes its own rows to the workdir and reads the files that overlap with its
rows, a piece at a time, so a process never holds more than its rows and a piece. The
checkpoint's marker names each file with its rows, size and CRC-32C, and a worker
verifies the files that it reads. Workers exchange results by a collective: the chief
writes no marker if a worker could not write, and no worker restores a checkpoint in
which another found a corrupt file.
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
from facedist.distributed import collectives
from facedist.models.heads import class_weights
from facedist.models.heads.class_weights import RowTable
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.checkpoints import Checkpoint, StagedCheckpoint

_SECTION = "rows"
"""The marker's section of these files. The marker's `files` are only TensorFlow's, so a
reader of the network alone does not read the rows."""

_FLOAT32 = np.dtype("<f4")
_CHUNK_BYTES = 4 << 20
_WRITE_ERRORS = (OSError, errors.FacedistError, tf.errors.OpError)


class RowStore:
  """Saves and restores a table of rows; every worker must make the same calls."""

  def __init__(
    self,
    table: RowTable,
    strategy: tf.distribute.Strategy,
    *,
    workdir: str,
    is_chief: bool,
    piece_rows: int,
  ) -> None:
    """Reads and writes nothing yet.

    Args:
      table: This process's part of the table.
      strategy: Of all workers that share the table.
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
    """Writes the rows of every worker.

    Returns:
      The facts for the marker.

    Raises:
      errors.SavingError: On all workers, if one of them could not write.
    """
    checkpoint = checkpoints.at(self._workdir, step)
    planned = plan_files(self._table, checkpoint.name, piece_rows=self._piece_rows)

    def remove_marker() -> list[int]:
      if self._is_chief:
        storage.remove(checkpoint.path + ".json")
      return []

    def write() -> list[int]:
      return [
        write_file(self._table, file, checkpoints.folder(self._workdir))
        if is_local(self._table, file)
        else 0
        for file in planned
      ]

    # An older marker of this step must not describe the new rows.
    self._run_on_all(remove_marker, 0)
    checksums = self._run_on_all(write, len(planned)).sum(axis=0)
    return {_SECTION: section_of(self._table, planned, checksums)}

  def restore(self, staged: StagedCheckpoint) -> str | None:
    """Reads the rows of every worker.

    Returns:
      What is corrupt on this or another worker; None if nothing is.

    Raises:
      errors.DataError: The rows are of another head.
    """
    section: dict[str, Any] = staged.marker.get(_SECTION, {})
    check_fits(self._table, section, staged.checkpoint.path)
    folder = checkpoints.folder(self._workdir)

    def read() -> list[int]:
      read_files(self._table, section, folder, piece_rows=self._piece_rows)
      return []

    try:
      self._run_on_all(read, 0, catches=(errors.DataError,))
    except errors.SavingError as error:
      return str(error)
    return None

  def _run_on_all(
    self,
    action: Callable[[], list[int]],
    num_values: int,
    *,
    catches: tuple[type[Exception], ...] = _WRITE_ERRORS,
  ) -> np.ndarray:
    """Runs this worker's part and waits for that of all others.

    Args:
      action: Returns `num_values` numbers.
      num_values: The same on every worker.
      catches: Errors that the other workers are told of; any other is raised here.

    Returns:
      int64[workers, num_values], the numbers of all workers.

    Raises:
      errors.SavingError: On all workers, if the action failed on one of them.
    """
    reason, values = None, [0] * num_values
    try:
      values = action()
    except catches as error:
      reason = errors.first_line(error)
    results = collectives.gather_from_workers(
      self._strategy, [reason is not None, *values]
    )
    if reason is not None:
      raise errors.SavingError(reason)
    if results[:, 0].any():
      failed = ", ".join(f"worker {one}" for one in np.flatnonzero(results[:, 0]))
      raise errors.SavingError(f"the rows of {failed}: see its log")
    return results[:, 1:]


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
  """Returns the files of all replicas, in the same order on every worker.

  Args:
    table: The part of any worker.
    stem: The checkpoint's name, with which the files' names begin.
    piece_rows: The maximum number of identities in a file.
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


def is_local(table: RowTable, file: RowFile) -> bool:
  """Says whether this process holds the rows of a planned file."""
  return any(file.overlaps(shard.first, shard.stop) for shard in table.shards)


def write_file(table: RowTable, file: RowFile, folder: str) -> int:
  """Writes a file of this process's rows atomically; returns its CRC-32C.

  Args:
    table: Holds the rows.
    file: One of `plan_files`; all its rows are in memory at once.
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


def section_of(
  table: RowTable, planned: Iterable[RowFile], checksums: Iterable[int]
) -> dict[str, Any]:
  """Returns the marker's section: the table's shape, and each file's rows and size."""
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


def check_fits(table: RowTable, section: Mapping[str, Any], path: str) -> None:
  """Raises DataError if a marker's rows are not those of the table.

  Args:
    table: What is to be read into.
    section: What `section_of` returned; empty if the marker has no rows.
    path: The checkpoint's, for the message.
  """
  wanted = section_of(table, (), ())
  for fact in ("num_rows", "row_shape", "columns"):
    if section.get(fact) != wanted[fact]:
      raise errors.DataError(
        f"{path} does not fit this head (rows: {fact} is {section.get(fact)}, not "
        f"{wanted[fact]}); use the config it was trained with."
      )


def read_files(
  table: RowTable, section: Mapping[str, Any], folder: str, *, piece_rows: int
) -> None:
  """Reads this process's rows from the files that overlap with them; verifies each.

  Args:
    table: With any number of replicas; `check_fits` has passed.
    section: The marker's section.
    folder: Where the files are, a local folder or one in a bucket.
    piece_rows: The maximum number of rows in memory at a time.

  Raises:
    errors.DataError: A file is missing or corrupt, or some rows are in no file. Other
      rows may have been set by then.
  """
  missing = len(table.columns) * sum(shard.count for shard in table.shards)
  for file in _written(section):
    if not is_local(table, file):
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
      "to continue from the checkpoint before."
    )


def verify(checkpoint: Checkpoint) -> None:
  """Verifies all files of a checkpoint, those of a sharded head's rows included.

  Raises:
    errors.DataError: The marker or a file is missing or corrupt.
  """
  with checkpoints.stage(checkpoint) as staged:
    verify_files(staged.marker.get(_SECTION), os.path.dirname(checkpoint.path))


def verify_files(
  section: Mapping[str, Any] | None,
  folder: str,
  *,
  piece_rows: int = class_weights.PIECE_ROWS,
) -> None:
  """Reads and verifies all files of a marker's section; None has no files.

  Raises:
    errors.DataError: A file is missing or corrupt.
  """
  if section is None:
    return
  for file in _written(section):
    for _ in _stream(folder, file, section["row_shape"], piece_rows=piece_rows):
      pass


def _written(section: Mapping[str, Any]) -> list[WrittenRows]:
  """Returns the files that a marker names."""
  return [WrittenRows(name, **facts) for name, facts in section["files"].items()]


def _stream(
  folder: str, file: WrittenRows, row_shape: Sequence[int], *, piece_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first identity, float32[rows, ...]) piece by piece, then checks the CRC.

  Raises:
    errors.DataError: The file is missing, or not what was written.
  """
  path = storage.join(folder, file.name)
  corruption = errors.DataError(
    f"{path} is corrupt: its size or CRC-32C is not the one in "
    f"{file.name.split('.')[0]}.json; remove that marker to continue from the "
    "checkpoint before."
  )
  size, generation = storage.status(path)
  if size != file.bytes:
    raise corruption
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
    raise corruption


def _header(shape: tuple[int, ...]) -> bytes:
  """Returns the header of a .npy file of float32 in row order."""
  stream = io.BytesIO()
  facts = {"descr": _FLOAT32.str, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(stream, facts)
  return stream.getvalue()


def _num_bytes(shape: tuple[int, ...]) -> int:
  """Returns the size of a .npy file of float32."""
  return len(_header(shape)) + _FLOAT32.itemsize * math.prod(shape)
