"""The index beside each shard: where every record and its JPEG lie.

`train-00017-of-00256.tfrecord` has `train-00017-of-00256.index.npy`, a NumPy file with
one row of `INDEX_DTYPE` a record, in the shard's order. Other readers of TFRecord files
do not need it.

An index takes 24 bytes a record: 75 MB for VGGFace2, 24 GB for a billion records. The
index of a small set is held in memory (`WholeIndex`). The rows of a large one are read
one by one from a local disk (`RowIndex`), or a shard's index at a time from a bucket
(`CachedIndex`).
"""

import collections
import functools
import io
import math
import os
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Protocol

import numpy as np

from facedist import errors, storage
from facedist.data.shards import integrity, manifest, open_files, tfrecord

INDEX_DTYPE = np.dtype(
  [
    ("offset", "<u8"),  # byte of the shard at which the framed record starts
    ("length", "<u4"),  # bytes of the framed record, header and footer included
    ("image_offset", "<u4"),  # byte of the framed record at which the JPEG starts
    ("image_length", "<u4"),  # bytes of the JPEG
    ("label", "<i4"),
  ]
)


def shard_name(split: str, shard: int, num_shards: int) -> str:
  """Returns `train-00017-of-00256.tfrecord` for ('train', 17, 256)."""
  return f"{split}-{shard:05d}-of-{num_shards:05d}.tfrecord"


def index_name(shard: str) -> str:
  """Returns the name of the index of the shard of that name."""
  return shard.removesuffix(".tfrecord") + ".index.npy"


def to_bytes(rows: np.ndarray) -> bytes:
  """Returns the index file's content for INDEX_DTYPE[records]."""
  stream = io.BytesIO()
  np.save(stream, rows.astype(INDEX_DTYPE, copy=False), allow_pickle=False)
  return stream.getvalue()


def num_bytes(records: int) -> int:
  """Returns the index file's size for so many records."""
  return len(to_bytes(np.empty(0, INDEX_DTYPE))) + records * INDEX_DTYPE.itemsize


def load(path: str) -> np.ndarray:
  """Reads an index file.

  Returns:
    INDEX_DTYPE[records].

  Raises:
    errors.DataError: The file is missing or not an index.
  """
  return from_bytes(storage.read_bytes(path), path)


def from_bytes(content: bytes, path: str) -> np.ndarray:
  """Reads the content of the index file `path`, as `load` does."""
  try:
    rows = parse_array(content)
  except ValueError as error:
    storage.refuse_kind(content, path)
    raise errors.DataError(
      f"{path} is not a shard index ({error}); rebuild it."
    ) from error
  if rows.dtype != INDEX_DTYPE or rows.ndim != 1:
    raise errors.DataError(f"{path} is not a shard index: other columns; rebuild it.")
  return rows


_MAX_HEADER_BYTES = (
  1000  # an index's has 160; Python parses it, which may recurse deeply
)

HEADER_PARSER = threading.Lock()
"""Held while NumPy reads a header: Python 3.11's ast.literal_eval, which it uses, may
fail in two threads at once (CPython issue 106905)."""


def parse_array(content: bytes) -> np.ndarray:
  """Returns the array in a NumPy file's content.

  Unlike np.load, it does not allocate the size that a header claims and does not unpack
  archives: the header must match the bytes.

  Raises:
    ValueError: It is not such a file, or longer or shorter than its header says.
  """
  stream = io.BytesIO(content)
  try:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
      raise ValueError(f"version {version} of the format")
    with HEADER_PARSER:
      # NumPy's own stubs do not know this keyword.
      shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(
        stream,
        max_header_size=_MAX_HEADER_BYTES,  # type: ignore[call-arg]
      )
  except Exception as error:  # a corrupt header fails anywhere in Python's parser
    raise ValueError(" ".join(str(error).split())[:100] or "no header") from error
  start = stream.tell()
  size = math.prod(shape) * dtype.itemsize
  if fortran_order or dtype.hasobject or min(shape, default=0) < 0:
    raise ValueError("not plain numbers in C order")
  if size != len(content) - start:
    raise ValueError(f"{len(content) - start} bytes where the header says {size}")
  return np.frombuffer(content, dtype, offset=start).reshape(shape).copy()


def check_fits(
  rows: np.ndarray, *, path: str, shard_bytes: int, identities: int = 2**31
) -> None:
  """Checks that the places in an index are inside the shard.

  Args:
    rows: INDEX_DTYPE[records].
    path: The index, for the error.
    shard_bytes: Size of its shard.
    identities: Number of labels.

  Raises:
    errors.DataError: A row points outside its shard or record, or at no identity.
  """
  ends = rows["image_offset"].astype(np.uint64) + rows["image_length"]
  rules = (
    (rows["length"] < tfrecord.HEADER_BYTES + tfrecord.FOOTER_BYTES, "is no record"),
    (rows["length"] > shard_bytes, "lies outside the shard"),
    # The second rule keeps this difference from wrapping around.
    (
      rows["offset"] > np.uint64(shard_bytes) - rows["length"].astype(np.uint64),
      "lies outside the shard",
    ),
    (rows["image_offset"] < tfrecord.HEADER_BYTES, "has its image outside"),
    (ends + tfrecord.FOOTER_BYTES > rows["length"], "has its image outside"),
    ((rows["label"] < 0) | (rows["label"] >= identities), "has no identity's label"),
  )
  for broken, text in rules:
    if broken.any():
      number = int(np.argmax(broken))
      raise errors.DataError(
        f"{path}: record {number}, {rows[number].tolist()}, {text} (of {shard_bytes} "
        f"bytes and {identities} identities); rebuild it."
      )


def open_index(
  folder: str, shard: manifest.Shard, *, num_identities: int = 2**31
) -> np.ndarray:
  """Reads a shard's index, local or from a bucket, as INDEX_DTYPE[records].

  Raises:
    errors.DataError: It is missing, not the manifest's, or has a label that is not
      below `num_identities`.
  """
  return _load_verified(folder, shard, num_identities=num_identities)[1]


def content(folder: str, shard: manifest.Shard) -> bytes:
  """Returns the index file of a shard, verified as by `open_index`."""
  return _load_verified(folder, shard, num_identities=2**31)[0]


def _load_verified(
  folder: str, shard: manifest.Shard, *, num_identities: int
) -> tuple[bytes, np.ndarray]:
  """Reads a shard's index: the file and its rows; DataError unless it is valid."""
  path = shard.index_path(folder)
  with integrity.missing_is_named(path):
    content = storage.read_bytes(path)
  rows = from_bytes(content, path)
  checksum = storage.crc32c_of(content)
  if (checksum, len(rows)) != (shard.index_crc32c, shard.records):
    with integrity.missing_is_named(shard.path(folder)):
      size = storage.size(shard.path(folder))
    integrity.check_index(path, rows, shard, checksum=checksum, size=size)
  check_fits(rows, path=path, shard_bytes=shard.bytes, identities=num_identities)
  return content, rows


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
    rows = open_index(folder, shard, num_identities=num_identities)
    found.append(rows["label"].astype(np.int32))
  return np.concatenate(found)


class Index(Protocol):
  """Where records lie, by their numbers."""

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""


class Numbering:
  """Numbers the records of a split through its shards, in order."""

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
  """An index that is held in memory, for a set with few enough records."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard]):
    """Loads the index of every shard; DataError unless they are the manifest's."""
    rows = [open_index(folder, shard) for shard in shards]
    self._rows = np.concatenate([np.zeros(0, INDEX_DTYPE), *rows])

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._rows[ids]


class RowIndex:
  """An index on a local disk whose rows are read one by one, each in a microsecond."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard], *, max_open: int):
    """Opens nothing yet; at most about `max_open` files at a time later."""
    self._numbering = Numbering(shards)
    self._files = open_files.OpenFiles(
      functools.partial(_open_checked, folder, shards, bytearray(len(shards))),
      max_open,
    )

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    shards = self._numbering.shards_of(ids)
    size = INDEX_DTYPE.itemsize
    # The rows end where the file does; how long its header is does not matter.
    before_end = (self._numbering.first_ids[shards + 1] - ids) * size
    content = []
    for shard, distance in zip(shards.tolist(), before_end.tolist(), strict=True):
      file = self._files.get(shard)
      content.append(os.pread(file.descriptor, size, file.size - distance))
    return np.frombuffer(b"".join(content), INDEX_DTYPE)


def _open_checked(
  folder: str, shards: Sequence[manifest.Shard], checked: bytearray, number: int
) -> open_files.OpenFile:
  """Opens the index of a shard; checks it unless it was opened before."""
  if not checked[number]:
    open_index(folder, shards[number])
    checked[number] = 1
  return open_files.OpenFile(shards[number].index_path(folder))


class CachedIndex:
  """An index, local or in a bucket; the shards used last are held in memory."""

  def __init__(self, folder: str, shards: Sequence[manifest.Shard], *, max_bytes: int):
    """Loads nothing yet; later holds about `max_bytes`, at least one shard's index."""
    self._folder, self._shards = folder, shards
    self._numbering = Numbering(shards)
    self._max_bytes, self._bytes = max_bytes, 0
    self._loaded: collections.OrderedDict[int, futures.Future] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    rows = np.zeros(len(ids), INDEX_DTYPE)
    shards = self._numbering.shards_of(ids)
    for shard in np.unique(shards).tolist():
      mine = shards == shard
      rows[mine] = self._rows(shard)[ids[mine] - self._numbering.first_ids[shard]]
    return rows

  def _rows(self, shard: int) -> np.ndarray:
    """Returns the index of a shard; if several threads need it, one loads it."""
    with self._lock:
      found = self._loaded.get(shard)
      rows = self._loaded.setdefault(shard, futures.Future())
      self._loaded.move_to_end(shard)
      if found is None:
        self._bytes += self._bytes_of(shard)
      while self._bytes > self._max_bytes and len(self._loaded) > 1:
        self._bytes -= self._bytes_of(self._loaded.popitem(last=False)[0])
    if found is None:
      try:
        rows.set_result(open_index(self._folder, self._shards[shard]))
      except Exception as error:  # raised in every thread that waits for the rows
        rows.set_exception(error)
    return rows.result()

  def _bytes_of(self, shard: int) -> int:
    """Returns the size of a shard's index."""
    return self._shards[shard].records * INDEX_DTYPE.itemsize
