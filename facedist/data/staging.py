"""Brings a folder of shards from a bucket to a local disk, once."""

import concurrent.futures
import os
import time

from absl import logging

from facedist import errors, storage
from facedist.data import manifest

_DOWNLOADS = 8
_LOG_SECONDS = 10.0


def stage(folder: str, cache_dir: str) -> str:
  """Returns a local folder that holds what `folder` does.

  A local folder is returned as it is. A bucket's goes to a folder of `cache_dir` named
  by the manifest's fingerprint, so other content never meets it; files that are there
  already are kept, each download is checked against the manifest, and several
  processes may stage at once.

  Args:
    folder: A folder with a manifest, local or gs://.
    cache_dir: Local folder, on a disk with room for the whole set.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  if not storage.is_bucket(folder):
    return folder
  content = manifest.load(folder)
  local = os.path.join(cache_dir, f"{content.dataset}-{content.fingerprint}")
  wanted = _files(content)
  missing = [name for name in wanted if not os.path.exists(os.path.join(local, name))]
  start, logged = time.monotonic(), time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as pool:
    jobs = [pool.submit(_fetch, folder, name, local, wanted[name]) for name in missing]
    for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
      try:
        job.result()
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
      if time.monotonic() - logged > _LOG_SECONDS:
        logged = time.monotonic()
        left = (logged - start) / done * (len(jobs) - done)
        logging.info(
          "%s: staged %d/%d files, %.0f s left", folder, done, len(jobs), left
        )
  manifest.save(content, local)  # last: a folder with a manifest is whole
  return local


def _files(content: manifest.Manifest) -> dict[str, int]:
  """Returns the CRC-32C of every file of the set but the manifest, by name."""
  files = {}
  for split in content.splits.values():
    for shard in split.shards:
      files[shard.name] = shard.crc32c
      files[shard.index_name] = shard.index_crc32c
  if content.pairs is not None:
    files[content.pairs.name] = content.pairs.crc32c
  return files


def _fetch(folder: str, name: str, local: str, crc32c: int) -> None:
  """Downloads one file; it has its final name only once its content is right."""
  path = os.path.join(local, name)
  unchecked = f"{path}.unchecked-{os.getpid()}"
  storage.download(storage.join(folder, name), unchecked)
  if storage.crc32c(unchecked) != crc32c:
    os.remove(unchecked)
    raise errors.DataError(
      f"{storage.join(folder, name)} is not the file that its manifest describes: CRC "
      "mismatch; upload the folder again."
    )
  os.replace(unchecked, path)
