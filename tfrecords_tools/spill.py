"""Images by the rank of a key, kept on disk: memory does not grow with their number.

Images come in any order of key and are appended to one file without a name, a block at
a time, each block sorted into 256 buckets by the key's top byte. A shard is a range of
ranks; only the buckets that it touches are read and sorted.
"""

import dataclasses
import itertools
import os
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np

from facedist import errors
from tfrecords_tools import source

IMAGES_A_BLOCK = 1 << 16
_BUCKETS = 256
_BUCKET_SHIFT = np.uint64(56)


@dataclasses.dataclass(frozen=True)
class Images:
  """Some images in their final order: `source.ROW_DTYPE[images]` and their paths."""

  rows: np.ndarray
  paths: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Block:
  """Where a block lies in the file.

  Attributes:
    rows: int64[buckets + 1] bytes at which each bucket's rows start.
    paths: int64[buckets + 1] bytes at which each bucket's paths start.
  """

  rows: np.ndarray
  paths: np.ndarray


class Spill:
  """Images by the rank of their key.

  Args:
    scratch_dir: Where the file lies; None is the system's temporary folder.
    counts_only: Whether to count the images and keep none.
  """

  def __init__(
    self, *, scratch_dir: str | None = None, counts_only: bool = False
  ) -> None:
    self.num_images = 0
    self._counts_only = counts_only
    self._scratch_dir = scratch_dir
    self._waiting: list[tuple[np.ndarray, Sequence[str]]] = []
    self._num_waiting = 0
    self._blocks: list[_Block] = []
    self._end = 0
    self._held = -1, np.empty(0, source.ROW_DTYPE), list[bytes]()
    if not counts_only:
      self._file = tempfile.TemporaryFile(dir=scratch_dir)  # noqa: SIM115
      weakref.finalize(self, self._file.close)

  def add(self, rows: np.ndarray, paths: Sequence[str]) -> None:
    """Takes some images.

    Args:
      rows: source.ROW_DTYPE[images] with their keys.
      paths: Their paths.
    """
    self.num_images += len(rows)
    if self._counts_only:
      return
    self._waiting.append((rows, paths))
    self._num_waiting += len(rows)
    if self._num_waiting >= IMAGES_A_BLOCK:
      self._flush()

  def ranked(self, first: int, count: int) -> Images:
    """Returns `count` images from rank `first` on; those of one key as they came."""
    self._flush()
    ends = np.cumsum(self._counts())
    parts, paths = [np.empty(0, source.ROW_DTYPE)], list[str]()
    bucket = int(np.searchsorted(ends, first, side="right"))
    while count > 0:
      if self._held[0] != bucket:  # shards that follow each other share one
        self._held = bucket, *self._read_bucket(bucket)
      _, rows, encoded = self._held
      skipped = first - (int(ends[bucket]) - len(rows))
      parts.append(rows[skipped : skipped + count])
      paths += [path.decode() for path in encoded[skipped : skipped + count]]
      first, count = first + len(parts[-1]), count - len(parts[-1])
      bucket += 1
    return Images(np.concatenate(parts), paths)

  def _counts(self) -> np.ndarray:
    """Returns int64[buckets] images."""
    size = source.ROW_DTYPE.itemsize
    total = np.zeros(_BUCKETS, np.int64)
    for block in self._blocks:
      total += np.diff(block.rows) // size
    return total

  def _flush(self) -> None:
    """Writes what waits as a block."""
    if not self._waiting:
      return
    rows = np.concatenate([rows for rows, _ in self._waiting])
    paths = [path.encode() for _, some in self._waiting for path in some]
    self._waiting, self._num_waiting = [], 0
    rows["path_bytes"] = np.fromiter(map(len, paths), np.uint32, len(paths))
    buckets = (rows["key"] >> _BUCKET_SHIFT).astype(np.intp)
    order = np.argsort(buckets, kind="stable")
    rows = rows[order]
    path_bytes = np.bincount(buckets[order], rows["path_bytes"], minlength=_BUCKETS)
    self._blocks.append(
      _Block(
        self._starts(np.bincount(buckets, minlength=_BUCKETS) * rows.itemsize),
        self._starts(path_bytes.astype(np.int64)),
      )
    )
    try:
      self._file.write(rows.tobytes())
      self._file.write(b"".join([paths[row] for row in order.tolist()]))
      self._file.flush()
    except OSError as error:
      folder = self._scratch_dir or tempfile.gettempdir()
      raise errors.DataError(
        f"--scratch_dir={folder}: {error.strerror} after {self._end:,} bytes of the "
        "plan, which needs about 100 an image; name a folder on a larger disk."
      ) from error

  def _starts(self, sizes: np.ndarray) -> np.ndarray:
    """Returns int64[n + 1] places in the file of n parts to be written next."""
    starts = self._end + np.concatenate([[0], np.cumsum(sizes)])
    self._end = int(starts[-1])
    return starts

  def _read_bucket(self, bucket: int) -> tuple[np.ndarray, list[bytes]]:
    """Returns a bucket's rows and paths by key."""
    rows = np.frombuffer(
      b"".join(self._pread(block.rows, bucket) for block in self._blocks),
      source.ROW_DTYPE,
    )
    content = b"".join(self._pread(block.paths, bucket) for block in self._blocks)
    ends = itertools.accumulate(rows["path_bytes"].tolist(), initial=0)
    paths = [content[start:end] for start, end in itertools.pairwise(ends)]
    order = np.argsort(rows["key"], kind="stable")
    return rows[order], [paths[row] for row in order.tolist()]

  def _pread(self, starts: np.ndarray, bucket: int) -> bytes:
    """Reads a bucket's part of a block."""
    start, end = int(starts[bucket]), int(starts[bucket + 1])
    return os.pread(self._file.fileno(), end - start, start) if end > start else b""
