"""Shards read as plain TFRecord files, without index or manifest, piece by piece."""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np

from facedist import errors, storage
from facedist.data import images, records, shard_index

_PIECE_BYTES = 4 << 20
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
    identities: Names by label; empty where the records do not tell the name.
    image_sizes: Height and width of the images, in pixels.
    problems: A line for each damaged record, with its number and byte.
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
  offset = number = 0
  name = path.rpartition("/")[2]
  while offset < size:
    place = f"{name}, record {number} at byte {offset}"
    try:
      length = _payload_bytes(stream.take(records.HEADER_BYTES), size - offset)
    except errors.DataError as error:  # where the next record starts is unknown
      problems.append(f"{place}: {error}")
      break
    framed_bytes = records.HEADER_BYTES + length + records.FOOTER_BYTES
    payload, crc = stream.take(length), stream.take(records.FOOTER_BYTES)
    try:
      if _CRC.unpack(crc)[0] != records.masked_crc(payload):
        raise errors.DataError("CRC mismatch")
      start, jpeg, label, identity = _content(payload)
      image_sizes.add(images.jpeg_size(jpeg))
      rows.append((offset, framed_bytes, start, len(jpeg), label))
      if identities.setdefault(label, identity) != identity:
        raise errors.DataError(
          f"label {label} is {identity} here and {identities[label]} before"
        )
    except errors.DataError as error:
      problems.append(f"{place}: {error}")
    offset, number = offset + framed_bytes, number + 1
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


def _content(payload: bytes) -> tuple[int, bytes, int, str]:
  """Returns where in the framed record the image starts, the image, label and identity.

  The features may come in any order and with others, as TensorFlow writes them; the
  identity is empty where there is none.

  Raises:
    errors.DataError: It is no Example with an image and a label.
  """
  import tensorflow as tf
  from google.protobuf import message

  try:
    features = tf.train.Example.FromString(payload).features.feature
  except message.DecodeError as error:
    raise errors.DataError("not a tf.train.Example") from error
  jpeg = _only(features, records.IMAGE, "bytes_list")
  label = _only(features, records.LABEL, "int64_list")
  if not 0 <= label < 1 << 31:
    raise errors.DataError(f"label {label} is not in [0, 2^31)")
  identity = b""
  if records.IDENTITY in features:
    identity = _only(features, records.IDENTITY, "bytes_list")
  start = records.HEADER_BYTES + payload.index(jpeg)
  return start, jpeg, int(label), identity.decode(errors="replace")


def _only(features: Any, name: str, kind: str) -> Any:
  """Returns the one value of a feature; DataError where there is another number."""
  values: Any = getattr(features[name], kind).value if name in features else []
  if len(values) != 1:
    raise errors.DataError(f"the feature {name} has {len(values)} values, not one")
  return values[0]
