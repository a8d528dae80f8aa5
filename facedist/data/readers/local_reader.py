"""Reads records of shards on a local disk: of a folder, or cached copies."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from facedist.data.readers.record_reader import RecordReader, RecordSource
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest, open_files, shard_index, tfrecord
from facedist.data.shards.open_files import OpenFile, ShardFiles

_WHOLE_INDEX_BYTES = 256 << 20  # 11 million records
_ADVISED_RECORDS = 64  # each may hold a file open


def open_reader(
  folder: str,
  split: str,
  *,
  verify_crc: bool = True,
  files: ShardFiles | None = None,
) -> RecordReader:
  """Opens a split's shards and their indexes on a local disk.

  Args:
    folder: A local folder with a manifest; `staged_dataset` copies one from a bucket.
    split: 'train', 'val' or 'images'.
    verify_crc: Whether to check the CRC of each record read.
    files: The split's shards if they are cached copies.

  Raises:
    errors.DataError: A file is missing or not the one that the manifest describes.
  """
  content = manifest.load(folder)
  shards = content.split(split, folder).shards
  index = _open_index(folder, shards)
  if files is None:
    files = LocalFiles(folder, shards)
    if len(shards) <= open_files.max_open():
      for shard in range(len(shards)):
        files.get(shard)
  return RecordReader(
    folder, content, split, LocalShards(shards, index, files), verify_crc=verify_crc
  )


class LocalFiles:
  """The shards of a local folder, each compared with the manifest when opened."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard]):
    """Opens nothing yet."""
    self._folder, self._shards = folder, shards
    # Not a method, whose reference cycle would keep the files open for longer.
    self._files = open_files.OpenFiles(
      functools.partial(_open_shard, folder, shards), open_files.max_open()
    )

  def get(self, number: int) -> OpenFile:
    """Returns a shard; hold it while you read."""
    return self._files.get(number)

  def path(self, number: int) -> str:
    """Returns a shard's path."""
    return self._shards[number].path(self._folder)

  def check(self, number: int, file: OpenFile) -> None:
    """Raises DataError if a shard was replaced since it was opened as `file`."""
    integrity.check_unchanged(self.path(number), file.token)


class LocalShards:
  """Reads records by (shard, offset, length) from open files."""

  def __init__(
    self,
    shards: Sequence[manifest.Shard],
    index: shard_index.Index,
    files: ShardFiles,
  ):
    self._numbering = shard_index.Numbering(shards)
    self._index, self._files = index, files

  def locate(self, ids: np.ndarray) -> np.ndarray:
    """Returns the index's INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._index.rows_of(ids)

  def fetch(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields the bytes after each record's header: payload and CRC."""
    shards = self._numbering.shards_of(ids).tolist()
    offsets = (rows["offset"] + tfrecord.HEADER_BYTES).tolist()
    lengths = (rows["length"] - tfrecord.HEADER_BYTES).tolist()
    for start in range(0, len(shards), _ADVISED_RECORDS):
      several = slice(start, start + _ADVISED_RECORDS)
      files = [self._files.get(shard) for shard in shards[several]]
      places = list(zip(files, offsets[several], lengths[several], strict=True))
      # The disk then reads all of them at once; it costs 0.5 µs if they are cached.
      for file, offset, length in places:
        os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
      for file, offset, length in places:
        yield os.pread(file.descriptor, length, offset)

  def read_header(self, shard: int, offset: int) -> bytes:
    """Reads the header of the record that starts at a byte of a shard."""
    file = self._files.get(shard)
    return os.pread(file.descriptor, tfrecord.HEADER_BYTES, offset)

  def path(self, shard: int) -> str:
    """Returns a shard's path at its source."""
    return self._files.path(shard)

  def check_shard(self, shard: int) -> None:
    """Raises an error if a shard was replaced, or is a corrupt copy."""
    self._files.check(shard, self._files.get(shard))

  def prefetcher(
    self,
    sampler: EpochSampler,
    batch_shard: BatchShard,
    *,
    first_step: int,
    end_step: int | None,
  ) -> "LocalShards":
    """Returns itself: `cache/prefetch.py` prefetches whole shards."""
    return self

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[RecordSource]:
    """Yields the shards themselves: any record can be read at any time."""
    return contextlib.nullcontext(self)


def _open_shard(folder: str, shards: Sequence[manifest.Shard], number: int) -> OpenFile:
  """Opens a shard; DataError unless it is as long as the manifest says."""
  path = shards[number].path(folder)
  file = OpenFile(path)
  integrity.check_size(path, file.size, shards[number].bytes)
  return file


def _open_index(folder: str, shards: Sequence[manifest.Shard]) -> shard_index.Index:
  """Holds a small index in memory, and reads the rows of a large one."""
  num_bytes = sum(shard.records for shard in shards) * shard_index.INDEX_DTYPE.itemsize
  if num_bytes <= _WHOLE_INDEX_BYTES:
    return shard_index.WholeIndex(folder, shards)
  return shard_index.RowIndex(folder, shards, max_open=open_files.max_open())
