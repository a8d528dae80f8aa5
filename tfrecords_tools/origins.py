"""Where a selection's shards come from, as its manifest says it (`record_names`)."""

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from facedist import errors, storage
from tfrecords_tools import merging


def location(path: str, output_dir: str) -> str:
  """Returns how a selection in `output_dir` names the folder of the shard at `path`.

  Relative where both lie in one bucket or below one folder of a disk, so that they can
  be moved together; else in full.

  Raises:
    errors.UsageError: The selection is in a bucket and the shard is not.
  """
  if not storage.is_bucket(path):
    if storage.is_bucket(output_dir):
      raise errors.UsageError(
        f"--output_dir={output_dir} is in a bucket, but {path} is on this machine's "
        "disk, where others cannot read it; copy the shards to the bucket first."
      )
    folder = os.path.dirname(os.path.realpath(path))
    base = os.path.realpath(output_dir)
    is_near = os.path.commonpath([folder, base]) != os.path.sep
    return os.path.relpath(folder, base) if is_near else folder
  folder = posixpath.dirname(path)
  bucket, name = _bucket_and_name(folder)
  other_bucket, base = _bucket_and_name(output_dir)
  if bucket == other_bucket:
    return posixpath.relpath(f"/{name}", f"/{base}")
  return folder


def describe(
  parts: Sequence[merging.Part], output_dir: str
) -> dict[str, dict[str, Any]]:
  """Returns the prefix and the renamings for each folder of shards.

  Raises:
    errors.UsageError: Two selections name the identities of one folder differently, or
      the selection is in a bucket and a shard is not.
  """
  described: dict[str, dict[str, Any]] = {}
  for part in parts:
    origin = _origin(part)
    folder = location(part.path, output_dir)
    before = described.setdefault(folder, origin)
    if before != origin:
      raise errors.UsageError(
        f"--input_dirs name the identities of {folder} in two ways; select from that "
        "folder itself."
      )
  return described


def _origin(part: merging.Part) -> dict[str, Any]:
  """Describes how the selection names what the shard's folder was built with."""
  source = part.source
  before: dict[str, Any] = {"prefix": "", "renamed": {}}
  if source.manifest.selection is not None and part.shard.folder is not None:
    before = source.manifest.selection["folders"][part.shard.folder]
  prefix = source.prefix + before["prefix"]
  final = dict(zip(source.manifest.identities, source.names, strict=True))
  renamed = {
    source.prefix + old: final[new]
    for old, new in before["renamed"].items()
    if new in final
  }
  for name, new in final.items():
    unchanged = source.prefix + name
    if new != unchanged and name.startswith(before["prefix"]):
      renamed.setdefault(unchanged, new)
  return {"prefix": prefix, "renamed": dict(sorted(renamed.items()))}


def _bucket_and_name(path: str) -> tuple[str, str]:
  """Splits gs://bucket/name."""
  bucket, _, name = path.removeprefix(storage.BUCKET_PREFIX).partition("/")
  return bucket, name
