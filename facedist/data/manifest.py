"""`manifest.json`: what a folder of shards holds; the source of every count.

Frozen dataclasses in the file's own shape. No time and no machine's path is in it,
so the same input and seed give the same bytes.

A selection is a folder with a manifest and index files alone: its shards stay where
they were built, and `Shard.folder` says where. Whoever opens a shard asks `Shard.path`
and `Shard.index_path`; who copies a set to one folder takes the manifest that
`gathered` returns.
"""

import dataclasses
import json
import os
import posixpath
from collections.abc import Mapping
from typing import Any

from facedist import errors, storage
from facedist.data import manifest_checks

MANIFEST_NAME = "manifest.json"
PAIRS_NAME = "pairs.npy"
RENUMBERED = "renumbered"
FORMAT = "facedist-shards"
FORMAT_VERSION = 1


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
      or absolute, or gs://. Two shards of a manifest may then share a name.
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
"""The alignment of images that the builder kept as they are: it cannot know more."""

_ALIGNMENTS = {
  "landmarks": "arcface",  # to ArcFace's template of 112 x 112 pixels
  "bounding_box": "bounding_box",
  "centre_crop": "centre_crop",
  "source_bytes_kept": AS_GIVEN,
  "source_size_kept": AS_GIVEN,
}
_MAIN_SHARE = 0.9


def main_alignment(images: Mapping[str, int]) -> str | None:
  """Returns how a set's images were cut, from the number of images by method.

  Returns:
    The alignment of at least nine images in ten, else 'mixed'; None without images.
  """
  total = sum(images.values())
  if not total:
    return None
  method, most = max(images.items(), key=lambda item: item[1])
  if most < _MAIN_SHARE * total:
    return "mixed"
  return _ALIGNMENTS.get(method, method)


def alignments_differ(first: str | None, second: str | None) -> bool:
  """Says whether two alignments are known and are not the same."""
  return not {first, second} & {None, AS_GIVEN} and first != second


def gathered(manifest: Manifest) -> Manifest:
  """Returns the manifest for a folder that holds copies of all its files itself.

  A shard from elsewhere is then called by its checksum too, `0a1b2c3d-NAME`, since two
  may share a name. The fingerprint stays the same.
  """
  return dataclasses.replace(
    manifest,
    splits={
      name: Split(split.records, tuple(map(_gathered_shard, split.shards)))
      for name, split in manifest.splits.items()
    },
  )


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
  """Writes `folder`/manifest.json, at once."""
  path = storage.join(folder, MANIFEST_NAME)
  storage.write_bytes(path, to_json(manifest).encode())


def load(folder: str) -> Manifest:
  """Reads `folder`/manifest.json.

  Raises:
    errors.DataError: It is missing, no manifest, of another format version, or says
      what cannot be (`manifest_checks`).
  """
  path = storage.join(folder, MANIFEST_NAME)
  if not storage.exists(path):
    raise errors.DataError(
      f"{path} does not exist; build the shards with python -m tfrecords_tools.build, "
      "or run python -m tfrecords_tools.index --manifest on shards from elsewhere."
    )
  text = storage.read_bytes(path)
  try:
    content = manifest_checks.parse(text)
    found = (content.pop("format"), content.pop("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
      shown = ", ".join(map(manifest_checks.shown, found))
      raise errors.DataError(
        f"{path} has format {shown}, not {FORMAT!r}, {FORMAT_VERSION}; rebuild the "
        "shards with this version."
      )
    manifest_checks.check(content)
  except KeyError as error:
    raise errors.DataError(f"{path} is not a manifest (no {error}); rebuild.") from None
  except ValueError as error:
    storage.refuse_kind(text, path)
    raise errors.DataError(f"{path} is not a manifest ({error}); rebuild.") from error
  return _from_dict(content)


def _gathered_shard(shard: Shard) -> Shard:
  """Returns the entry of a shard that was copied beside its index."""
  if shard.folder is None:
    return shard
  name = f"{shard.crc32c:08x}-{shard.name}"
  return dataclasses.replace(shard, name=name, folder=None)


def _resolve(folder: str, other: str) -> str:
  """Returns the place of `other`, which may be relative to `folder`."""
  if storage.is_bucket(other) or os.path.isabs(other):
    return other
  if not storage.is_bucket(folder):
    return os.path.join(folder, other)
  # An object's name is plain text: ".." in it would mean nothing.
  name = folder.removeprefix(storage.BUCKET_PREFIX)
  return storage.BUCKET_PREFIX + posixpath.normpath(posixpath.join(name, other))


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
