"""Three ways through a set's shards: by its indexes, in parts, and without an index.

`walk_index` reads indexes ahead, one after another, so no set is too large for it.
`cut_parts` cuts a shard into parts that cover it, so each byte is read once, nothing is
copied to a disk, and only one part is in memory. `walk_part` and `walk_shard` read a
shard as a plain TFRecord file.
"""

import collections
import dataclasses
import struct
from collections.abc import Collection, Iterator
from concurrent import futures

import google_crc32c
import numpy as np

from facedist import errors, storage
from facedist.data import decoding
from facedist.data.shards import manifest, shard_index, tfrecord

_READ_AHEAD = 8  # indexes; that of a shard of 10,000 records has 240 kB
RECORDS_A_PART = 512
_BYTES_A_PART = 16 << 20  # unless one record has more
_WINDOW_BYTES = 8 << 20
_BROKEN_ROW_BYTES = 64  # enough to see that a record's length is corrupt
_PIECE_BYTES = 4 << 20
_MAX_UNUSABLE_NAMED = 3  # intact records without a face, of a shard
_NO_TEXT = f"without {tfrecord.IDENTITY}"
_MAX_LABEL = (1 << 31) - 1  # an index holds no larger one
_FRAME = struct.Struct("<QI")
_CRC = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class IndexedShard:
  """A shard and its index.

  Attributes:
    split: The split's name.
    number: The shard's place in it.
    shard: The manifest's entry.
    rows: INDEX_DTYPE[records].
  """

  split: str
  number: int
  shard: manifest.Shard
  rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class RecordPlace:
  """Where a record lies: its shard, byte and length; and its label in the index."""

  path: str
  offset: int
  length: int
  label: int


def walk_index(folder: str, made: manifest.Manifest) -> Iterator[IndexedShard]:
  """Yields every shard with its index, in the manifest's order.

  Raises:
    errors.DataError: An index is missing, corrupt or not the manifest's.
  """
  shards = (
    (name, number, shard)
    for name, split in made.splits.items()
    for number, shard in enumerate(split.shards)
  )
  waiting: collections.deque[futures.Future[IndexedShard]] = collections.deque()
  with futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
    for split, number, shard in shards:
      waiting.append(pool.submit(_load, folder, made, split, number, shard))
      if len(waiting) == _READ_AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def find_records(
  folder: str,
  made: manifest.Manifest,
  *,
  numbers: Collection[int],
  labels: Collection[int],
  each: int,
) -> tuple[dict[int, RecordPlace], dict[int, list[RecordPlace]]]:
  """Finds records by their number and the first ones of some identities.

  Args:
    folder: Local or in a bucket.
    made: Its manifest.
    numbers: Records' places in the concatenation of all splits.
    labels: The identities.
    each: Most records to find of an identity.

  Returns:
    Places by number, and by label.
  """
  ordered = np.array(sorted(numbers), np.int64)
  found: dict[int, RecordPlace] = {}
  of_label: dict[int, list[RecordPlace]] = {label: [] for label in labels}
  first = 0
  for one in walk_index(folder, made):
    path = one.shard.path(folder)
    here = ordered[(ordered >= first) & (ordered < first + len(one.rows))]
    for number in here.tolist():
      found[number] = _place(path, one.rows[number - first])
    for row in np.flatnonzero(np.isin(one.rows["label"], list(of_label))):
      places = of_label[int(one.rows[row]["label"])]
      if len(places) < each:
        places.append(_place(path, one.rows[row]))
    first += len(one.rows)
  return found, of_label


def _load(
  folder: str, made: manifest.Manifest, split: str, number: int, shard: manifest.Shard
) -> IndexedShard:
  """Reads an index and compares it with the manifest."""
  rows = shard_index.open_index(folder, shard, num_identities=made.num_identities)
  return IndexedShard(split, number, shard, rows)


def _place(path: str, row: np.void) -> RecordPlace:
  """Returns where a row of the index points."""
  return RecordPlace(path, int(row["offset"]), int(row["length"]), int(row["label"]))


@dataclasses.dataclass(frozen=True)
class ShardPart:
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


def cut_parts(path: str, rows: np.ndarray, *, size: int) -> Iterator[ShardPart]:
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
    within = int(np.searchsorted(offsets, until)) if start < size else len(rows)
    last = min(within, first + RECORDS_A_PART)
    following = int(offsets[last]) if last < len(rows) else size
    end = min(until, following)
    if last > first:
      end = max(end, int(ends[last - 1]))
    end = min(end, size)
    yield ShardPart(path, first, rows[first:last], start, end)
    first, start = last, end


def walk_part(path: str, *, size: int) -> np.ndarray:
  """Finds the records of a shard without its index, from length to length.

  Returns:
    INDEX_DTYPE[records] of which offset and length alone mean something. The last one
    is no whole record where the shard is cut off or a length is corrupt: what follows
    it cannot be found.
  """
  return np.array(list(_walk(path, size=size)), shard_index.INDEX_DTYPE)


def _walk(path: str, *, size: int) -> Iterator[tuple[int, int, int, int, int]]:
  """Yields the rows of `walk`; holds a window of the shard at a time."""
  offset = window_start = 0
  window = b""
  while offset < size:
    place = offset - window_start
    if place + tfrecord.HEADER_BYTES > len(window):
      window_start, place = offset, 0
      window = storage.read_range(path, offset, min(_WINDOW_BYTES, size - offset))
    header = window[place : place + tfrecord.HEADER_BYTES]
    length = _framed_length(header)
    if length is None or offset + length > size:
      yield offset, min(size - offset, _BROKEN_ROW_BYTES), 0, 0, 0
      return
    yield offset, length, 0, 0, 0
    offset += length


def _framed_length(header: bytes) -> int | None:
  """Returns bytes of the framed record; None where the header is corrupt."""
  if len(header) < tfrecord.HEADER_BYTES:
    return None
  payload, crc = struct.unpack("<QI", header)
  length = payload + tfrecord.HEADER_BYTES + tfrecord.FOOTER_BYTES
  if crc != tfrecord.masked_crc(header[:8]) or payload > tfrecord.MAX_PAYLOAD_BYTES:
    return None
  return int(length)


@dataclasses.dataclass(frozen=True)
class Walked:
  """What a shard holds.

  Attributes:
    name: The shard's file name.
    size: Its bytes.
    crc32c: Its checksum; that of the part before a corrupt length.
    rows: INDEX_DTYPE[records] of its index; without corrupt records.
    identities: Names by the records' label; empty where the records have none.
    image_sizes: Height and width of the images, in pixels.
    problems: A line for each corrupt record, with its number and byte, and for the
      first few that are intact but hold something else, with the others' number.
  """

  name: str
  size: int
  crc32c: int
  rows: np.ndarray
  identities: dict[int, str]
  image_sizes: set[tuple[int, int]]
  problems: list[str]


def walk_shard(path: str) -> Walked:
  """Reads a shard, local or in a bucket, from its first record to its last."""
  size, token = storage.status(path)
  stream = _ShardStream(path, size, token)
  rows: list[tuple[int, int, int, int, int]] = []
  identities: dict[int, str] = {}
  image_sizes: set[tuple[int, int]] = set()
  problems: list[str] = []
  unusable = 0
  offset = number = 0
  name = path.rpartition("/")[2]
  while offset < size:
    place = f"{name}, record {number} at byte {offset}"
    try:
      length = _payload_bytes(stream.take(tfrecord.HEADER_BYTES), size - offset)
    except errors.DataError as error:  # where the next record starts is unknown
      kind = None if number else tfrecord.kind_of_shard(path)
      problems.append(f"{name} is {kind}" if kind else f"{place}: {error}")
      break
    framed_bytes = tfrecord.HEADER_BYTES + length + tfrecord.FOOTER_BYTES
    payload, crc = stream.take(length), stream.take(tfrecord.FOOTER_BYTES)
    is_intact = _CRC.unpack(crc)[0] == tfrecord.masked_crc(payload)
    try:
      if not is_intact:
        raise errors.DataError("CRC mismatch")
      record = tfrecord.parse(payload)
      image_sizes.add(decoding.jpeg_size(record.jpeg))
      _add_identity(record, identities)
      start = tfrecord.HEADER_BYTES + payload.index(record.jpeg)
      rows.append((offset, framed_bytes, start, len(record.jpeg), record.label))
    except errors.DataError as error:
      unusable += is_intact
      if unusable <= _MAX_UNUSABLE_NAMED or not is_intact:
        problems.append(f"{place}: {str(error).rstrip('.')}")
    offset, number = offset + framed_bytes, number + 1
  if unusable > _MAX_UNUSABLE_NAMED:
    problems.append(
      f"{name}: {unusable - _MAX_UNUSABLE_NAMED:,} more records cannot be used"
    )
  index = np.array(rows, shard_index.INDEX_DTYPE)
  return Walked(name, size, stream.crc32c, index, identities, image_sizes, problems)


class _ShardStream:
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
    errors.DataError: The header is corrupt, or the record is cut off or too long.
  """
  if len(header) < tfrecord.HEADER_BYTES:
    raise errors.DataError(f"the shard is cut off, {len(header)} bytes into the record")
  length, crc = _FRAME.unpack(header)
  if crc != tfrecord.masked_crc(header[:8]):
    raise errors.DataError(
      "the record's length is corrupt, so the records after it cannot be found"
    )
  whole = tfrecord.HEADER_BYTES + length + tfrecord.FOOTER_BYTES
  if whole > left:
    raise errors.DataError(
      f"the shard is cut off, {left} bytes into a record of {whole}"
    )
  if length > tfrecord.MAX_PAYLOAD_BYTES:
    raise errors.DataError(
      f"a record of {length} bytes, where a face has at most "
      f"{tfrecord.MAX_PAYLOAD_BYTES}"
    )
  return int(length)


def _add_identity(record: tfrecord.Record, identities: dict[int, str]) -> None:
  """Keeps the name of a record's label; DataError where it had another name before."""
  label, identity = record.label, record.identity
  if not 0 <= label <= _MAX_LABEL:
    raise errors.DataError(f"label {label} is not in [0, 2^31)")
  known = identities.setdefault(label, identity)
  if identity != known:
    raise errors.DataError(
      f"label {label} is {identity or _NO_TEXT} here and {known or _NO_TEXT} before"
    )
