"""Shards read as plain TFRecord files, without index or manifest, piece by piece."""

import dataclasses
import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from facedist import errors, storage
from facedist.data import images, records, shard_index

_PIECE_BYTES = 4 << 20
_MOST_UNFIT = 3  # records of a shard, intact but not of a face, that are named
_NO_TEXT = f"without {records.IDENTITY}"
_MOST_LABEL = (1 << 31) - 1  # an index holds no larger one
_FRAME = struct.Struct("<QI")
_CRC = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Walked:
  """What a shard holds.

  Attributes:
    name: The shard's file name.
    size: Its bytes.
    crc32c: Its checksum; that of the part before the damage where there is some.
    rows: INDEX_DTYPE[records] of its index; damaged records are left out.
    identities: Names by the records' label; empty where the records do not tell it.
    image_sizes: Height and width of the images, in pixels.
    problems: A line for each damaged record, with its number and byte, and for the
      first few that are intact but hold something else, with the others' number.
  """

  name: str
  size: int
  crc32c: int
  rows: np.ndarray
  identities: dict[int, str]
  image_sizes: set[tuple[int, int]]
  problems: list[str]


def walk(path: str) -> Walked:
  """Reads a shard, local or in a bucket, from its first record to its last."""
  size, token = storage.status(path)
  stream = _Stream(path, size, token)
  rows: list[tuple[int, int, int, int, int]] = []
  identities: dict[int, str] = {}
  image_sizes: set[tuple[int, int]] = set()
  problems: list[str] = []
  unfit = 0
  offset = number = 0
  name = path.rpartition("/")[2]
  while offset < size:
    place = f"{name}, record {number} at byte {offset}"
    try:
      length = _payload_bytes(stream.take(records.HEADER_BYTES), size - offset)
    except errors.DataError as error:  # where the next record starts is unknown
      kind = None if number else records.kind_of_shard(path)
      problems.append(f"{name} is {kind}" if kind else f"{place}: {error}")
      break
    framed_bytes = records.HEADER_BYTES + length + records.FOOTER_BYTES
    payload, crc = stream.take(length), stream.take(records.FOOTER_BYTES)
    is_intact = _CRC.unpack(crc)[0] == records.masked_crc(payload)
    try:
      if not is_intact:
        raise errors.DataError("CRC mismatch")
      record = records.parse(payload)
      image_sizes.add(images.jpeg_size(record.jpeg))
      _add_identity(record, identities)
      start = records.HEADER_BYTES + payload.index(record.jpeg)
      rows.append((offset, framed_bytes, start, len(record.jpeg), record.label))
    except errors.DataError as error:
      unfit += is_intact
      if unfit <= _MOST_UNFIT or not is_intact:
        problems.append(f"{place}: {str(error).rstrip('.')}")
    offset, number = offset + framed_bytes, number + 1
  if unfit > _MOST_UNFIT:
    problems.append(f"{name}: {unfit - _MOST_UNFIT:,} more records cannot be used")
  index = np.array(rows, shard_index.INDEX_DTYPE)
  return Walked(name, size, stream.crc32c, index, identities, image_sizes, problems)


class _Stream:
  """The bytes of a shard in order, with their checksum; holds a piece of it."""

  def __init__(self, path: str, size: int, token: str) -> None:
    self._pieces = _pieces(path, size, token)
    self._held = bytearray()
    self.crc32c = 0

  def take(self, count: int) -> bytes:
    """Returns the next `count` bytes; fewer at the end."""
    while len(self._held) < count and (piece := next(self._pieces, None)) is not None:
      self._held += piece
    taken = bytes(self._held[:count])
    del self._held[:count]
    self.crc32c = int(google_crc32c.extend(self.crc32c, taken))
    return taken


def _pieces(path: str, size: int, token: str) -> Iterator[bytes]:
  """Yields a shard piece by piece; DataError if it is replaced meanwhile."""
  for start in range(0, size, _PIECE_BYTES):
    length = min(_PIECE_BYTES, size - start)
    yield storage.read_range(path, start, length, generation=token)


def _payload_bytes(header: bytes, left: int) -> int:
  """Returns the payload's length; `left` bytes of the shard are left, header included.

  Raises:
    errors.DataError: The header is damaged, or the record is cut off or too long.
  """
  if len(header) < records.HEADER_BYTES:
    raise errors.DataError(f"the shard is cut off, {len(header)} bytes into the record")
  length, crc = _FRAME.unpack(header)
  if crc != records.masked_crc(header[:8]):
    raise errors.DataError(
      "the record's length is damaged, and with it the way to all that follow"
    )
  whole = records.HEADER_BYTES + length + records.FOOTER_BYTES
  if whole > left:
    raise errors.DataError(
      f"the shard is cut off, {left} bytes into a record of {whole}"
    )
  if length > records.MOST_PAYLOAD_BYTES:
    raise errors.DataError(
      f"a record of {length} bytes, where a face has at most "
      f"{records.MOST_PAYLOAD_BYTES}"
    )
  return int(length)


def _add_identity(record: records.Record, identities: dict[int, str]) -> None:
  """Notes what a record's label is called; DataError where it was called otherwise."""
  label, identity = record.label, record.identity
  if not 0 <= label <= _MOST_LABEL:
    raise errors.DataError(f"label {label} is not in [0, 2^31)")
  known = identities.setdefault(label, identity)
  if identity != known:
    raise errors.DataError(
      f"label {label} is {identity or _NO_TEXT} here and {known or _NO_TEXT} before"
    )
