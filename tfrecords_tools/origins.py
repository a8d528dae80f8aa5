"""Where a selection's shards come from, and what their records call its identities.

The manifest's `selection` has, by the folder of shards as `Shard.folder` names it, a
prefix and what was renamed. The name inside a record, with the prefix before it, is
looked up there; without an entry it is the selection's name.
"""

import collections
import dataclasses
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from facedist import errors, storage
from facedist.data import manifest
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


@dataclasses.dataclass(frozen=True)
class Names:
  """What a set calls the identities of one folder's records.

  Attributes:
    prefix: Comes before what the record says.
    renamed: New names by name, after the prefix.
  """

  prefix: str = ""
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def of(self, identity: str) -> str:
    """Returns the set's name for what a record calls `identity`."""
    name = self.prefix + identity
    return self.renamed.get(name, name)


class FolderNames:
  """The names of a folder of shards, cut down to those that a few records need.

  Args:
    names: All of them.
  """

  def __init__(self, names: Names) -> None:
    self._names = names
    self._befores: dict[str, list[str]] = collections.defaultdict(list)
    for old, new in names.renamed.items():
      self._befores[new].append(old)

  def about(self, wanted: Iterable[str]) -> Names:
    """Returns what tells records of the identities `wanted` from all others."""
    renamed = self._names.renamed
    keys = {old for name in wanted for old in (name, *self._befores.get(name, ()))}
    return Names(
      self._names.prefix, {old: renamed[old] for old in keys if old in renamed}
    )


def names_of(made: manifest.Manifest) -> dict[str | None, FolderNames]:
  """Returns what a selection calls its records, by `Shard.folder`.

  That is empty for a build, and for the copy of a selection that training has cached,
  which does not know it.

  Raises:
    errors.DataError: The selection does not say how a folder's identities are called.
  """
  named: dict[str | None, FolderNames] = {}
  if made.selection is None:
    return named
  for folder in sorted({shard.folder for shard in made.shards if shard.folder}):
    try:
      origin = made.selection["folders"][folder]
      names = Names(str(origin["prefix"]), dict(origin["renamed"]))
    except (KeyError, TypeError, ValueError) as error:
      raise errors.DataError(
        f"{manifest.MANIFEST_NAME}: the selection does not say what the identities of "
        f"{folder} are called; select again to a new folder."
      ) from error
    named[folder] = FolderNames(names)
  return named


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
