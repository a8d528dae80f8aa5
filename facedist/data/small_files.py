"""What a set has besides its shards: indexes, pairs and the manifest, fetched first."""

import os
from concurrent import futures

from facedist import errors, storage
from facedist.data import file_locks, manifest

_DOWNLOADS = 8


def bring(source: str, folder: str, content: manifest.Manifest) -> None:
  """Brings all files of a set but its shards, then its manifest, to a local folder.

  One process of a host does, and the others wait for it.

  Args:
    source: A folder with a manifest, in a bucket or with shards in one.
    folder: The local folder.
    content: The manifest of `source`.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  copies = manifest.gathered(content)
  files = [
    (shard.index_path(source), copy.index_path(folder), shard.index_crc32c)
    for shard, copy in zip(content.shards, copies.shards, strict=True)
  ]
  if content.pairs is not None:
    name = content.pairs.name
    pairs = storage.join(source, name), storage.join(folder, name)
    files.append((*pairs, content.pairs.crc32c))
  path = os.path.join(folder, "small_files")
  lock = file_locks.open_locked(path, file_locks.ALONE, wait=True)
  try:
    with futures.ThreadPoolExecutor(_DOWNLOADS) as pool:
      missing = [file for file in files if not os.path.exists(file[1])]
      for job in [pool.submit(_copy, *file) for file in missing]:
        job.result()
    manifest.save(copies, folder)
  finally:
    if lock is not None:
      os.close(lock)


def _copy(source: str, path: str, crc32c: int) -> None:
  """Copies a small file that the manifest describes."""
  content = storage.read_bytes(source)
  if storage.crc32c_of(content) != crc32c:
    raise errors.DataError(
      f"{source} is not the file that its manifest describes: CRC mismatch; upload the "
      "folder again."
    )
  storage.write_bytes(path, content)
