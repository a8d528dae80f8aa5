"""What of a build is done: settings and a marker for each finished shard.

They lie in `.build` below the output folder. A marker is written after its shard and
index stand under their final names, so a build killed at any moment goes on with the
shards that have none; deleting a shard makes the next start write it again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from facedist import errors, storage
from facedist.data import manifest, shard_index

FOLDER = ".build"
SETTINGS_NAME = "settings.json"
_PARTIAL = re.compile(r".+\.partial-\d+-[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True)
class FinishedShard:
  """A shard that stands under its final name.

  Attributes:
    shard: Its entry in the manifest.
    methods: Number of images made by each method.
    skipped: `path` and `reason` of its images that could not be read.
  """

  shard: manifest.Shard
  methods: dict[str, int]
  skipped: tuple[dict[str, str], ...]


@contextlib.contextmanager
def only_builder(output_dir: str) -> Iterator[None]:
  """Holds a local output folder against a second build; removes leftovers of a first.

  The lock goes with the process, however that ends.

  Raises:
    errors.UsageError: Another process is building there.
  """
  if storage.is_bucket(output_dir):
    yield
    return
  folder = storage.join(output_dir, FOLDER)
  os.makedirs(folder, exist_ok=True)
  with open(storage.join(folder, "lock"), "w") as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.UsageError(
        f"--output_dir={output_dir} is being written by another build; wait for it or "
        "name another folder."
      ) from error
    for place in (output_dir, folder):
      for name in filter(_PARTIAL.fullmatch, storage.list_names(place)):
        storage.remove(storage.join(place, name))
    yield


class Ledger:
  """The record of one build in its output folder.

  Args:
    output_dir: The build's folder.
    settings: All that decides the shards' bytes; plain JSON values.
  """

  def __init__(self, output_dir: str, settings: dict[str, Any]) -> None:
    self._folder = storage.join(output_dir, FOLDER)
    self._output_dir = output_dir
    self._settings = settings
    text = json.dumps(settings, sort_keys=True)
    self._fingerprint = f"{storage.crc32c_of(text.encode()):08x}"

  def open(self) -> None:
    """Notes the settings, or checks that they are those the folder was begun with.

    Raises:
      errors.ConfigError: The folder holds shards of other settings or of unknown ones.
    """
    before = self._settings_before()
    if before is None:
      content = (json.dumps(self._settings, indent=1) + "\n").encode()
      storage.write_bytes(storage.join(self._folder, SETTINGS_NAME), content)
      return
    names = sorted(before.keys() | self._settings.keys())
    differing = [
      f"{name}: {before.get(name)} -> {self._settings.get(name)}"
      for name in names
      if before.get(name) != self._settings.get(name)
    ]
    if differing:
      raise errors.ConfigError(
        f"--output_dir={self._output_dir} holds a build of other settings "
        f"({'; '.join(differing)}); name another folder or delete that one."
      )

  def finished(self, shards: list[str]) -> dict[str, FinishedShard]:
    """Returns those of the named shards that are done."""
    markers = set(storage.list_names(self._folder))
    present = set(storage.list_names(self._output_dir))
    done = {}
    for name in shards:
      files = {name, shard_index.index_name(name)}
      if _marker_name(name) in markers and files <= present:
        marker = self._read_marker(name)
        if marker is not None:
          done[name] = marker
    return done

  def note(self, finished: FinishedShard) -> None:
    """Writes a shard's marker."""
    content = {"fingerprint": self._fingerprint} | dataclasses.asdict(finished)
    path = storage.join(self._folder, _marker_name(finished.shard.name))
    storage.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())

  def forget(self, shard: str) -> None:
    """Removes a shard's marker, so that it counts as unfinished."""
    storage.remove(storage.join(self._folder, _marker_name(shard)))

  def _settings_before(self) -> dict[str, Any] | None:
    """Returns the settings the folder was begun with; None if it is a new one."""
    path = storage.join(self._folder, SETTINGS_NAME)
    if not storage.exists(path):
      names = storage.list_names(self._output_dir)
      strangers = [name for name in names if name.endswith(".tfrecord")]
      if strangers:
        raise errors.ConfigError(
          f"--output_dir={self._output_dir} holds {strangers[0]}, but not the settings "
          "it was built with; name another folder or delete that one."
        )
      return None
    try:
      return dict(json.loads(storage.read_bytes(path)))
    except ValueError as error:
      raise errors.DataError(
        f"{path} is damaged ({error}); delete the folder {self._output_dir} and build "
        "again."
      ) from error

  def _read_marker(self, name: str) -> FinishedShard | None:
    """Returns a shard's marker; None if it is damaged or of another build."""
    content = storage.read_bytes(storage.join(self._folder, _marker_name(name)))
    try:
      marker = json.loads(content)
      if marker["fingerprint"] != self._fingerprint:
        return None
      shard = manifest.Shard(**marker["shard"])
      return FinishedShard(shard, marker["methods"], tuple(marker["skipped"]))
    except (ValueError, KeyError, TypeError):
      return None


def _marker_name(shard: str) -> str:
  """Returns the marker's name of the shard of that name."""
  return shard.removesuffix(".tfrecord") + ".json"
