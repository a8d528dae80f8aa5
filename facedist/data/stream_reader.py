"""Records by number, from shards that stay where they are, a bucket or a disk.

Neighbouring records come in one request. Where the order of training is known
(`StreamReader.ahead`), they come ahead of time, each once an epoch.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping

import numpy as np

from facedist import errors, storage
from facedist.data import damage, indexes, manifest, read_ahead, records, shard_index
from facedist.data.block_order import BlockOrder
from facedist.data.order import Order
from facedist.data.record_reader import RecordReader
from facedist.data.share import Share

_INDEX_SHARE = 8  # of the memory, one part in so many is for the index
_MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Piece:
  """Neighbouring records of one shard, as they are stored.

  Attributes:
    first: Number of the first record.
    rows: INDEX_DTYPE[records].
    start: Byte of the shard at which `content` starts.
    content: The framed records.
  """

  first: int
  rows: np.ndarray
  start: int
  content: bytes

  def row(self, record: int) -> bytes:
    """Returns the bytes of a record's row of the index."""
    return self.rows[record - self.first].tobytes()

  def payload(self, record: int) -> bytes:
    """Returns what stands behind a record's header: payload and CRC."""
    row = self.rows[record - self.first]
    start = int(row["offset"]) - self.start
    return self.content[start + records.HEADER_BYTES : start + int(row["length"])]


class StreamedSet:
  """A set of shards that are read where they are; nothing is brought here.

  Attributes:
    folder: Where they are.
  """

  def __init__(self, folder: str):
    """Looks at nothing yet."""
    self.folder = folder

  def __enter__(self) -> "StreamedSet":
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def follow(
    self, split: str, order: Order, *, start_step: int, worker: int, num_workers: int
  ) -> None:
    """Does nothing: `StreamReader.ahead` fetches what steps need."""

  def reached(self, step: int) -> None:
    """Does nothing."""


class StreamReader(RecordReader):
  """Reads records by ranges of their shards; nothing is kept on a disk.

  Attributes:
    record_bytes: Bytes of a record, nearly.
  """

  def __init__(
    self,
    folder: str,
    split: str,
    *,
    verify_crc: bool = True,
    memory_mb: int = 1024,
    requests: int = 16,
  ):
    """Reads the manifest; shards and their indexes are looked at when needed.

    Args:
      folder: A folder with a manifest, local or gs://.
      split: 'train', 'val' or 'images'.
      verify_crc: Whether to check the CRC of each record read.
      memory_mb: MiB for what is read ahead and for the index.
      requests: How many requests are under way at a time.

    Raises:
      errors.DataError: There is no manifest, or no such split in it.
    """
    index_bytes = memory_mb * _MEGABYTE // _INDEX_SHARE
    super().__init__(
      folder,
      manifest.load(folder),
      split,
      index_of=lambda *where: indexes.CachedIndex(*where, most_bytes=index_bytes),
      verify_crc=verify_crc,
    )
    self._memory_mb, self._requests = memory_mb, requests
    self._most_bytes = memory_mb * _MEGABYTE - index_bytes
    # On average in the shard whose records are the largest.
    self.record_bytes = max(
      shard.bytes / max(1, shard.records) for shard in self._shards
    )
    self._generations: dict[int, str] = {}
    self._at_hand = threading.local()

  def ahead(
    self,
    sample_order: Order,
    share: Share,
    *,
    first_step: int,
    end_step: int | None,
  ) -> read_ahead.ReadAhead:
    """Returns what reads ahead, for one worker, of training from a step on.

    Raises:
      errors.UsageError: The order is not one of blocks, its streams do not divide over
        the workers, or the memory does not hold what is in use at one time.
    """
    if not isinstance(sample_order, BlockOrder):
      raise errors.UsageError(
        "--read_mode=stream with --shuffle_block=1 would ask for every image by "
        "itself; try --shuffle_block=256, or --read_mode=stage."
      )
    if sample_order.streams % share.num_workers:
      raise errors.UsageError(
        f"--streams={sample_order.streams} does not divide over "
        f"{share.num_workers} workers that --read_mode=stream; take a number of "
        "workers that divides it."
      )
    streams = sample_order.streams // share.num_workers
    self._check_memory(sample_order, streams)
    return read_ahead.ReadAhead(
      self,
      sample_order,
      steps=(first_step, end_step),
      streams=(share.worker * streams, (share.worker + 1) * streams),
      most_bytes=self._most_bytes,
      requests=self._requests,
    )

  def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
    """Divides records [first, last) where a shard ends."""
    shard, last_shard = self._numbering.shards_of(np.array([first, last - 1])).tolist()
    ends = self._numbering.first_ids[shard + 1 : last_shard + 1]
    edges = [first, *np.unique(ends).tolist(), last]  # empty shards end where others do
    return list(itertools.pairwise(edges))

  def fetch(self, first: int, last: int) -> Piece:
    """Reads records [first, last) of one shard, at least one, in one request.

    Raises:
      errors.DataError: The shard or its index is missing, not the manifest's, or was
        replaced since it was first read.
    """
    rows = self._index.rows_of(np.arange(first, last))
    (shard,) = self._numbering.shards_of(np.array([first])).tolist()
    start = int(rows["offset"].min())
    end = int((rows["offset"] + rows["length"]).max())
    return Piece(first, rows, start, self._range(shard, start, end - start))

  @contextlib.contextmanager
  def at_hand(self, pieces: Mapping[int, Piece]) -> Iterator[None]:
    """Lets this thread read the records of `pieces`, by number, from there."""
    self._at_hand.pieces = pieces
    try:
      yield
    finally:
      del self._at_hand.pieces

  def _rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    pieces = getattr(self._at_hand, "pieces", {})
    numbers = ids.tolist()
    if not all(number in pieces for number in numbers):
      return super()._rows_of(ids)
    rows = b"".join(pieces[number].row(number) for number in numbers)
    return np.frombuffer(rows, shard_index.INDEX_DTYPE)

  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""
    pieces = getattr(self._at_hand, "pieces", {})
    numbers = ids.tolist()
    place = 0
    while place < len(numbers):
      if (piece := pieces.get(numbers[place])) is not None:
        yield piece.payload(numbers[place])
        place += 1
        continue
      end = place + 1
      while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
        end += 1
      for first, last in self.pieces(numbers[place], numbers[end - 1] + 1):
        piece = self.fetch(first, last)
        yield from map(piece.payload, range(first, last))
      place = end

  def _header(self, shard: int, offset: int) -> bytes:
    """Reads the header of a record."""
    return self._range(shard, offset, records.HEADER_BYTES)

  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was first read."""
    self._range(shard, 0, 1)

  def _range(self, shard: int, start: int, length: int) -> bytes:
    """Reads bytes of a shard; DataError unless it is, and stays, the manifest's."""
    path = self._shards[shard].path(self.folder)
    if shard not in self._generations:
      with damage.missing_is_named(path):
        size, token = storage.status(path)
      damage.check_size(path, size, self._shards[shard].bytes)
      self._generations.setdefault(shard, token)
    return storage.read_range(path, start, length, generation=self._generations[shard])

  def _check_memory(self, sample_order: BlockOrder, streams: int) -> None:
    """Refuses a memory that does not hold two windows of each stream.

    A batch may need the end of one and the start of the next, in all streams at once.
    """
    window = sample_order.shuffle_block * sample_order.window_blocks
    needed = 2 * streams * min(window, self.num_records) * self.record_bytes
    needed *= _INDEX_SHARE / (_INDEX_SHARE - 1) / _MEGABYTE
    if needed > self._memory_mb:
      raise errors.UsageError(
        f"--stream_memory_mb={self._memory_mb} does not hold two windows a stream: "
        f"{streams} streams on this worker, {sample_order.window_blocks} blocks of "
        f"{sample_order.shuffle_block} records; try --stream_memory_mb="
        f"{int(needed) + 1}, fewer --streams or a smaller --shuffle_block."
      )
