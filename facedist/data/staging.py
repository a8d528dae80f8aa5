"""Brings a folder of shards from a bucket to a local disk, once."""

import dataclasses
import os
import uuid
from concurrent import futures

from facedist import errors, progress, storage
from facedist.data import manifest

_DOWNLOADS = 8


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
  files = _files(content)
  missing = [name for name in files if not os.path.exists(os.path.join(local, name))]
  total = sum(file.images for file in files.values())
  done = total - sum(files[name].images for name in missing)
  with (
    progress.Progress("staged", total=total, done=done) as shown,
    futures.ThreadPoolExecutor(_DOWNLOADS) as pool,
  ):
    jobs = {
      pool.submit(_fetch, folder, name, local, files[name].crc32c): files[name].images
      for name in missing
    }
    try:
      for job in futures.as_completed(jobs):
        job.result()
        shown.advance(jobs[job])
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  manifest.save(content, local)  # last: a folder with a manifest is whole
  return local


@dataclasses.dataclass(frozen=True)
class _File:
  """What the manifest says of a file; images are counted at the shards alone."""

  crc32c: int
  images: int = 0


def _files(content: manifest.Manifest) -> dict[str, _File]:
  """Returns every file of the set but the manifest, by name."""
  files = {}
  for split in content.splits.values():
    for shard in split.shards:
      files[shard.name] = _File(shard.crc32c, shard.records)
      files[shard.index_name] = _File(shard.index_crc32c)
  if content.pairs is not None:
    files[content.pairs.name] = _File(content.pairs.crc32c)
  return files


def _fetch(folder: str, name: str, local: str, crc32c: int) -> None:
  """Downloads one file; it has its final name only once its content is right."""
  path = os.path.join(local, name)
  unchecked = f"{path}.unchecked-{uuid.uuid4().hex}"
  storage.download(storage.join(folder, name), unchecked)
  if storage.crc32c(unchecked) != crc32c:
    os.remove(unchecked)
    raise errors.DataError(
      f"{storage.join(folder, name)} is not the file that its manifest describes: CRC "
      "mismatch; upload the folder again."
    )
  os.replace(unchecked, path)
