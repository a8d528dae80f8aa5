"""A CSV of any length, sorted on disk, whose rows are asked for in order."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from tfrecords_tools import external_sort, tables

_LINE_BYTES = 8


class SortedTable:
  """A CSV of any length, whose rows are asked for an identity at a time.

  Args:
    origin: The file; rows in any order.
    columns: Numbers in a row.
    scratch_dir: See `external_sort.sorted_by_key`.
  """

  def __init__(self, origin: str, columns: int, scratch_dir: str | None = None) -> None:
    self.origin, self._columns = origin, columns
    records = (
      (name.encode(), line.to_bytes(_LINE_BYTES, "little") + numbers)
      for name, line, numbers in tables.numbers_of(origin, columns)
    )
    ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
    self._groups = itertools.groupby(self._each_once(ordered), key=_folder_of)
    self._next = next(self._groups, None)

  def of(self, identity: str) -> tuple[dict[str, int], np.ndarray]:
    """Returns the rows of an identity's images.

    Args:
      identity: Comes after those asked for before, in the order of identity + '/'.

    Returns:
      Row by the image's path without its suffix, and float32[rows, columns].

    Raises:
      errors.DataError: An image has two rows.
    """
    wanted = f"{identity}/".encode()
    while self._next is not None and self._next[0] < wanted:
      self._next = next(self._groups, None)
    found = [] if self._next is None or self._next[0] != wanted else self._next[1]
    row_of: dict[str, int] = {}
    content = bytearray()
    for name, numbers in found:
      row_of[name.decode()] = len(row_of)
      content += numbers[_LINE_BYTES:]
    return row_of, np.frombuffer(content, "<f4").reshape(-1, self._columns)

  def _each_once(
    self, records: Iterable[external_sort.Record]
  ) -> Iterator[external_sort.Record]:
    """Passes sorted records on; DataError for the second one of an image."""
    before = None
    for record in records:
      if record[0] == before:
        line = int.from_bytes(record[1][:_LINE_BYTES], "little")
        raise tables.repeated(self.origin, line, record[0].decode())
      before = record[0]
      yield record


def _folder_of(record: external_sort.Record) -> bytes:
  """Returns a record's identity with its slash; all of a name that has none."""
  folder, slash, _ = record[0].partition(b"/")
  return folder + slash
