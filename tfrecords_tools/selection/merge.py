"""Merges several folders of shards: their shards, and the names of their identities.

An identity of one of several inputs is called `PREFIX/name`, or keeps its name and is
merged with those of the same name in other inputs. A table may rename it after that.

Records keep the names they were built with. So the manifest's `selection` has, for
each `Shard.folder`, a prefix and new names: the name inside a record, with the prefix
before it, is looked up there; without an entry it is the selection's name.
"""

import collections
import dataclasses
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index

SPLITS = ("train", "val")
"""In this order records are counted, so of two copies the one in train is first."""
SAME_NAMES = ("separate", "merge")


@dataclasses.dataclass(frozen=True)
class MergeInput:
  """A folder of shards to select from.

  Attributes:
    folder: Where its manifest and indexes lie.
    manifest: Its manifest.
    prefix: What the selection puts before its identities' names.
    names: The selection's name for each of its labels.
  """

  folder: str
  manifest: manifest.Manifest
  prefix: str
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MergePart:
  """A shard of an input.

  Attributes:
    split: 'train' or 'val'.
    source: The input.
    shard: The input's entry for it.
    path: Where the shard lies.
  """

  split: str
  source: MergeInput
  shard: manifest.Shard
  path: str

  def rows(self) -> np.ndarray:
    """Reads its index, INDEX_DTYPE[records].

    Raises:
      errors.DataError: The index is missing, or is not the one of the manifest.
    """
    return shard_index.open_index(
      self.source.folder, self.shard, num_identities=len(self.source.names)
    )


def open_inputs(
  folders: Sequence[str],
  *,
  prefixes: Sequence[str] | None,
  same_names: str,
  renamed: Mapping[str, str],
) -> list[MergeInput]:
  """Reads the manifests and decides the name of each identity.

  Args:
    folders: Folders of training shards, built or selected.
    prefixes: One for each folder; none takes the folders' own names, and no prefix for
      a single folder.
    same_names: 'separate' puts the prefixes before the names; 'merge' leaves the names
      as they are, so that equal ones are one identity.
    renamed: New names by name, after the prefix.

  Raises:
    errors.UsageError: The prefixes are not different for all folders.
    errors.DataError: A folder is no training set, or does not go with the others.
  """
  if prefixes and same_names == "merge":
    raise errors.UsageError(
      f"--prefixes={','.join(prefixes)} would keep apart what "
      "--same_names=merge joins; leave one out."
    )
  made = [manifest.load(folder) for folder in folders]
  _check_alike(folders, made)
  if same_names == "merge" or (len(folders) == 1 and prefixes is None):
    before = [""] * len(folders)
  else:
    bases = prefixes or [_base_name(folder) for folder in folders]
    if len(bases) != len(folders) or len(set(bases)) < len(bases) or not all(bases):
      raise errors.UsageError(
        f"--prefixes={','.join(bases)} must be a different name for each of the "
        f"{len(folders)} folders of --input_dirs."
      )
    before = [f"{base}/" for base in bases]
  return [
    MergeInput(
      folder,
      one,
      prefix,
      tuple(renamed.get(prefix + name, prefix + name) for name in one.identities),
    )
    for folder, one, prefix in zip(folders, made, before, strict=True)
  ]


def parts_of(inputs: Sequence[MergeInput]) -> list[MergePart]:
  """Returns all shards: those of train, input by input, then those of val.

  Raises:
    errors.UsageError: Two inputs hold one shard, and so might hold one record twice.
  """
  parts = [
    MergePart(split, source, shard, shard.path(source.folder))
    for split in SPLITS
    for source in inputs
    if split in source.manifest.splits
    for shard in source.manifest.splits[split].shards
  ]
  holders: dict[str, MergePart] = {}
  for part in parts:
    place = part.path if storage.is_bucket(part.path) else os.path.realpath(part.path)
    other = holders.setdefault(place, part)
    if other is not part:
      raise errors.UsageError(
        f"--input_dirs: {other.source.folder} and {part.source.folder} both hold "
        f"{place}; select from the folder it was built in, once."
      )
  return parts


def _check_alike(folders: Sequence[str], made: Sequence[manifest.Manifest]) -> None:
  """Raises DataError for a folder that is no training set or unlike the first."""
  for folder, one in zip(folders, made, strict=True):
    if one.kind != "classification":
      raise errors.DataError(
        f"{folder} holds a {one.kind} set; select from training sets alone."
      )
    if one.selection is not None and any(shard.folder is None for shard in one.shards):
      raise errors.DataError(
        f"{folder} is a cached copy of a selection; select from the original."
      )
    try:
      names_of(one)
    except errors.DataError as error:
      raise errors.DataError(f"{folder}/{error}") from None
    if one.image_size != made[0].image_size:
      raise errors.DataError(
        f"{folder} has image_size {one.image_size}, but {folders[0]} has "
        f"{made[0].image_size}; build them alike."
      )
    if manifest.alignments_differ(one.aligned_by, made[0].aligned_by):
      raise errors.DataError(
        f"{folder} has alignment {one.aligned_by}, but {folders[0]} has "
        f"{made[0].aligned_by}; build them alike."
      )


def _base_name(folder: str) -> str:
  """Returns the folder's own name."""
  if storage.is_bucket(folder):
    return posixpath.basename(folder.rstrip("/"))
  return os.path.basename(os.path.abspath(folder))


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
  """Returns what a set calls the identities that its records name, by `Shard.folder`.

  That is empty for a build, whose records have its labels, and for the copy of a
  selection that training has cached, which does not know it.

  Raises:
    errors.DataError: The selection does not say how a folder's identities are called.
  """
  named: dict[str | None, FolderNames] = {}
  if made.selection is None:
    return {None: FolderNames(Names())} if made.is_relabelled else named
  for folder in sorted({shard.folder for shard in made.shards if shard.folder}):
    folders = made.selection.get("folders")
    origin = folders.get(folder) if isinstance(folders, dict) else None
    if not _is_origin(origin):
      raise errors.DataError(
        f"{manifest.MANIFEST_NAME}: the selection does not say what the identities of "
        f"{folder} are called; select again to a new folder."
      )
    named[folder] = FolderNames(Names(origin["prefix"], origin["renamed"]))
  return named


def _is_origin(value: Any) -> TypeGuard[dict[str, Any]]:
  """Says whether it is a prefix and new names by name."""
  if not isinstance(value, dict) or not isinstance(value.get("prefix"), str):
    return False
  renamed = value.get("renamed")
  return isinstance(renamed, dict) and all(
    isinstance(name, str) for name in renamed.values()
  )


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


def origins_of(
  parts: Sequence[MergePart], output_dir: str
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


def _origin(part: MergePart) -> dict[str, Any]:
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
