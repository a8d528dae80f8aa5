"""The index beside each shard: where every record and its JPEG lie.

`train-00017-of-00256.tfrecord` has `train-00017-of-00256.index.npy`, a NumPy file
with one row of `INDEX_DTYPE` a record, in the shard's order. Others never need it.
"""

import io
import math

import numpy as np

from facedist import errors, storage
from facedist.data import records

INDEX_DTYPE = np.dtype(
  [
    ("offset", "<u8"),  # byte of the shard at which the framed record starts
    ("length", "<u4"),  # bytes of the framed record, header and footer included
    ("image_offset", "<u4"),  # byte of the framed record at which the JPEG starts
    ("image_length", "<u4"),  # bytes of the JPEG
    ("label", "<i4"),
  ]
)
_MAX_HEADER_BYTES = 1000  # an index's has 160; Python parses it, which may go deep


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


def check_fits(
  rows: np.ndarray, *, path: str, shard_bytes: int, identities: int = 2**31
) -> None:
  """Checks that each record can lie where an index says, before anyone reads there.

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
    (rows["length"] < records.HEADER_BYTES + records.FOOTER_BYTES, "is no record"),
    (rows["length"] > shard_bytes, "lies outside the shard"),
    # The second rule keeps this difference from wrapping around.
    (
      rows["offset"] > np.uint64(shard_bytes) - rows["length"].astype(np.uint64),
      "lies outside the shard",
    ),
    (rows["image_offset"] < records.HEADER_BYTES, "has its image outside"),
    (ends + records.FOOTER_BYTES > rows["length"], "has its image outside"),
    ((rows["label"] < 0) | (rows["label"] >= identities), "has no identity's label"),
  )
  for broken, text in rules:
    if broken.any():
      number = int(np.argmax(broken))
      raise errors.DataError(
        f"{path}: record {number}, {rows[number].tolist()}, {text} (of {shard_bytes} "
        f"bytes and {identities} identities); rebuild it."
      )


def parse_array(content: bytes) -> np.ndarray:
  """Returns the array in a NumPy file's content.

  np.load believes the header: it sets aside whatever size that claims, and unpacks
  archives. Here the header has to match the bytes that are there.

  Raises:
    ValueError: It is no such file, or longer or shorter than its header says.
  """
  stream = io.BytesIO(content)
  try:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
      raise ValueError(f"version {version} of the format")
    # NumPy's own stubs do not know this keyword.
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(
      stream,
      max_header_size=_MAX_HEADER_BYTES,  # type: ignore[call-arg]
    )
  except Exception as error:  # a damaged header fails anywhere in Python's parser
    raise ValueError(" ".join(str(error).split())[:100] or "no header") from error
  start = stream.tell()
  size = math.prod(shape) * dtype.itemsize
  if fortran_order or dtype.hasobject or min(shape, default=0) < 0:
    raise ValueError("not plain numbers in C order")
  if size != len(content) - start:
    raise ValueError(f"{len(content) - start} bytes where the header says {size}")
  return np.frombuffer(content, dtype, offset=start).reshape(shape).copy()
