"""The state of a build in its output folder: its settings and its finished shards.

The folder `.build` holds the settings and a marker for each finished shard. A marker is
written after its shard and index have their final names. A build that was killed at any
moment therefore continues with the shards that have no marker, and a shard that was
deleted is written again.

Any number of tasks may write at once, even the same shard: every file appears complete,
with the same bytes whichever task writes it. --finalize checks that all are there, and
partial files that killed builders left are removed.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index
from tfrecords_tools.builder import plan, tasks

FOLDER = ".build"
SETTINGS_NAME = "settings.json"
_READERS = 16  # threads that hide a bucket's latency


@dataclasses.dataclass(frozen=True)
class FinishedShard:
  """A shard that has its final name.

  Attributes:
    shard: Its entry in the manifest.
    methods: Number of images made by each method.
    skipped: `path` and `reason` of its images that could not be read.
  """

  shard: manifest.Shard
  methods: dict[str, int]
  skipped: tuple[dict[str, str], ...]


class BuildState:
  """The settings and markers of one build.

  Args:
    output_dir: The build's folder.
    settings: Everything that decides the shards' bytes; plain JSON values.
  """

  def __init__(self, output_dir: str, settings: dict[str, Any]) -> None:
    self.folder = storage.join(output_dir, FOLDER)
    self._output_dir = output_dir
    self._settings = settings
    text = json.dumps(settings, sort_keys=True)
    self._fingerprint = f"{storage.crc32c_of(text.encode()):08x}"

  def begin(self) -> None:
    """Writes the settings, or checks that the folder was begun with the same ones.

    Raises:
      errors.ConfigError: The folder holds shards of other settings or of unknown ones.
    """
    path = storage.join(self.folder, SETTINGS_NAME)
    if not storage.exists(path):
      names = storage.list_names(self._output_dir)
      unknown = [name for name in names if name.endswith(".tfrecord")]
      # Checked again: another task may have begun between the two checks.
      if unknown and not storage.exists(path):
        raise errors.ConfigError(
          f"--output_dir={self._output_dir} holds {unknown[0]}, but not the settings "
          "it was built with; name another folder or delete that one."
        )
      content = (json.dumps(self._settings, indent=1) + "\n").encode()
      if storage.write_bytes(path, content, if_absent=True):
        return
    self._compare(path)

  def check_begun(self) -> None:
    """Checks that tasks of the same settings began this build.

    Raises:
      errors.DataError: No task did.
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
    status_of = functools.partial(self._status_of, sizes=sizes)
    done: dict[str, FinishedShard] = {}
    missing: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
      for name, found in zip(shards, pool.map(status_of, shards), strict=True):
        if isinstance(found, FinishedShard):
          done[name] = found
        else:
          missing[name] = found
    return done, missing

  def mark_finished(self, finished: FinishedShard) -> None:
    """Writes a shard's marker."""
    content = {"fingerprint": self._fingerprint} | dataclasses.asdict(finished)
    path = storage.join(self.folder, _marker_name(finished.shard.name))
    storage.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())

  def unmark(self, shard: str) -> None:
    """Removes a shard's marker, so that it counts as unfinished."""
    storage.remove(storage.join(self.folder, _marker_name(shard)))

  def _compare(self, path: str) -> None:
    """Raises ConfigError unless the settings at `path` are this build's."""
    try:
      before = dict(json.loads(storage.read_bytes(path)))
    except ValueError as error:
      raise errors.DataError(
        f"{path} is corrupt ({error}); delete the folder {self._output_dir} and build "
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

  def _status_of(self, name: str, *, sizes: dict[str, int]) -> FinishedShard | str:
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
    """Returns a shard's marker; None if it is corrupt or of another build."""
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


_NAMED = 20  # missing shards that a message names


def finished_shards(
  shards: Sequence[plan.PlannedShard],
  *,
  build_state: BuildState,
  num_tasks: int,
  max_bad: int,
  explain_broken: Callable[[str, str], str] | None,
  output_dir: str,
) -> dict[str, FinishedShard]:
  """Returns what every shard's marker says, for --finalize.

  Args:
    shards: The plan's, in order.
    build_state: The build's state.
    num_tasks: Tasks that the shards were split over, to name those to run again.
    max_bad: Unreadable images that may have been skipped in all.
    explain_broken: See `base.Source`; if given, no image may have been skipped.
    output_dir: The build's folder, for messages.

  Raises:
    errors.DataError: A shard is missing, not whole or of another plan; or more images
      were skipped than may be.
    errors.ConfigError: The build has other settings or another input.
  """
  build_state.check_begun()
  done, missing = build_state.examine([shard.name for shard in shards])
  if missing:
    raise errors.DataError(_missing_message(shards, missing, num_tasks, output_dir))
  broken = [one for entry in done.values() for one in entry.skipped]
  if broken and explain_broken is not None:
    raise errors.DataError(explain_broken(broken[0]["path"], broken[0]["reason"]))
  if len(broken) > max_bad:
    raise errors.DataError(
      f"{len(broken)} images were unreadable in all tasks together, and {max_bad} may "
      "be; the tasks' logs name them; repair the images, or raise --max_bad."
    )
  return done


def _missing_message(
  shards: Sequence[plan.PlannedShard],
  missing: dict[str, str],
  num_tasks: int,
  output_dir: str,
) -> str:
  """Returns the message that names what is missing, by shard and by task."""
  whole = tasks.BuildTask(0, num_tasks)
  task_of = {
    shard.name: whole.task_of(place, len(shards)) for place, shard in enumerate(shards)
  }
  task = {name: f"task {task_of[name]}: " if num_tasks > 1 else "" for name in missing}
  named = [f"{name} ({task[name]}{reason})" for name, reason in missing.items()]
  if len(named) > _NAMED:
    named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
  task_list = ",".join(map(str, sorted({task_of[name] for name in missing})))
  again = f"run tasks {task_list} again" if num_tasks > 1 else "build them"
  return (
    f"--output_dir={output_dir} lacks {len(missing)} of {len(shards)} shards: "
    f"{', '.join(named)}; {again}, then --finalize."
  )


_PARTIAL = re.compile(r".+\.partial-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}")
_DEAD_AFTER_SECONDS = 24 * 3600.0


def remove_leftovers(folders: Iterable[str]) -> None:
  """Removes the partial files of killed builders from local folders.

  A file's name holds its writer's host and process (`storage.partial_file`). A file of
  this host is removed if that process does not run; one of another host if it was not
  written for a day. A bucket has no partial files.
  """
  for folder in folders:
    if storage.is_bucket(folder):
      continue
    for name in storage.list_names(folder):
      found = _PARTIAL.fullmatch(name)
      path = storage.join(folder, name)
      if found and _is_dead(path, found["host"], int(found["process"])):
        storage.remove(path)


def _is_dead(path: str, host: str, process: int) -> bool:
  """Says whether no process writes that file any more."""
  if host == socket.gethostname() and not _is_running(process):
    return True
  try:
    return time.time() - os.stat(path).st_mtime > _DEAD_AFTER_SECONDS
  except FileNotFoundError:
    return False


def _is_running(process: int) -> bool:
  """Says whether another process of this host has that number."""
  if process == os.getpid():  # we write nothing yet; in a container it may be another's
    return False
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
