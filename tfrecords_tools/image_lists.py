"""What images two sets hold, record by record, joined by file name on a disk.

The lists of both are cut into many files by a hash of the name; those of one number
hold the same names and are compared in memory, one number after another.
"""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from facedist import errors, progress, storage
from facedist.data import manifest, records
from tfrecords_tools import index_walk, parallel, shard_parts

_IMAGES_A_FILE = 100_000
_MOST_FILES = 500  # open at a time
_RECORDS_WORTH_A_PROCESS = 4000


class Image(NamedTuple):
  """What is compared of an image."""

  jpeg_crc32c: int
  identity: str
  split: str


@dataclasses.dataclass(frozen=True)
class Difference:
  """An image that the two sets do not hold alike; none where one lacks it."""

  filename: str
  old: Image | None
  new: Image | None


@dataclasses.dataclass(frozen=True)
class Task:
  """A part of a shard to list: a process's unit of work."""

  part: shard_parts.Part
  split: str
  identities: dict[int, str]
  num_files: int


def num_files(num_images: int) -> int:
  """Returns into how many files a list of so many images is cut."""
  return min(1 + num_images // _IMAGES_A_FILE, _MOST_FILES)


def write(
  folder: str,
  made: manifest.Manifest,
  *,
  shards: frozenset[str],
  into: str,
  cut_into: int,
  num_processes: int | None,
) -> None:
  """Lists the images of some of a set's shards, in `cut_into` files below `into`.

  Args:
    folder: The set, local or in a bucket.
    made: Its manifest.
    shards: The shards' paths.
    into: A local folder.
    cut_into: Number of files; the same for both sets.
    num_processes: Processes to use; None is one for each core, fewer for few records.

  Raises:
    errors.DataError: A record is damaged.
  """
  total = sum(one.records for one in made.shards if one.path(folder) in shards)
  wanted = 1 + total // _RECORDS_WORTH_A_PROCESS
  found = parallel.ordered_map(
    list_part,
    _tasks(folder, made, shards=shards, cut_into=cut_into),
    num_processes=num_processes or min(parallel.available_cores(), wanted),
  )
  os.makedirs(into)
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(found))
    shown = stack.enter_context(progress.Progress("listed", total=total))
    files = [
      stack.enter_context(open(os.path.join(into, str(number)), "w"))
      for number in range(cut_into)
    ]
    for lines in found:
      for number, line in lines:
        files[number].write(line)
      shown.advance(len(lines))


def list_part(task: Task) -> list[tuple[int, str]]:
  """Returns a line for each record of a part, and the file that it belongs to."""
  lines = []
  content = task.part.read()
  for place, framed in enumerate(task.part.framed(content)):
    row = task.part.rows[place]
    try:
      record = records.parse(records.unframe(framed))
    except errors.DataError as error:
      raise errors.DataError(
        f"{task.part.path}, record {task.part.first + place} at byte {row['offset']}: "
        f"{error}"
      ) from error
    image = Image(
      storage.crc32c_of(record.jpeg), task.identities[int(row["label"])], task.split
    )
    filename = record.filename or f"{image.identity}/{image.jpeg_crc32c:08x}"
    number = storage.crc32c_of(filename.encode()) % task.num_files
    lines.append((number, json.dumps([filename, *image]) + "\n"))
  return lines


def compare(old: str, new: str, *, cut_into: int) -> Iterator[tuple[int, Difference]]:
  """Yields what differs, each with the number of images that are alike before it.

  The last one of a file of names may have neither an old nor a new image.
  """
  for number in range(cut_into):
    before, after = (_read(os.path.join(folder, str(number))) for folder in (old, new))
    alike = 0
    for filename in sorted(before.keys() | after.keys()):
      common = before[filename] & after[filename]
      alike += common.total()
      gone = sorted((before[filename] - common).elements())
      come = sorted((after[filename] - common).elements())
      # Of two changes of one name, such as in a merged set, the likest make a pair.
      for place in range(max(len(gone), len(come))):
        first = gone[place] if place < len(gone) else None
        second = come[place] if place < len(come) else None
        yield alike, Difference(filename, first, second)
        alike = 0
    yield alike, Difference("", None, None)


def _tasks(
  folder: str, made: manifest.Manifest, *, shards: frozenset[str], cut_into: int
) -> Iterator[Task]:
  """Yields the parts of the shards."""
  for one in index_walk.walk(folder, made):
    path = one.shard.path(folder)
    if path in shards:
      for part in shard_parts.cut(path, one.rows, size=one.shard.bytes):
        if len(part.rows):
          labels = set(part.rows["label"].tolist())
          named = {label: made.identities[label] for label in labels}
          yield Task(part, one.split, named, cut_into)


def _read(path: str) -> collections.defaultdict[str, collections.Counter[Image]]:
  """Returns the images of a list by file name; merged sets may have a name twice."""
  images: collections.defaultdict[str, collections.Counter[Image]]
  images = collections.defaultdict(collections.Counter)
  with open(path) as stream:
    for line in stream:
      filename, *image = json.loads(line)
      images[filename][Image(*image)] += 1
  return images
