"""Records by number, from shards on a local disk."""

import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from facedist.data import damage, indexes, manifest, open_files, records, shard_index
from facedist.data.record_reader import RecordReader

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
    files: open_files.Files | None = None,
  ):
    """Opens the split's shards and their indexes.

    Args:
      folder: A local folder with a manifest; `staging` brings one from a bucket.
      split: 'train', 'val' or 'images'.
      verify_crc: Whether to check the CRC of each record read.
      files: The split's shards where they are not all in the folder yet.

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
    self._files = files or open_files.OpenFiles(
      functools.partial(_open_shard, folder, self._shards), open_files.most_open()
    )
    if files is None and len(self._shards) <= open_files.most_open():
      for shard in range(len(self._shards)):
        self._files.get(shard)

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
    damage.check_unchanged(
      self._shards[shard].path(self.folder), self._files.get(shard).token
    )


def _open_shard(
  folder: str, shards: Sequence[manifest.Shard], number: int
) -> open_files.OpenFile:
  """Opens a shard; DataError unless it is as long as the manifest says."""
  path = shards[number].path(folder)
  file = open_files.OpenFile(path)
  damage.check_size(path, file.size, shards[number])
  return file


def _open_index(folder: str, shards: Sequence[manifest.Shard]) -> indexes.Index:
  """Holds a small index in memory, and reads the rows of a large one."""
  num_bytes = sum(shard.records for shard in shards) * shard_index.INDEX_DTYPE.itemsize
  if num_bytes <= _WHOLE_INDEX_BYTES:
    return indexes.WholeIndex(folder, shards)
  return indexes.RowIndex(folder, shards, most_open=open_files.most_open())
