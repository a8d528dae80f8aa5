"""What a selection calls the identities that its shards' records name otherwise.

The manifest's `selection` has, by the folder of shards as `Shard.folder` names it, a
prefix and what was renamed. The name inside a record, with the prefix before it, is
looked up there; without an entry it is the selection's name.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from facedist import errors
from facedist.data import manifest


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
