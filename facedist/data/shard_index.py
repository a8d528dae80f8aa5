"""The index beside each shard: where every record and its JPEG lie.

`train-00017-of-00256.tfrecord` has `train-00017-of-00256.index.npy`, a NumPy file
with one row of `INDEX_DTYPE` a record, in the shard's order. Others never need it.
"""

import io

import numpy as np

from facedist import errors, storage

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
    rows = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as error:  # a damaged header fails anywhere in NumPy's parser
    raise errors.DataError(
      f"{path} is not a shard index ({error}); rebuild it."
    ) from error
  if not isinstance(rows, np.ndarray) or rows.dtype != INDEX_DTYPE or rows.ndim != 1:
    raise errors.DataError(f"{path} is not a shard index: other columns; rebuild it.")
  return rows
