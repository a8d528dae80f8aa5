"""Records by number: from ids to JPEGs and labels, and on to a batch of pixels.

What all readers share; `reader` reads from a disk, `stream_reader` from a bucket.

Records by number, from shards on a local disk.
"""

import abc
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from facedist import errors
from facedist.data import decoding
from facedist.data.readers import batch_memory
from facedist.data.samplers import epoch_sampler
from facedist.data.samplers.epoch_sampler import BatchShard
from facedist.data.shards import integrity, manifest, open_files, shard_index, tfrecord


class Ahead(Protocol):
  """What brings batches to where they are read."""

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[None]:
    """Brings the records at positions of one step for the body of a `with`."""


class AtHand:
  """Nothing needs to be brought: every record can be read at any time."""

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[None]:
    """Does nothing."""
    return contextlib.nullcontext()


class RecordReader(abc.ABC):
  """Reads any record of a split by its number, from any thread.

  A record's number is its place in the concatenation of the split's shards. Where the
  bytes come from is for subclasses to say.

  Attributes:
    folder: Where the shards are.
    manifest: What it holds.
    memory: Where the pixels of batches go.
  """

  def __init__(
    self,
    folder: str,
    content: manifest.Manifest,
    split: str,
    *,
    index_of: Callable[[str, Sequence[manifest.Shard]], shard_index.Index],
    verify_crc: bool,
  ):
    """Takes what the folder holds; `index_of` opens the index of its shards."""
    self.folder = folder
    self.manifest = content
    self.memory = batch_memory.BatchMemory()
    self._shards = content.split(split, folder).shards
    self._numbering = shard_index.Numbering(self._shards)
    self._index = index_of(folder, self._shards)
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
      self.folder, self._shards, num_identities=self.manifest.num_identities
    )

  def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Reads encoded images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      The JPEGs, and int32[batch] labels.

    Raises:
      damage.BadRecordError: A record is damaged; names shard, record and byte.
      errors.DataError: A shard was replaced since it was opened.
    """
    rows = self._rows_of(ids)
    labels = self._labels(ids, rows)
    return [bytes(jpeg) for jpeg in self._jpegs(ids, rows)], labels

  def read_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      uint8[batch, image_size, image_size, 3] RGB, upright, from `self.memory`, so
      that TensorFlow takes it over without a copy; and int32[batch] labels.

    Raises:
      damage.BadRecordError: A record is damaged, no JPEG, or not of the set's size.
      errors.DataError: A shard was replaced since it was opened.
    """
    rows = self._rows_of(ids)
    labels = self._labels(ids, rows)
    shape = (self.image_size, self.image_size, 3)
    pixels = self.memory.empty((len(ids), *shape))
    for record, image, jpeg in zip(ids, pixels, self._jpegs(ids, rows), strict=True):
      try:
        decoding.decode_record(jpeg, image)
      except errors.DataError as error:
        raise self._bad_record(record, str(error)) from error
    return pixels, labels

  def ahead(
    self,
    sample_order: epoch_sampler.EpochSampler,
    share: BatchShard,
    *,
    first_step: int,
    end_step: int | None,
  ) -> Ahead:
    """Returns what brings the batches of training; here they are at hand already.

    Args:
      sample_order: Which records make up which step.
      share: This worker's part of each step.
      first_step: The step that training begins with.
      end_step: The step at which it ends, if it does.
    """
    return AtHand()

  def _rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._index.rows_of(ids)

  def _labels(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns int32[n]; BadRecordError for one that no identity has."""
    labels = rows["label"].astype(np.int32)
    wrong = np.flatnonzero((labels < 0) | (labels >= self.manifest.num_identities))
    if wrong.size:
      raise self._bad_record(
        ids[wrong[0]],
        f"its label is {labels[wrong[0]]}, and the manifest has "
        f"{self.manifest.num_identities} identities",
      )
    return labels

  @abc.abstractmethod
  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""

  def _jpegs(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[memoryview]:
    """Yields the encoded images of rows of the index, checked if so asked."""
    firsts = rows["image_offset"] - tfrecord.HEADER_BYTES
    lasts = (firsts + rows["image_length"]).tolist()
    lengths = (rows["length"] - tfrecord.HEADER_BYTES).tolist()
    # One by one: a record stays in the cache from here to the decoder, and other
    # threads wait for the interpreter's lock a moment only.
    for number, (content, length, first, last) in enumerate(
      zip(self._contents(ids, rows), lengths, firsts.tolist(), lasts, strict=True)
    ):
      if len(content) != length:
        raise self._bad_record(ids[number], "the shard ends inside the record")
      if self._verify_crc and not _is_intact(content):
        raise self._not_intact(ids[number], rows[number])
      yield memoryview(content)[first:last]

  @abc.abstractmethod
  def _header(self, shard: int, offset: int) -> bytes:
    """Reads the header of the record that starts at a byte of a shard."""

  def _path(self, shard: int) -> str:
    """Returns where a shard comes from."""
    return self._shards[shard].path(self.folder)

  @abc.abstractmethod
  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was opened."""

  def _not_intact(self, record: int, row: np.void) -> integrity.BadRecordError:
    """Returns the error of a record whose CRC does not match, with the reason."""
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    header = self._header(shard, int(row["offset"]))
    payload_bytes = int(row["length"]) - tfrecord.HEADER_BYTES - tfrecord.FOOTER_BYTES
    return self._bad_record(
      record, integrity.describe_corruption(header, payload_bytes)
    )

  def _bad_record(self, record: int, reason: str) -> integrity.BadRecordError:
    """Returns the error that names a record by shard, number and byte.

    Raises:
      errors.DataError: The shard was replaced since it was opened.
    """
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    self._check_unchanged(shard)
    (row,) = self._index.rows_of(np.array([record]))
    return integrity.bad_record(
      self._path(shard),
      record=int(record),
      number=int(record - self._numbering.first_ids[shard]),
      offset=int(row["offset"]),
      shard=shard,
      reason=reason,
    )


def _is_intact(content: bytes) -> bool:
  """Says whether `content` is a payload and its CRC."""
  payload, crc = content[: -tfrecord.FOOTER_BYTES], content[-tfrecord.FOOTER_BYTES :]
  return tfrecord.masked_crc(payload) == int.from_bytes(crc, "little")


Read = TypeVar("Read")

_WHOLE_INDEX_BYTES = 256 << 20  # 11 million records
_READ_AHEAD = 64  # records; each may hold a file open


class ShardReader(RecordReader):
  """Reads the records of shards on a local disk."""

  def __init__(
    self,
    folder: str,
    split: str,
    *,
    verify_crc: bool = True,
    files: open_files.RemoteFiles | None = None,
  ):
    """Opens the split's shards and their indexes.

    Args:
      folder: A local folder with a manifest; `staging` brings one from a bucket.
      split: 'train', 'val' or 'images'.
      verify_crc: Whether to check the CRC of each record read.
      files: The split's shards where they come from a bucket.

    Raises:
      errors.DataError: A file is missing or not the one that the manifest describes.
    """
    super().__init__(
      folder,
      manifest.load(folder),
      split,
      index_of=_open_index,
      verify_crc=verify_crc,
    )
    self._remote = files
    self._files = files or open_shards(folder, self._shards)
    if files is None and len(self._shards) <= open_files.most_open():
      for shard in range(len(self._shards)):
        self._files.get(shard)

  def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Reads encoded images; see `RecordReader.read`."""
    return self._renewing(super().read, ids)

  def read_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes images; see `RecordReader.read_batch`."""
    return self._renewing(super().read_batch, ids)

  def _renewing(self, read: Callable[[np.ndarray], Read], ids: np.ndarray) -> Read:
    """Reads, again where it was the copy of a shard that was damaged."""
    while True:
      try:
        return read(ids)
      except integrity.BadRecordError as error:
        (shard,) = self._numbering.shards_of(np.array([error.record])).tolist()
        if self._remote is None or not self._remote.renew(shard):
          raise

  def _path(self, shard: int) -> str:
    """Returns where a shard comes from."""
    return super()._path(shard) if self._remote is None else self._remote.source(shard)

  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""
    shards = self._numbering.shards_of(ids).tolist()
    offsets = (rows["offset"] + tfrecord.HEADER_BYTES).tolist()
    lengths = (rows["length"] - tfrecord.HEADER_BYTES).tolist()
    for start in range(0, len(shards), _READ_AHEAD):
      several = slice(start, start + _READ_AHEAD)
      files = [self._files.get(shard) for shard in shards[several]]
      places = list(zip(files, offsets[several], lengths[several], strict=True))
      # The disk fetches all of them at once; costs 0.5 µs where cached.
      for file, offset, length in places:
        os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
      for file, offset, length in places:
        yield os.pread(file.descriptor, length, offset)

  def _header(self, shard: int, offset: int) -> bytes:
    """Reads the header of a record."""
    file = self._files.get(shard)
    return os.pread(file.descriptor, tfrecord.HEADER_BYTES, offset)

  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was opened."""
    if self._remote is not None:
      return  # a copy may be replaced at any time
    integrity.check_unchanged(
      self._shards[shard].path(self.folder), self._files.get(shard).token
    )


def open_shards(folder: str, shards: Sequence[manifest.Shard]) -> open_files.Files:
  """Returns the shards of a local set, each held against the manifest when opened."""
  return open_files.OpenFiles(
    functools.partial(_open_shard, folder, shards), open_files.most_open()
  )


def _open_shard(
  folder: str, shards: Sequence[manifest.Shard], number: int
) -> open_files.OpenFile:
  """Opens a shard; DataError unless it is as long as the manifest says."""
  path = shards[number].path(folder)
  file = open_files.OpenFile(path)
  integrity.check_size(path, file.size, shards[number].bytes)
  return file


def _open_index(folder: str, shards: Sequence[manifest.Shard]) -> shard_index.Index:
  """Holds a small index in memory, and reads the rows of a large one."""
  num_bytes = sum(shard.records for shard in shards) * shard_index.INDEX_DTYPE.itemsize
  if num_bytes <= _WHOLE_INDEX_BYTES:
    return shard_index.WholeIndex(folder, shards)
  return shard_index.RowIndex(folder, shards, most_open=open_files.most_open())
