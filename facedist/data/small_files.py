"""What a set has besides its shards: indexes, pairs and the manifest, fetched first."""

import functools
import os
from collections.abc import Callable
from concurrent import futures

from facedist import errors, storage
from facedist.data import damage, file_locks, indexes, manifest, shard_index

_DOWNLOADS = 8
_CHECKED_BYTES = 256 << 20  # of indexes, which are then read whole anyway


def bring(source: str, folder: str, content: manifest.Manifest) -> None:
  """Brings all files of a set but its shards, then its manifest, to a local folder.

  One process of a host does, and the others wait for it. A damaged copy that is there
  already is replaced; an index of a very large set only if its length is wrong.

  Args:
    source: A folder with a manifest, in a bucket or with shards in one.
    folder: The local folder.
    content: The manifest of `source`.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  copies = manifest.gathered(content)
  sizes = [shard_index.num_bytes(shard.records) for shard in content.shards]
  with_crc = sum(sizes) <= _CHECKED_BYTES
  path = os.path.join(folder, "small_files")
  lock = file_locks.open_locked(path, file_locks.ALONE, wait=True)
  try:
    with futures.ThreadPoolExecutor(_DOWNLOADS) as pool:
      jobs = [
        pool.submit(
          _bring,
          copy.index_path(folder),
          functools.partial(indexes.content, source, shard),
          size=size,
          crc32c=shard.index_crc32c if with_crc else None,
        )
        for size, shard, copy in zip(sizes, content.shards, copies.shards, strict=True)
      ]
      if content.pairs is not None:
        pairs = functools.partial(read_pairs, source, content.pairs)
        local = storage.join(folder, content.pairs.name)
        jobs.append(pool.submit(_bring, local, pairs, crc32c=content.pairs.crc32c))
      for job in jobs:
        job.result()
    manifest.save(copies, folder)
  finally:
    if lock is not None:
      os.close(lock)


def _bring(
  path: str,
  fetch: Callable[[], bytes],
  *,
  size: int | None = None,
  crc32c: int | None,
) -> None:
  """Fetches a file unless a copy of that size and checksum, where given, is there."""
  if (
    os.path.exists(path)
    and (size is None or storage.size(path) == size)
    and (crc32c is None or storage.crc32c(path) == crc32c)
  ):
    return
  storage.write_bytes(path, fetch())


def read_pairs(folder: str, described: manifest.Pairs) -> bytes:
  """Returns a set's pairs file; DataError unless it is as the manifest describes it."""
  path = storage.join(folder, described.name)
  with damage.missing_is_named(path):
    content = storage.read_bytes(path)
  if storage.crc32c_of(content) != described.crc32c:
    storage.refuse_kind(content, path)
    raise errors.DataError(
      f"{path} is not the manifest's: CRC mismatch; copy the folder again or rebuild."
    )
  return content
