"""`manifest.json`: the contents of a folder of shards, and the source of every count.

The dataclasses have the file's structure. They hold no time and no machine's path, so
the same input and seed give the same bytes. `load` checks each value of the JSON by a
rule: a test, and the text for a value that fails it. A field that is added to the
dataclasses needs a rule in the tables at the end.

A selection is a folder with a manifest and index files alone: its shards stay where
they were built, and `Shard.folder` says where. `Shard.path` and `Shard.index_path`
locate a shard's files; `gathered` returns the manifest for a copy of a set in one
folder.
"""

import dataclasses
import itertools
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from facedist import errors, storage

MANIFEST_NAME = "manifest.json"
PAIRS_NAME = "pairs.npy"
RENUMBERED = "renumbered"
FORMAT = "facedist-shards"
FORMAT_VERSION = 1

KINDS = ("classification", "verification")


@dataclasses.dataclass(frozen=True, slots=True)  # there may be a hundred thousand
class Shard:
  """One shard: file names below the folder, size in bytes, CRC-32C of both files.

  Attributes:
    name: The shard's file name.
    records: Rows of the index; in a selection, fewer than the shard has records.
    bytes: Size of the shard's file.
    crc32c: Of the shard's file.
    index_name: The index's file name; it always lies in the manifest's folder.
    index_crc32c: Of the index's file.
    folder: Where the shard lies if not in the manifest's folder: relative to that one,
      or absolute, or gs://. Two shards may then have the same name.
  """

  name: str
  records: int
  bytes: int
  crc32c: int
  index_name: str
  index_crc32c: int
  folder: str | None = None

  def path(self, folder: str) -> str:
    """Returns where the shard lies, for the manifest of `folder`."""
    if self.folder is None:
      return storage.join(folder, self.name)
    return storage.join(_resolve(folder, self.folder), self.name)

  def index_path(self, folder: str) -> str:
    """Returns where the shard's index lies, for the manifest of `folder`."""
    return storage.join(folder, self.index_name)


def _resolve(folder: str, other: str) -> str:
  """Returns the place of `other`, which may be relative to `folder`."""
  if storage.is_bucket(other) or os.path.isabs(other):
    return other
  if not storage.is_bucket(folder):
    return os.path.join(folder, other)
  # An object's name is plain text: ".." in it would mean nothing.
  name = folder.removeprefix(storage.BUCKET_PREFIX)
  return storage.BUCKET_PREFIX + posixpath.normpath(posixpath.join(name, other))


@dataclasses.dataclass(frozen=True)
class Split:
  """The shards of one split ('train', 'val' or 'images'), in record order."""

  records: int
  shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """A verification set's pairs file: int32[pairs, 4] of first, second, same, fold."""

  name: str
  pairs: int
  folds: int
  crc32c: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of shards holds.

  Attributes:
    kind: 'classification' (splits train and val) or 'verification' (split images).
    dataset: Where the images come from, such as vggface2 or lfw.
    tool_version: Version of the builder.
    image_size: Height and width of every image in pixels.
    quality: JPEG quality, 1 to 100.
    alignment: How images were aligned, and how many in each way.
    source: The builder's settings that decide the content (seed, filters); or, of
      shards from elsewhere, `rebuilt_from`, with `labels` if they were renumbered.
    identities: Folder names; the place in this list is the label.
    identity_names: Names of people by folder name, where known.
    splits: The shards by split.
    pairs: The pairs of a verification set.
    skipped: Source images left out, each with `path` and `reason`.
    selection: What a selection holds of which folders; none for a build. Labels and
      identities inside the shards' records are then those of the build, and the
      index's labels count.
  """

  kind: str
  dataset: str
  tool_version: str
  image_size: int
  quality: int
  alignment: dict[str, Any]
  source: dict[str, Any]
  identities: tuple[str, ...]
  identity_names: dict[str, str]
  splits: dict[str, Split]
  pairs: Pairs | None = None
  skipped: tuple[dict[str, str], ...] = ()
  selection: dict[str, Any] | None = None

  @property
  def num_identities(self) -> int:
    """Number of classes."""
    return len(self.identities)

  @property
  def is_relabelled(self) -> bool:
    """Whether the index's labels count, and those inside the records mean nothing."""
    return self.selection is not None or self.source.get("labels") == RENUMBERED

  @property
  def aligned_by(self) -> str | None:
    """How the images were cut: 'arcface', 'centre_crop', … ; None where not known.

    Manifests of earlier versions name the template 'arcface' for any set, so the
    counts decide where there are some.
    """
    counted = self.alignment.get("images")
    if isinstance(counted, dict) and counted:
      return main_alignment(counted)
    template = self.alignment.get("template")
    return None if template is None else str(template)

  @property
  def shards(self) -> list[Shard]:
    """The shards of all splits."""
    return [shard for split in self.splits.values() for shard in split.shards]

  @property
  def fingerprint(self) -> str:
    """Eight hex digits that change with the records, wherever they lie, and labels."""
    shards = self.shards
    parts = [shard.crc32c for shard in shards]
    if self.selection is not None:  # a build's indexes follow from its shards
      parts += [shard.index_crc32c for shard in shards]
    pairs = None if self.pairs is None else dataclasses.asdict(self.pairs)
    content = json.dumps([parts, self.identities, pairs])
    return f"{storage.crc32c_of(content.encode()):08x}"

  def split(self, name: str, folder: str) -> Split:
    """Returns the split of that name.

    Raises:
      errors.DataError: `folder`, whose manifest this is, has no such split.
    """
    if name not in self.splits:
      known = ", ".join(sorted(self.splits))
      raise errors.DataError(f"{folder} has no split {name!r}, only {known}.")
    return self.splits[name]


AS_GIVEN = "as_given"
"""Images that the builder kept as they are; how they were aligned is not known."""
_ALIGNMENTS = {
  "landmarks": "arcface",  # to ArcFace's template of 112 x 112 pixels
  "bounding_box": "bounding_box",
  "centre_crop": "centre_crop",
  "source_bytes_kept": AS_GIVEN,
  "source_size_kept": AS_GIVEN,
}
_MAIN_FRACTION = 0.9


def main_alignment(images: Mapping[str, int]) -> str | None:
  """Returns how a set's images were cut, from the number of images by method.

  Returns:
    The alignment of at least nine images in ten, else 'mixed'; None without images.
  """
  total = sum(images.values())
  if not total:
    return None
  method, most = max(images.items(), key=lambda item: item[1])
  if most < _MAIN_FRACTION * total:
    return "mixed"
  return _ALIGNMENTS.get(method, method)


def alignments_differ(first: str | None, second: str | None) -> bool:
  """Says whether two alignments are known and are not the same."""
  return not {first, second} & {None, AS_GIVEN} and first != second


def gathered(manifest: Manifest) -> Manifest:
  """Returns the manifest for a folder that holds copies of all its files itself.

  The name of a shard from another folder gets its checksum, `0a1b2c3d-NAME`, because
  two such shards may have the same name. The fingerprint stays the same.
  """
  return dataclasses.replace(
    manifest,
    splits={
      name: Split(split.records, tuple(map(_gathered_shard, split.shards)))
      for name, split in manifest.splits.items()
    },
  )


def _gathered_shard(shard: Shard) -> Shard:
  """Returns the entry of a shard that was copied beside its index."""
  if shard.folder is None:
    return shard
  name = f"{shard.crc32c:08x}-{shard.name}"
  return dataclasses.replace(shard, name=name, folder=None)


def name_records(split: Split, ids: np.ndarray, *, max_named: int = 16) -> str:
  """Returns `train-00003-of-00008.tfrecord: 17, 812; …`, in the order of the shards.

  Args:
    split: The split of the records.
    ids: int64[n], in [0, split.records).
    max_named: Records that are named; the others are counted.
  """
  firsts = np.cumsum([0, *(shard.records for shard in split.shards)])
  named = np.sort(ids)[:max_named]
  shards = np.searchsorted(firsts, named, side="right") - 1
  parts = []
  for shard in np.unique(shards):
    numbers = ", ".join(map(str, named[shards == shard] - firsts[shard]))
    parts.append(f"{split.shards[shard].name}: {numbers}")
  more = len(ids) - len(named)
  return "; ".join(parts) + (f" and {more} more" if more else "")


def to_json(manifest: Manifest) -> str:
  """Returns the manifest file's text."""
  content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
  content |= dataclasses.asdict(manifest)
  if manifest.selection is None:  # as versions without selections wrote and read it
    del content["selection"]
  for split in content["splits"].values():
    for shard in split["shards"]:
      if shard["folder"] is None:
        del shard["folder"]
  return json.dumps(content, indent=1) + "\n"


def save(manifest: Manifest, folder: str) -> None:
  """Writes `folder`/manifest.json, atomically."""
  path = storage.join(folder, MANIFEST_NAME)
  storage.write_bytes(path, to_json(manifest).encode())


def load(folder: str) -> Manifest:
  """Reads `folder`/manifest.json.

  Raises:
    errors.DataError: It is missing, not a manifest, of another format version, or
      breaks a rule.
  """
  path = storage.join(folder, MANIFEST_NAME)
  if not storage.exists(path):
    raise errors.DataError(
      f"{path} does not exist; build the shards with python -m tfrecords_tools.build, "
      "or run python -m tfrecords_tools.rebuild_index --manifest on shards from "
      "elsewhere."
    )
  text = storage.read_bytes(path)
  try:
    content = parse_fields(text)
    found = (content.pop("format"), content.pop("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
      shown = ", ".join(map(quote_value, found))
      raise errors.DataError(
        f"{path} has format {shown}, not {FORMAT!r}, {FORMAT_VERSION}; rebuild the "
        "shards with this version."
      )
    check_manifest(content)
  except KeyError as error:
    raise errors.DataError(f"{path} is not a manifest (no {error}); rebuild.") from None
  except ValueError as error:
    storage.refuse_kind(text, path)
    raise errors.DataError(f"{path} is not a manifest ({error}); rebuild.") from error
  return _from_dict(content)


def _from_dict(content: dict[str, Any]) -> Manifest:
  """Builds the nested dataclasses."""
  content["identities"] = tuple(content["identities"])
  content["skipped"] = tuple(content["skipped"])
  content["splits"] = {
    name: Split(split["records"], tuple(Shard(**shard) for shard in split["shards"]))
    for name, split in content["splits"].items()
  }
  if content["pairs"] is not None:
    content["pairs"] = Pairs(**content["pairs"])
  return Manifest(**content)


Rule = tuple[Callable[[Any], bool], str]
MAX_DEPTH = 16  # of nested settings; a hundred times that ends Python's stack
_MAX_COUNT = 2**63 - 1
_MAX_NAME_BYTES = 255  # of a file, on every file system in use


def parse_fields(text: bytes) -> dict[str, Any]:
  """Returns the object that a JSON text holds.

  Raises:
    ValueError: It is no JSON object, holds NaN or infinity, nests too deeply, or
      has a key twice.
  """
  try:
    content = json.loads(
      text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
    )
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error
  if not isinstance(content, dict):
    raise ValueError("it is no JSON object")
  return content


def _refuse_constant(name: str) -> None:
  """Raises ValueError for NaN and infinities, which JSON does not have."""
  raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object; ValueError if a key occurs twice, as readers then differ."""
  content = dict(pairs)
  if len(content) < len(pairs):
    _check_unique((name for name, _ in pairs), place="an object's keys")
  return content


def check_manifest(content: dict[str, Any]) -> None:
  """Checks a manifest without its format and version.

  Raises:
    ValueError: Names the value at fault by its place and says what it must be.
  """
  _check_object(content, _MANIFEST, place="")
  _check_unique(content["identities"], place="identities")
  for name, split in content["splits"].items():
    _check_split(split, place=f"splits.{name}")
  _check_files(content)
  if content["pairs"] is not None:
    _check_object(content["pairs"], _PAIRS, place="pairs.")
  if (content["kind"] == "verification") != (content["pairs"] is not None):
    raise ValueError("it must have pairs if its kind is verification, and else none")
  for number, entry in enumerate(content["skipped"]):
    _check_object(entry, _SKIPPED, place=f"skipped[{number}].")


def _check_split(split: Any, *, place: str) -> None:
  """Checks a split, its shards, and that their records add up."""
  _check_object(split, _SPLIT, place=f"{place}.")
  for number, shard in enumerate(split["shards"]):
    _check_object(shard, _SHARD, place=f"{place}.shards[{number}].")
  counted = sum(shard["records"] for shard in split["shards"])
  if split["records"] != counted:
    raise ValueError(
      f"{place}.records is {split['records']}, its shards have {counted}"
    )


def _check_files(content: dict[str, Any]) -> None:
  """Checks that no file is listed twice; only a selection may use a shard twice."""
  shards = [shard for split in content["splits"].values() for shard in split["shards"]]
  _check_unique((shard["index_name"] for shard in shards), place="shards' index_name")
  if content.get("selection") is None:
    _check_unique((shard["name"] for shard in shards), place="shards' name")


def _check_object(value: Any, rules: dict[str, Rule], *, place: str) -> None:
  """Checks an object's keys and the value of each; `place` ends with a dot."""
  if not isinstance(value, dict):
    raise ValueError(
      f"{place.rstrip('.')} is {quote_value(value)}; it must be an object"
    )
  for name, (is_right, text) in rules.items():
    if name not in value:
      if name in _OPTIONAL:
        continue
      raise ValueError(f"it lacks {place}{name}")
    if not is_right(value[name]):
      raise ValueError(
        f"{place}{name} is {quote_value(value[name])}; it must be {text}"
      )
  for name in value.keys() - rules.keys():
    raise ValueError(f"{place}{name[:80]} is not known")


def _check_unique(names: Iterable[str], *, place: str) -> None:
  """Raises ValueError if a name occurs twice."""
  seen: set[str] = set()
  for name in names:
    if name in seen:
      raise ValueError(f"{place}: {name!r} comes twice")
    seen.add(name)


def quote_value(value: Any) -> str:
  """Returns a value as an error shows it, in one short line."""
  if isinstance(value, dict | list) and len(value) > 0:
    return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
  return ascii(value)[:80]


def _is_text(value: Any) -> bool:
  """Says whether it is text that can be encoded; JSON can hold half a character."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _is_file_name(value: Any) -> bool:
  """Says whether it is the name of a file in the folder: printable, and no path."""
  return (
    _is_text(value)
    and value not in ("", ".", "..")
    and "/" not in value
    and value.isprintable()
    and len(value.encode()) <= _MAX_NAME_BYTES
  )


def _is_folder(value: Any) -> bool:
  """Says whether it can be a shard's folder: a path, relative or not, or gs://."""
  return value is None or (_is_text(value) and value != "" and value.isprintable())


def _is_free_object(value: Any) -> bool:
  """Says whether it is an object that nests no deeper than MAX_DEPTH."""
  level: list[Any] = [value]
  for _ in range(MAX_DEPTH if isinstance(value, dict) else 0):
    values = itertools.chain.from_iterable(
      one.values() if isinstance(one, dict) else one for one in level
    )
    level = [one for one in values if isinstance(one, dict | list)]
  return isinstance(value, dict) and not level


def _between(low: int, high: int) -> Rule:
  """Returns the rule of a whole number; a bool is not one here."""
  return (
    lambda value: type(value) is int and low <= value <= high,
    f"a whole number from {low} to {high}",
  )


def _list_of(is_right: Callable[[Any], bool], text: str) -> Rule:
  """Returns the rule of a list."""
  return lambda value: isinstance(value, list) and all(map(is_right, value)), text


def _object_of(is_right: Callable[[Any], bool], text: str) -> Rule:
  """Returns the rule of an object whose values all pass the same test."""
  return (
    lambda value: (
      isinstance(value, dict)
      and all(map(_is_text, value))
      and all(map(is_right, value.values()))
    ),
    text,
  )


_TEXT: Rule = (_is_text, "text")
_FILE_NAME: Rule = (_is_file_name, "the name of a file in the folder")
_COUNT = _between(0, _MAX_COUNT)
_CRC32C = _between(0, 2**32 - 1)
_FREE: Rule = (_is_free_object, f"an object of at most {MAX_DEPTH} levels")
_ANY: Rule = (lambda value: True, "")
_OPTIONAL = ("folder", "selection")  # which builds do not write
_MANIFEST: dict[str, Rule] = {
  "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
  "dataset": _TEXT,
  "tool_version": _TEXT,
  "image_size": _between(1, 65_500),  # pixels; a JPEG has no more
  "quality": _between(0, 100),  # 0: not known, of shards whose manifest was lost
  "alignment": _FREE,
  "source": _FREE,
  "identities": _list_of(_is_text, "a list of folders' names"),
  "identity_names": _object_of(_is_text, "an object of names by folder"),
  "splits": _object_of(lambda value: isinstance(value, dict), "an object of splits"),
  "pairs": _ANY,
  "skipped": _list_of(lambda value: isinstance(value, dict), "a list of objects"),
  "selection": (
    lambda value: value is None or _is_free_object(value),
    f"an object of at most {MAX_DEPTH} levels",
  ),
}
_SPLIT: dict[str, Rule] = {
  "records": _COUNT,
  "shards": _list_of(lambda value: isinstance(value, dict), "a list of shards"),
}
_SHARD: dict[str, Rule] = {
  "name": _FILE_NAME,
  "records": _COUNT,
  "bytes": _COUNT,
  "crc32c": _CRC32C,
  "index_name": _FILE_NAME,
  "index_crc32c": _CRC32C,
  "folder": (_is_folder, "a folder's path, or gs://"),
}
_PAIRS: dict[str, Rule] = {
  "name": _FILE_NAME,
  "pairs": _COUNT,
  "folds": _COUNT,
  "crc32c": _CRC32C,
}
_SKIPPED: dict[str, Rule] = {"path": _TEXT, "reason": _TEXT}
