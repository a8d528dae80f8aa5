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

  A local folder is returned as it is, unless it is a selection of shards in a bucket.
  A bucket's goes to a folder of `cache_dir` named
  by the manifest's fingerprint, so other content never meets it; files that are there
  already are kept, each download is checked against the manifest, and several
  processes may stage at once.

  Args:
    folder: A folder with a manifest, local or gs://.
    cache_dir: Local folder, on a disk with room for the whole set.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  content = manifest.load(folder)
  paths = [shard.path(folder) for shard in content.shards]
  if not any(map(storage.is_bucket, [folder, *paths])):
    return folder
  local = os.path.join(cache_dir, f"{content.dataset}-{content.fingerprint}")
  files = _files(folder, content)
  missing = [name for name in files if not os.path.exists(os.path.join(local, name))]
  total = sum(file.images for file in files.values())
  done = total - sum(files[name].images for name in missing)
  with (
    progress.Progress("staged", total=total, done=done) as shown,
    futures.ThreadPoolExecutor(_DOWNLOADS) as pool,
  ):
    jobs = {
      pool.submit(_fetch, files[name], os.path.join(local, name)): files[name].images
      for name in missing
    }
    try:
      for job in futures.as_completed(jobs):
        job.result()
        shown.advance(jobs[job])
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  manifest.save(
    manifest.gathered(content), local
  )  # last: a folder with a manifest is whole
  return local


@dataclasses.dataclass(frozen=True)
class _File:
  """Where a file comes from and its checksum; images are counted at shards alone."""

  path: str
  crc32c: int
  images: int = 0


def _files(folder: str, content: manifest.Manifest) -> dict[str, _File]:
  """Returns every file of the set but the manifest, by the name its copy has."""
  files = {}
  copies = manifest.gathered(content).shards
  for shard, copy in zip(content.shards, copies, strict=True):
    files[copy.name] = _File(shard.path(folder), shard.crc32c, shard.records)
    files[copy.index_name] = _File(shard.index_path(folder), shard.index_crc32c)
  if content.pairs is not None:
    path = storage.join(folder, content.pairs.name)
    files[content.pairs.name] = _File(path, content.pairs.crc32c)
  return files


def _fetch(file: _File, copy: str) -> None:
  """Downloads one file; it has its final name only once its content is right."""
  unchecked = f"{copy}.unchecked-{uuid.uuid4().hex}"
  storage.download(file.path, unchecked)
  if storage.crc32c(unchecked) != file.crc32c:
    os.remove(unchecked)
    raise errors.DataError(
      f"{file.path} is not the file that its manifest describes: CRC mismatch; upload "
      "the folder again."
    )
  os.replace(unchecked, copy)
