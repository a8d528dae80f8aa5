"""Records by number, from shards on a local disk."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from facedist.data import damage, indexes, manifest, open_files, records, shard_index
from facedist.data.record_reader import RecordReader

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
      except damage.BadRecordError as error:
        (shard,) = self._numbering.shards_of(np.array([error.record])).tolist()
        if self._remote is None or not self._remote.renew(shard):
          raise

  def _path(self, shard: int) -> str:
    """Returns where a shard comes from."""
    return super()._path(shard) if self._remote is None else self._remote.source(shard)

  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""
    shards = self._numbering.shards_of(ids).tolist()
    offsets = (rows["offset"] + records.HEADER_BYTES).tolist()
    lengths = (rows["length"] - records.HEADER_BYTES).tolist()
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
    return os.pread(file.descriptor, records.HEADER_BYTES, offset)

  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was opened."""
    if self._remote is not None:
      return  # a copy may be replaced at any time
    damage.check_unchanged(
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
  damage.check_size(path, file.size, shards[number].bytes)
  return file


def _open_index(folder: str, shards: Sequence[manifest.Shard]) -> indexes.Index:
  """Holds a small index in memory, and reads the rows of a large one."""
  num_bytes = sum(shard.records for shard in shards) * shard_index.INDEX_DTYPE.itemsize
  if num_bytes <= _WHOLE_INDEX_BYTES:
    return indexes.WholeIndex(folder, shards)
  return indexes.RowIndex(folder, shards, most_open=open_files.most_open())
