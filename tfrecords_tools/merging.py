"""Several folders of shards seen as one set: whose faces, under which names, where.

An identity of one of several sources is called `PREFIX/name`, or keeps its name and is
one with those of the same name elsewhere. A table may rename it after that.
"""

import dataclasses
import os
import posixpath
from collections.abc import Mapping, Sequence

import numpy as np

from facedist import errors, storage
from facedist.data import manifest, shard_index
from tfrecords_tools import record_names

SPLITS = ("train", "val")
"""In this order records are counted, so of two copies the one in train is first."""
SAME_NAMES = ("separate", "merge")


@dataclasses.dataclass(frozen=True)
class Input:
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
class Part:
  """A shard of an input.

  Attributes:
    split: 'train' or 'val'.
    source: The input.
    shard: The input's entry for it.
    path: Where the shard lies.
  """

  split: str
  source: Input
  shard: manifest.Shard
  path: str

  def rows(self) -> np.ndarray:
    """Reads its index, INDEX_DTYPE[records].

    Raises:
      errors.DataError: The index is missing, or is not the one of the manifest.
    """
    path = self.shard.index_path(self.source.folder)
    content = storage.read_bytes(path)
    rows = shard_index.load(path)
    if (
      storage.crc32c_of(content) != self.shard.index_crc32c
      or len(rows) != self.shard.records
      or (rows["label"].astype(np.uint32) >= len(self.source.names)).any()
    ):
      raise errors.DataError(
        f"{path} is not the index of its manifest; copy the folder again or rebuild it."
      )
    return rows


def open_inputs(
  folders: Sequence[str],
  *,
  prefixes: Sequence[str] | None,
  same_names: str,
  renamed: Mapping[str, str],
) -> list[Input]:
  """Reads the manifests and settles what each identity is called.

  Args:
    folders: Folders of training shards, built or selected.
    prefixes: One for each folder; none takes the folders' own names, and no prefix for
      a single folder.
    same_names: 'separate' puts the prefixes before the names; 'merge' leaves the names
      as they are, so that equal ones are one identity.
    renamed: New names by name, after the prefix.

  Raises:
    errors.UsageError: The prefixes do not tell the folders apart.
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
    Input(
      folder,
      one,
      prefix,
      tuple(renamed.get(prefix + name, prefix + name) for name in one.identities),
    )
    for folder, one, prefix in zip(folders, made, before, strict=True)
  ]


def parts_of(inputs: Sequence[Input]) -> list[Part]:
  """Returns all shards: those of train, input by input, then those of val.

  Raises:
    errors.UsageError: Two inputs hold one shard, and so might hold one record twice.
  """
  parts = [
    Part(split, source, shard, shard.path(source.folder))
    for split in SPLITS
    for source in inputs
    if split in source.manifest.splits
    for shard in source.manifest.splits[split].shards
  ]
  holders: dict[str, Part] = {}
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
      record_names.names_of(one)
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
