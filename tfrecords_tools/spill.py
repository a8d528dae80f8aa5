"""Images by the rank of a key, kept on disk: memory does not grow with their number.

Images come in any order of key and are appended to one file without a name, a block at
a time, each block sorted into 256 buckets by the key's top byte. A shard is a range of
ranks; it is read through a window: a bucket or, where that has more images than a
block, as many parts of it, by the key's next byte, as a block has room for.
"""

import dataclasses
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from facedist import errors, storage
from tfrecords_tools import source

IMAGES_A_BLOCK = 1 << 16
_BUCKETS = 256  # and parts of a bucket
_BUCKET_SHIFT, _PART_SHIFT = np.uint64(56), np.uint64(48)
_START_BYTES = 16  # of a bucket in a block's table: where its rows and paths start


@dataclasses.dataclass(frozen=True)
class Images:
  """Some images in their final order: `source.ROW_DTYPE[images]` and their paths."""

  rows: np.ndarray
  paths: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Window:
  """Images from rank `first` on: their rows, and their paths in UTF-8."""

  first: int
  rows: np.ndarray
  paths: Sequence[bytes]


_NO_PARTS = -1, np.empty(0, np.int64)  # of which bucket, and images in each
_NOTHING = _Window(0, np.empty(0, source.ROW_DTYPE), ())


class Spill:
  """Images by the rank of their key.

  Of a block only its place in the file is held: its table, int64[buckets + 1, 2] bytes
  at which each bucket's rows and paths start, goes before them.

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
    self._blocks: list[int] = []
    self._end = 0
    self._bucket_counts = np.zeros(_BUCKETS, np.int64)
    self._parts, self._window = _NO_PARTS, _NOTHING
    if not counts_only:
      with storage.scratch(scratch_dir):
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
    rows, paths = [np.empty(0, source.ROW_DTYPE)], list[str]()
    while count > 0:
      held = self._window
      if not held.first <= first < held.first + len(held.rows):
        self._window = held = self._read_window(first)  # shards in a row share some
      some = slice(first - held.first, first - held.first + count)
      rows.append(held.rows[some])
      paths += [path.decode() for path in held.paths[some]]
      first, count = first + len(rows[-1]), count - len(rows[-1])
    return Images(np.concatenate(rows), paths)

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
    counts = np.bincount(buckets, minlength=_BUCKETS)
    path_bytes = np.bincount(buckets[order], rows["path_bytes"], minlength=_BUCKETS)
    self._bucket_counts += counts
    self._parts, self._window = _NO_PARTS, _NOTHING
    self._blocks.append(self._end)
    self._end += (_BUCKETS + 1) * _START_BYTES
    table = np.stack(
      [self._starts(counts * rows.itemsize), self._starts(path_bytes.astype(np.int64))],
      axis=1,
    )
    try:
      self._file.write(table.tobytes())
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

  def _read_window(self, rank: int) -> _Window:
    """Returns the window with the image of that rank."""
    ends = np.cumsum(self._bucket_counts)
    bucket = int(np.searchsorted(ends, rank, side="right"))
    first = int(ends[bucket] - self._bucket_counts[bucket])
    if self._bucket_counts[bucket] <= IMAGES_A_BLOCK:
      return _Window(first, *self._read(bucket, 0, _BUCKETS))
    if self._parts[0] != bucket:
      self._parts = bucket, self._count_parts(bucket)
    ends = first + np.cumsum(self._parts[1])
    part = int(np.searchsorted(ends, rank, side="right"))
    first = int(ends[part] - self._parts[1][part])
    end = int(np.searchsorted(ends, first + IMAGES_A_BLOCK, side="right"))
    return _Window(first, *self._read(bucket, part, max(end, part + 1)))

  def _count_parts(self, bucket: int) -> np.ndarray:
    """Returns int64[parts], a bucket's images by the next byte of their keys."""
    counts = np.zeros(_BUCKETS, np.int64)
    for rows, _ in self._blocks_of(bucket):
      counts += np.bincount(_part_of(rows), minlength=_BUCKETS)
    return counts

  def _read(self, bucket: int, first: int, end: int) -> tuple[np.ndarray, list[bytes]]:
    """Returns rows and paths of parts [first, end) of a bucket, by key."""
    found, paths = [], list[bytes]()
    for rows, place in self._blocks_of(bucket):
      part = _part_of(rows)
      mine = np.flatnonzero((first <= part) & (part < end))
      lasts = np.cumsum(rows["path_bytes"], dtype=np.int64)
      content = os.pread(self._file.fileno(), int(lasts[-1]), place)
      starts = (lasts - rows["path_bytes"])[mine].tolist()
      paths += [
        content[start:last]
        for start, last in zip(starts, lasts[mine].tolist(), strict=True)
      ]
      found.append(rows[mine])
    rows = np.concatenate(found)
    order = np.argsort(rows["key"], kind="stable")
    return rows[order], [paths[row] for row in order.tolist()]

  def _blocks_of(self, bucket: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields a bucket's rows in each block, and where in the file their paths start."""
    descriptor = self._file.fileno()
    for block in self._blocks:
      entry = os.pread(descriptor, 2 * _START_BYTES, block + bucket * _START_BYTES)
      (start, paths), (end, _) = np.frombuffer(entry, np.int64).reshape(2, 2).tolist()
      if end > start:
        content = os.pread(descriptor, end - start, start)
        yield np.frombuffer(content, source.ROW_DTYPE), paths


def _part_of(rows: np.ndarray) -> np.ndarray:
  """Returns int64[rows], the byte of each key after the top one."""
  return (rows["key"] >> _PART_SHIFT & np.uint64(_BUCKETS - 1)).astype(np.int64)
