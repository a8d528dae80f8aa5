"""`manifest.json`: what a folder of shards holds; the source of every count.

Frozen dataclasses in the file's own shape. No time and no machine's path is in it,
so the same input and seed give the same bytes.
"""

import dataclasses
import json
from typing import Any

from facedist import errors, storage

MANIFEST_NAME = "manifest.json"
PAIRS_NAME = "pairs.npy"
FORMAT = "facedist-shards"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard: file names below the folder, size in bytes, CRC-32C of both files."""

  name: str
  records: int
  bytes: int
  crc32c: int
  index_name: str
  index_crc32c: int


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
    source: The builder's settings that decide the content (seed, filters).
    identities: Folder names; the place in this list is the label.
    identity_names: Names of people by folder name, where known.
    splits: The shards by split.
    pairs: The pairs of a verification set.
    skipped: Source images left out, each with `path` and `reason`.
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

  @property
  def num_identities(self) -> int:
    """Number of classes."""
    return len(self.identities)

  @property
  def fingerprint(self) -> str:
    """Eight hex digits that change with the content of any shard or with labels."""
    parts = [shard.crc32c for split in self.splits.values() for shard in split.shards]
    content = json.dumps([parts, self.identities, dataclasses.asdict(self)["pairs"]])
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


def to_json(manifest: Manifest) -> str:
  """Returns the manifest file's text."""
  content = {"format": FORMAT, "format_version": FORMAT_VERSION}
  content |= dataclasses.asdict(manifest)
  return json.dumps(content, indent=1) + "\n"


def save(manifest: Manifest, folder: str) -> None:
  """Writes `folder`/manifest.json, at once."""
  path = storage.join(folder, MANIFEST_NAME)
  storage.write_bytes(path, to_json(manifest).encode())


def load(folder: str) -> Manifest:
  """Reads `folder`/manifest.json.

  Raises:
    errors.DataError: It is missing, no manifest, or of another format version.
  """
  path = storage.join(folder, MANIFEST_NAME)
  if not storage.exists(path):
    raise errors.DataError(
      f"{path} does not exist; build the shards with python -m tfrecords_tools.build."
    )
  try:
    content = json.loads(storage.read_bytes(path))
    found = (content.pop("format"), content.pop("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
      raise errors.DataError(
        f"{path} has format {found}, not {(FORMAT, FORMAT_VERSION)}; rebuild the "
        "shards with this version."
      )
    return _from_dict(content)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.DataError(f"{path} is not a manifest ({error}); rebuild.") from error


def _from_dict(content: dict[str, Any]) -> Manifest:
  """Builds the nested dataclasses; TypeError or KeyError where the shape is wrong."""
  content["identities"] = tuple(content["identities"])
  content["skipped"] = tuple(content["skipped"])
  content["splits"] = {
    name: Split(split["records"], tuple(Shard(**shard) for shard in split["shards"]))
    for name, split in content["splits"].items()
  }
  if content["pairs"] is not None:
    content["pairs"] = Pairs(**content["pairs"])
  return Manifest(**content)
