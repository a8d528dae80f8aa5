"""`metrics.jsonl`: one line a score, appended once and never lost or written twice.

`unscored.jsonl` beside it has a line for each checkpoint and set that got no score. Its
fields are those of `ScoreLog.KEY`, `checkpoint` and `reason`: `skipped`, by
--policy=latest, or `missed`, if the checkpoint was deleted while it waited. If there is
a score with the same key in metrics.jsonl, the checkpoint was scored later.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from absl import logging

from facedist import errors, storage

Row = dict[str, Any]
SCORE_LOG_NAME = "metrics.jsonl"
UNSCORED_LOG_NAME = "unscored.jsonl"


class ScoreLog:
  """The scores in one file, shared by evaluators and by their restarts.

  The key of a row is `step`, `set`, `fingerprint`, `mirrored` and `weights`: a set that
  was rebuilt or another way of embedding is another measurement. The file is locked
  while it is read or appended to, so two evaluators may share it. A last line that a
  killed process left unfinished is cut off, and its score is computed again. In a
  bucket each append replaces the whole object, unless another process replaced it.
  """

  KEY = ("step", "set", "fingerprint", "mirrored", "weights")

  def __init__(self, path: str) -> None:
    self.path = path

  def rows(self) -> list[Row]:
    """Returns all rows in the order in which they were written.

    Raises:
      errors.DataError: A line before the last is no JSON object.
    """
    if storage.is_bucket(self.path):
      return self._in_bucket()[0]
    if not os.path.exists(self.path):
      return []
    with self._locked() as stream:
      return self._read(stream)

  def append(self, row: Row) -> bool:
    """Writes a row to the disk; returns False, and writes nothing, if it is there.

    Raises:
      errors.DataError: A line of the file is no JSON object.
    """
    if storage.is_bucket(self.path):
      return self._append_in_bucket(row)
    with self._locked() as stream:
      if self.key(row) in {self.key(other) for other in self._read(stream)}:
        return False
      stream.seek(0, os.SEEK_END)
      stream.write(json.dumps(row, allow_nan=False).encode() + b"\n")
      stream.flush()
      os.fsync(stream.fileno())
      return True

  @classmethod
  def key(cls, row: Row) -> tuple[Any, ...]:
    """Returns what tells a row from others."""
    known = {"weights": "trained"} | row  # older versions had no other
    return tuple(known.get(name) for name in cls.KEY)

  def _in_bucket(self) -> tuple[list[Row], str | None]:
    """Returns the rows of the object, and its generation; none where there is none."""
    if not storage.exists(self.path):
      return [], None
    generation = None
    # Another evaluator may write between the two: then the content is of neither.
    while generation != (generation := storage.generation(self.path)):
      content = storage.read_bytes(self.path)
    return self._read(io.BytesIO(content)), generation

  def _append_in_bucket(self, row: Row) -> bool:
    """Appends to the object; tries again where another evaluator was faster."""
    while True:
      rows, generation = self._in_bucket()
      if self.key(row) in {self.key(other) for other in rows}:
        return False
      lines = [json.dumps(each, allow_nan=False) + "\n" for each in [*rows, row]]
      content = "".join(lines).encode()
      if storage.replace_object(self.path, content, generation=generation):
        return True

  def _read(self, stream: BinaryIO) -> list[Row]:
    """Parses the file from its start and repairs its last line."""
    stream.seek(0)
    rows, good_bytes = [], 0
    lines = stream.readlines()
    for number, line in enumerate(lines, 1):
      row = _parse(line)
      if row is None and number < len(lines):
        raise errors.DataError(
          f"{self.path}, line {number} is not a JSON object; remove that line, and "
          "its score is computed again."
        )
      if row is not None and line.endswith(b"\n"):
        rows.append(row)
        good_bytes += len(line)
    if good_bytes < sum(map(len, lines)):
      logging.warning("%s: cut off its unfinished last line.", self.path)
      stream.truncate(good_bytes)
    return rows

  @contextmanager
  def _locked(self) -> Iterator[BinaryIO]:
    """Opens the file, made if missing, for this process alone."""
    os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
    descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b") as stream:
      fcntl.flock(stream, fcntl.LOCK_EX)
      yield stream


def read_rows(path: str) -> list[Row]:
  """Returns the rows of a file that this process may not write; none without a file.

  An unfinished last line, which an evaluator may be writing, is left out.

  Raises:
    errors.DataError: A line before the last is no JSON object.
  """
  rows, unread = [], 0
  for number, line in enumerate(
    storage.open_lines(path) if storage.exists(path) else ()
  ):
    if unread:
      raise errors.DataError(
        f"{path}, line {unread} is not a JSON object; remove that line."
      )
    row = _parse(line.encode())
    if row is None:
      unread = number + 1
    else:
      rows.append(row)
  return rows


def _parse(line: bytes) -> Row | None:
  """Returns the line's JSON object; none if it is not one."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None
