"""Rows of the index by record number, in memory that does not grow with the set.

A set's index is 24 bytes a record: 75 MB for VGGFace2, 24 GB for a billion records. A
small one is held whole; rows of a large one are read one by one where its files lie on
a disk, and a shard's index at a time where they lie in a bucket.
"""

import collections
import functools
import os
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Protocol

import numpy as np

from facedist import errors, storage
from facedist.data import damage, manifest, open_files, shard_index


class Index(Protocol):
  """Where records lie, by their numbers."""

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""


class Numbering:
  """Record numbers and places in shards: numbers run through a split's shards."""

  def __init__(self, shards: Sequence[manifest.Shard]):
    counts = np.fromiter((shard.records for shard in shards), np.int64, len(shards))
    self.first_ids = np.concatenate([[0], np.cumsum(counts)])

  @property
  def num_records(self) -> int:
    """Records of all shards."""
    return int(self.first_ids[-1])

  def shards_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns int64[n], the shard of each record."""
    return np.searchsorted(self.first_ids, ids, side="right") - 1


class WholeIndex:
  """An index that is held in memory, of a set with few enough records."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard]):
    """Loads the index of every shard; DataError unless they are the manifest's."""
    rows = [load(folder, shard) for shard in shards]
    self._rows = np.concatenate([np.zeros(0, shard_index.INDEX_DTYPE), *rows])

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._rows[ids]


class RowIndex:
  """An index on a local disk whose rows are read one by one, each in a microsecond."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard], *, most_open: int):
    """Opens nothing yet; at most about `most_open` files at a time later."""
    self._numbering = Numbering(shards)
    self._files = open_files.OpenFiles(
      functools.partial(_open_checked, folder, shards, bytearray(len(shards))),
      most_open,
    )

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    shards = self._numbering.shards_of(ids)
    size = shard_index.INDEX_DTYPE.itemsize
    # The rows end where the file does; how long its header is does not matter.
    before_end = (self._numbering.first_ids[shards + 1] - ids) * size
    content = []
    for shard, distance in zip(shards.tolist(), before_end.tolist(), strict=True):
      file = self._files.get(shard)
      content.append(os.pread(file.descriptor, size, file.size - distance))
    return np.frombuffer(b"".join(content), shard_index.INDEX_DTYPE)


class CachedIndex:
  """An index, anywhere, of which the shards used last are held in memory."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard], *, most_bytes: int):
    """Loads nothing yet; holds about `most_bytes` later, one shard at the least."""
    self._folder, self._shards = folder, shards
    self._numbering = Numbering(shards)
    self._most_bytes, self._bytes = most_bytes, 0
    self._loaded: collections.OrderedDict[int, futures.Future] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    rows = np.zeros(len(ids), shard_index.INDEX_DTYPE)
    shards = self._numbering.shards_of(ids)
    for shard in np.unique(shards).tolist():
      mine = shards == shard
      rows[mine] = self._rows(shard)[ids[mine] - self._numbering.first_ids[shard]]
    return rows

  def _rows(self, shard: int) -> np.ndarray:
    """Returns the index of a shard; of several threads that ask, one loads it."""
    with self._lock:
      found = self._loaded.get(shard)
      rows = self._loaded.setdefault(shard, futures.Future())
      self._loaded.move_to_end(shard)
      if found is None:
        self._bytes += self._bytes_of(shard)
      while self._bytes > self._most_bytes and len(self._loaded) > 1:
        self._bytes -= self._bytes_of(self._loaded.popitem(last=False)[0])
    if found is None:
      try:
        rows.set_result(load(self._folder, self._shards[shard]))
      except Exception as error:  # whoever asks for the rows gets it
        rows.set_exception(error)
    return rows.result()

  def _bytes_of(self, shard: int) -> int:
    """Returns the size of a shard's index."""
    return self._shards[shard].records * shard_index.INDEX_DTYPE.itemsize


def _open_checked(
  folder: str, shards: Sequence[manifest.Shard], checked: bytearray, number: int
) -> open_files.OpenFile:
  """Opens the index of a shard; checks it unless it was opened before."""
  if not checked[number]:
    load(folder, shards[number])
    checked[number] = 1
  return open_files.OpenFile(shards[number].index_path(folder))


def labels(
  folder: str, shards: Sequence[manifest.Shard], *, num_identities: int
) -> np.ndarray:
  """Reads the labels of all records, a shard's index at a time, as int32[records].

  Raises:
    errors.DataError: An index is missing, not the manifest's, or has a label that no
      identity has.
  """
  found = [np.zeros(0, np.int32)]
  for shard in shards:
    rows = load_labelled(folder, shard, num_identities=num_identities)
    found.append(rows["label"].astype(np.int32))
  return np.concatenate(found)


def load_labelled(
  folder: str, shard: manifest.Shard, *, num_identities: int
) -> np.ndarray:
  """Reads a shard's index, as `load` does, whose labels are those of identities.

  Raises:
    errors.DataError: It is missing, not the manifest's, or has a label that no identity
      has.
  """
  rows = load(folder, shard)
  if (rows["label"].astype(np.uint32) >= num_identities).any():
    raise errors.DataError(
      f"{shard.index_path(folder)} has labels that are not below the "
      f"{num_identities} identities of the manifest; rebuild it."
    )
  return rows


def load(folder: str, shard: manifest.Shard) -> np.ndarray:
  """Reads a shard's index, local or from a bucket, as INDEX_DTYPE[records].

  Raises:
    errors.DataError: It is missing or not the manifest's.
  """
  return _checked(folder, shard)[1]


def content(folder: str, shard: manifest.Shard) -> bytes:
  """Returns the index file of a shard, held against the manifest as `load` does."""
  return _checked(folder, shard)[0]


def _checked(folder: str, shard: manifest.Shard) -> tuple[bytes, np.ndarray]:
  """Reads a shard's index: the file and its rows; DataError unless it is right."""
  path = shard.index_path(folder)
  with damage.missing_is_named(path):
    content = storage.read_bytes(path)
  rows = shard_index.from_bytes(content, path)
  checksum = storage.crc32c_of(content)
  if (checksum, len(rows)) != (shard.index_crc32c, shard.records):
    with damage.missing_is_named(shard.path(folder)):
      size = storage.size(shard.path(folder))
    damage.check_index(path, rows, shard, checksum=checksum, size=size)
  shard_index.check_fits(rows, path=path, shard_bytes=shard.bytes)
  return content, rows
