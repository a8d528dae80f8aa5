"""Reads records by number in three steps: locate, fetch, decode.

A `RecordSource` locates records in the index and fetches their bytes; `RecordReader`
checks and decodes them. The sources are `local_reader.LocalShards` (files on a local
disk), `streaming_reader.StreamedShards` (ranges of bytes in a bucket or on a disk) and
`streaming_reader.PrefetchedRecords` (the prefetched records of a batch).
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from facedist import errors
from facedist.data import decoding
from facedist.data.readers import batch_memory
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest, shard_index, tfrecord


class RecordSource(Protocol):
  """Where records are read from; safe from many threads."""

  def locate(self, ids: np.ndarray) -> np.ndarray:
    """Returns the index's INDEX_DTYPE[n] for int64[n] record numbers."""

  def fetch(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields the bytes after each record's header: payload and CRC."""


class Prefetcher(Protocol):
  """Fetches the records of training batches before they are read."""

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[RecordSource]:
    """Yields the source of a batch, valid while the `with` statement is open.

    Args:
      positions: int64[batch], of one step, in the stream of batches.
      records: int64[batch], the sampler's records at these positions.
    """


class Shards(RecordSource, Protocol):
  """All shards of a split."""

  def read_header(self, shard: int, offset: int) -> bytes:
    """Reads the header of the record that starts at a byte of a shard."""

  def path(self, shard: int) -> str:
    """Returns a shard's path at its source, for messages."""

  def check_shard(self, shard: int) -> None:
    """Checks that a shard in which a bad record was read is the one to read.

    Raises:
      errors.DataError: It was replaced since it was opened.
      errors.CorruptCopyError: It is a corrupt copy.
    """

  def prefetcher(
    self,
    sampler: EpochSampler,
    batch_shard: BatchShard,
    *,
    first_step: int,
    end_step: int | None,
  ) -> Prefetcher:
    """Returns the prefetcher of one worker's batches.

    Args:
      sampler: Which records make up which step.
      batch_shard: This worker's part of each step.
      first_step: The step that training begins with.
      end_step: The step at which it ends, or None.

    Raises:
      errors.UsageError: The shards cannot be read in the sampler's order.
    """


class RecordReader:
  """Reads any record of a split by its number, from any thread.

  A record's number is its place in the concatenation of the split's shards.

  Attributes:
    folder: Where the shards are.
    manifest: What the folder holds.
    memory: Where the pixels of batches go.
    shards: Where records are read from unless they were prefetched.
  """

  def __init__(
    self,
    folder: str,
    content: manifest.Manifest,
    split: str,
    shards: Shards,
    *,
    verify_crc: bool,
  ):
    """Opens nothing.

    Args:
      folder: Where the shards are.
      content: Its manifest.
      split: 'train', 'val' or 'images'.
      shards: The split's shards.
      verify_crc: Whether to check the CRC of each record read.
    """
    self.folder = folder
    self.manifest = content
    self.memory = batch_memory.BatchMemory()
    self.shards = shards
    self._described = content.split(split, folder).shards
    self._numbering = shard_index.Numbering(self._described)
    self._verify_crc = verify_crc

  @property
  def num_records(self) -> int:
    """Number of records of the split."""
    return self._numbering.num_records

  @property
  def image_size(self) -> int:
    """Height and width of every image in pixels."""
    return self.manifest.image_size

  def labels(self) -> np.ndarray:
    """Reads int32[num_records], the labels of all records, from the shards' indexes."""
    return shard_index.labels(
      self.folder, self._described, num_identities=self.manifest.num_identities
    )

  def filenames(self) -> list[str]:
    """Reads the name of the source image of every record; empty where it has none.

    Raises:
      integrity.BadRecordError: A record is corrupt.
    """
    names = []
    for start in range(0, self.num_records, 256):
      ids = np.arange(start, min(start + 256, self.num_records))
      contents = self.shards.fetch(ids, self.shards.locate(ids))
      for record, content in zip(ids, contents, strict=True):
        try:
          parsed = tfrecord.parse(bytes(content[: -tfrecord.FOOTER_BYTES]))
        except errors.DataError as error:
          raise self._bad_record(record, str(error)) from error
        names.append(parsed.filename)
    return names

  def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Reads encoded images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      The JPEGs, and int32[batch] labels.

    Raises:
      integrity.BadRecordError: A record is corrupt; names shard, record and byte.
      errors.DataError: A shard was replaced since it was opened.
      errors.CorruptCopyError: A cached copy of a shard was corrupt.
    """
    rows = self.shards.locate(ids)
    labels = self._labels(ids, rows)
    return [bytes(jpeg) for jpeg in self._jpegs(ids, rows, self.shards)], labels

  def read_batch(
    self, ids: np.ndarray, source: RecordSource | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes images.

    Args:
      ids: int64[batch], in [0, num_records).
      source: Where to read them from, as `Prefetcher.batch` yields it; by default the
        shards.

    Returns:
      uint8[batch, image_size, image_size, 3] RGB, upright, from `self.memory`, so
      that TensorFlow takes it over without a copy; and int32[batch] labels.

    Raises:
      integrity.BadRecordError: A record is corrupt, no JPEG, or not of the set's size.
      errors.DataError: A shard was replaced since it was opened.
      errors.CorruptCopyError: A cached copy of a shard was corrupt.
    """
    source = self.shards if source is None else source
    rows = source.locate(ids)
    labels = self._labels(ids, rows)
    pixels = self.memory.empty((len(ids), self.image_size, self.image_size, 3))
    jpegs = self._jpegs(ids, rows, source)
    for record, image, jpeg in zip(ids, pixels, jpegs, strict=True):
      try:
        decoding.decode_record(jpeg, image)
      except errors.DataError as error:
        raise self._bad_record(record, str(error)) from error
    return pixels, labels

  def _labels(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns int32[n]; raises BadRecordError for one that no identity has."""
    labels = rows["label"].astype(np.int32)
    wrong = np.flatnonzero((labels < 0) | (labels >= self.manifest.num_identities))
    if wrong.size:
      raise self._bad_record(
        ids[wrong[0]],
        f"its label is {labels[wrong[0]]}, and the manifest has "
        f"{self.manifest.num_identities} identities",
      )
    return labels

  def _jpegs(
    self, ids: np.ndarray, rows: np.ndarray, source: RecordSource
  ) -> Iterator[memoryview]:
    """Fetches records and yields their encoded images, after the checks."""
    firsts = rows["image_offset"] - tfrecord.HEADER_BYTES
    lasts = (firsts + rows["image_length"]).tolist()
    lengths = (rows["length"] - tfrecord.HEADER_BYTES).tolist()
    # One by one: a record stays in the processor's cache until it is decoded, and the
    # GIL is held only for a moment.
    for number, (content, length, first, last) in enumerate(
      zip(source.fetch(ids, rows), lengths, firsts.tolist(), lasts, strict=True)
    ):
      if len(content) != length:
        raise self._bad_record(ids[number], "the shard ends inside the record")
      if self._verify_crc and not _is_valid(content):
        raise self._bad_record(ids[number], self._crc_reason(ids[number], rows[number]))
      yield memoryview(content)[first:last]

  def _crc_reason(self, record: int, row: np.void) -> str:
    """Returns the reason why the CRC of a record does not match."""
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    header = self.shards.read_header(shard, int(row["offset"]))
    payload_bytes = int(row["length"]) - tfrecord.HEADER_BYTES - tfrecord.FOOTER_BYTES
    return integrity.describe_corruption(header, payload_bytes)

  def _bad_record(self, record: int, reason: str) -> integrity.BadRecordError:
    """Returns the error that names a record by shard, number and byte.

    Raises:
      errors.DataError: The shard was replaced since it was opened.
      errors.CorruptCopyError: The shard is a corrupt copy.
    """
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    self.shards.check_shard(shard)
    (row,) = self.shards.locate(np.array([record]))
    return integrity.bad_record(
      self.shards.path(shard),
      record=int(record),
      number=int(record - self._numbering.first_ids[shard]),
      offset=int(row["offset"]),
      shard=shard,
      reason=reason,
    )


def _is_valid(content: bytes) -> bool:
  """Says whether `content` is a payload and its CRC."""
  payload, crc = content[: -tfrecord.FOOTER_BYTES], content[-tfrecord.FOOTER_BYTES :]
  return tfrecord.masked_crc(payload) == int.from_bytes(crc, "little")
