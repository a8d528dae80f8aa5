"""Shards in parts: what one process reads at once, from a disk or a bucket.

Parts lie side by side and cover the shard, so each byte is read once, nothing is
copied to a disk, and a process holds no more than a part.
"""

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np

from facedist import storage
from facedist.data import records, shard_index

RECORDS_A_PART = 512
_BYTES_A_PART = 16 << 20  # unless one record has more
_WINDOW_BYTES = 8 << 20
_BROKEN_ROW_BYTES = 64  # enough to see that a record's length is damaged


@dataclasses.dataclass(frozen=True)
class Part:
  """Some neighbouring records of a shard.

  Attributes:
    path: The shard.
    first: Number of the first record in the shard.
    rows: INDEX_DTYPE[records] where they lie; some may end behind the shard's end.
    start: Byte of the shard at which the part starts.
    end: Byte before which it ends; the next part starts there.
  """

  path: str
  first: int
  rows: np.ndarray
  start: int
  end: int

  def read(self) -> bytes:
    """Returns the part's bytes."""
    return storage.read_range(self.path, self.start, self.end - self.start)

  def framed(self, content: bytes) -> Iterator[bytes]:
    """Yields each record as it is framed; `content` is the part's bytes.

    One that ends behind the shard's end is as short as that makes it.
    """
    starts = self.rows["offset"].astype(np.int64) - self.start
    ends = starts + self.rows["length"]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
      yield content[start:end]


def cut(path: str, rows: np.ndarray, *, size: int) -> Iterator[Part]:
  """Yields the parts of a shard.

  Args:
    path: The shard.
    rows: INDEX_DTYPE[records], in their order in the shard, none over another.
    size: Bytes of the shard.
  """
  offsets = rows["offset"].astype(np.int64)
  ends = offsets + rows["length"]
  first = start = 0
  while start < size or first < len(rows):
    until = start + _BYTES_A_PART
    begun = int(np.searchsorted(offsets, until)) if start < size else len(rows)
    last = min(begun, first + RECORDS_A_PART)
    following = int(offsets[last]) if last < len(rows) else size
    end = min(until, following)
    if last > first:
      end = max(end, int(ends[last - 1]))
    end = min(end, size)
    yield Part(path, first, rows[first:last], start, end)
    first, start = last, end


def walk(path: str, *, size: int) -> np.ndarray:
  """Finds the records of a shard without its index, as far as their lengths lead.

  Returns:
    INDEX_DTYPE[records] of which offset and length alone mean something. The last one
    is no whole record where the shard is cut off or a length is damaged: what follows
    it cannot be found.
  """
  return np.array(list(_walk(path, size=size)), shard_index.INDEX_DTYPE)


def _walk(path: str, *, size: int) -> Iterator[tuple[int, int, int, int, int]]:
  """Yields the rows of `walk`; holds a window of the shard at a time."""
  offset = window_start = 0
  window = b""
  while offset < size:
    place = offset - window_start
    if place + records.HEADER_BYTES > len(window):
      window_start, place = offset, 0
      window = storage.read_range(path, offset, min(_WINDOW_BYTES, size - offset))
    header = window[place : place + records.HEADER_BYTES]
    length = _framed_length(header)
    if length is None or offset + length > size:
      yield offset, min(size - offset, _BROKEN_ROW_BYTES), 0, 0, 0
      return
    yield offset, length, 0, 0, 0
    offset += length


def _framed_length(header: bytes) -> int | None:
  """Returns bytes of the framed record; None where the header is damaged or lies."""
  if len(header) < records.HEADER_BYTES:
    return None
  payload, crc = struct.unpack("<QI", header)
  length = payload + records.HEADER_BYTES + records.FOOTER_BYTES
  if crc != records.masked_crc(header[:8]) or payload > records.MOST_PAYLOAD_BYTES:
    return None
  return int(length)
