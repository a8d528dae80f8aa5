"""What of a build is done: its settings and a marker for each finished shard.

They lie in `.build` below the output folder. A marker is written after its shard and
index stand under their final names, so a build killed at any moment goes on with the
shards that have none; deleting a shard makes the next start write it again.

Any number of tasks may write at once, the same shard included: every file appears
whole, at once, and with the same bytes whoever writes it.
"""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from facedist import errors, storage
from facedist.data import manifest, shard_index

FOLDER = ".build"
SETTINGS_NAME = "settings.json"
_READERS = 16  # threads that hide a bucket's latency


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


class Ledger:
  """The record of one build in its output folder.

  Args:
    output_dir: The build's folder.
    settings: All that decides the shards' bytes; plain JSON values.
  """

  def __init__(self, output_dir: str, settings: dict[str, Any]) -> None:
    self.folder = storage.join(output_dir, FOLDER)
    self._output_dir = output_dir
    self._settings = settings
    text = json.dumps(settings, sort_keys=True)
    self._fingerprint = f"{storage.crc32c_of(text.encode()):08x}"

  def begin(self) -> None:
    """Notes the settings, or checks that they are those the folder was begun with.

    Raises:
      errors.ConfigError: The folder holds shards of other settings or of unknown ones.
    """
    path = storage.join(self.folder, SETTINGS_NAME)
    if not storage.exists(path):
      names = storage.list_names(self._output_dir)
      strangers = [name for name in names if name.endswith(".tfrecord")]
      # Asked again: another task may have begun between the two questions.
      if strangers and not storage.exists(path):
        raise errors.ConfigError(
          f"--output_dir={self._output_dir} holds {strangers[0]}, but not the settings "
          "it was built with; name another folder or delete that one."
        )
      content = (json.dumps(self._settings, indent=1) + "\n").encode()
      if storage.write_bytes(path, content, if_absent=True):
        return
    self._compare(path)

  def check_begun(self) -> None:
    """Checks that tasks of the same settings began this build.

    Raises:
      errors.DataError: Nobody did.
      errors.ConfigError: They had other settings or another input.
    """
    path = storage.join(self.folder, SETTINGS_NAME)
    if not storage.exists(path):
      raise errors.DataError(
        f"--output_dir={self._output_dir} holds no build to finalize; check the path, "
        "or run the tasks first."
      )
    self._compare(path)

  def examine(
    self, shards: Sequence[str]
  ) -> tuple[dict[str, FinishedShard], dict[str, str]]:
    """Returns the named shards that are done, and why each of the others is not."""
    sizes = {
      entry.path: entry.size
      for entry in storage.walk(self._output_dir)
      if "/" not in entry.path or entry.path.startswith(FOLDER)
    }
    look = functools.partial(self._look, sizes=sizes)
    done: dict[str, FinishedShard] = {}
    missing: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
      for name, found in zip(shards, pool.map(look, shards), strict=True):
        if isinstance(found, FinishedShard):
          done[name] = found
        else:
          missing[name] = found
    return done, missing

  def note(self, finished: FinishedShard) -> None:
    """Writes a shard's marker."""
    content = {"fingerprint": self._fingerprint} | dataclasses.asdict(finished)
    path = storage.join(self.folder, _marker_name(finished.shard.name))
    storage.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())

  def forget(self, shard: str) -> None:
    """Removes a shard's marker, so that it counts as unfinished."""
    storage.remove(storage.join(self.folder, _marker_name(shard)))

  def _compare(self, path: str) -> None:
    """Raises ConfigError unless the settings noted at `path` are this build's."""
    try:
      before = dict(json.loads(storage.read_bytes(path)))
    except ValueError as error:
      raise errors.DataError(
        f"{path} is damaged ({error}); delete the folder {self._output_dir} and build "
        "again."
      ) from error
    differing = [
      f"{name}: {before.get(name)} -> {self._settings.get(name)}"
      for name in sorted(before.keys() | self._settings.keys())
      if before.get(name) != self._settings.get(name)
    ]
    if differing:
      raise errors.ConfigError(
        f"--output_dir={self._output_dir} holds a build of other settings "
        f"({'; '.join(differing)}); name another folder or delete that one."
      )

  def _look(self, name: str, *, sizes: dict[str, int]) -> FinishedShard | str:
    """Returns a shard that is done, or why it is not."""
    marker = f"{FOLDER}/{_marker_name(name)}"
    if marker not in sizes:
      return "not built"
    finished = self._read(storage.join(self._output_dir, marker))
    if finished is None:
      return "of another build"
    index = shard_index.index_name(name)
    for path, wanted in (
      (name, finished.shard.bytes),
      (index, shard_index.num_bytes(finished.shard.records)),
    ):
      if path not in sizes:
        return "missing" if path == name else "without its index"
      if sizes[path] != wanted:
        return f"{path} has {sizes[path]} bytes, not {wanted}"
    return finished

  def _read(self, path: str) -> FinishedShard | None:
    """Returns a shard's marker; None if it is damaged or of another build."""
    try:
      marker = json.loads(storage.read_bytes(path))
      if marker["fingerprint"] != self._fingerprint:
        return None
      shard = manifest.Shard(**marker["shard"])
      return FinishedShard(shard, marker["methods"], tuple(marker["skipped"]))
    except (ValueError, KeyError, TypeError):
      return None


def _marker_name(shard: str) -> str:
  """Returns the marker's name of the shard of that name."""
  return shard.removesuffix(".tfrecord") + ".json"
