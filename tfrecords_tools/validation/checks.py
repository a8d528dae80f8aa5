"""The checks of a folder of shards: its files, each record, and a set's pairs.

A check returns what is wrong as `Problem`s and continues with the next record.
"""

import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np

from facedist import errors, storage
from facedist.data import decoding
from facedist.data.shards import manifest, pairs, shard_index, tfrecord
from tfrecords_tools.selection import merge
from tfrecords_tools.validation import scan

BUILD_AGAIN = "build the set again"
REBUILD = "rebuild this shard with --only_shards={}"


@dataclasses.dataclass(frozen=True)
class Problem:
  """One thing that is wrong.

  Attributes:
    kind: 'manifest', 'pairs', 'shard', 'index' or 'record'.
    reason: What is wrong.
    fix: What to do.
    file: The file's name below the folder.
    shard: The shard's place in its split, as --only_shards counts.
    record: The record's place in the shard.
    byte: Byte of the shard at which the record starts.
  """

  kind: str
  reason: str
  fix: str
  file: str | None = None
  shard: int | None = None
  record: int | None = None
  byte: int | None = None

  def __str__(self) -> str:
    if self.record is None:
      return f"{self.reason}; {self.fix}"
    place = f"{self.file}, record {self.record} at byte {self.byte}"
    return f"{place}: {self.reason}; {self.fix}"


def check_pairs(folder: str, made: manifest.Manifest) -> list[Problem]:
  """Checks a verification set's pairs file against the manifest and the labels."""
  if made.pairs is None:
    return []
  name = made.pairs.name
  num_images = sum(split.records for split in made.splits.values())
  try:
    if not storage.exists(storage.join(folder, name)):
      raise ValueError("is missing")
    content = storage.read_bytes(storage.join(folder, name))
    if storage.crc32c_of(content) != made.pairs.crc32c:
      storage.refuse_kind(content, name)
      raise ValueError("is not the manifest's: CRC mismatch")
    table = pairs.parse(content, made.pairs, num_records=num_images)
    labels = _labels(folder, made)
    if len(labels) == num_images:  # else an index is corrupt: check_files says so
      _check_same(table, labels)
  except ValueError as error:
    return [Problem("pairs", f"{name} {error}", BUILD_AGAIN, file=name)]
  except errors.DataError as error:
    return [Problem("pairs", str(error), BUILD_AGAIN, file=name)]
  return []


def _check_same(table: np.ndarray, labels: np.ndarray) -> None:
  """Raises ValueError if int32[pairs, 4] contradict int32[images] labels."""
  same = labels[table[:, 0]] == labels[table[:, 1]]
  wrong = np.flatnonzero(same != table[:, 2])
  if len(wrong):
    raise ValueError(
      f"has {len(wrong)} pairs whose 'same' contradicts the labels, such as pair "
      f"{wrong[0]}"
    )


def _labels(folder: str, made: manifest.Manifest) -> np.ndarray:
  """Returns int32[records] from the indexes that can be read."""
  labels = [np.empty(0, np.int32)]
  for split in made.splits.values():
    for shard in split.shards:
      with contextlib.suppress(errors.DataError):
        labels.append(shard_index.load(shard.index_path(folder))["label"])
  return np.concatenate(labels)


@dataclasses.dataclass(frozen=True)
class ShardFiles:
  """What is known of a shard's two files before its records are read.

  Attributes:
    rows: INDEX_DTYPE[records] where the records lie.
    has_index: Whether that is the index, not what a walk through the shard found.
    size: Bytes of the shard; 0 where it is missing.
    problems: What is wrong with the files.
  """

  rows: np.ndarray
  has_index: bool
  size: int
  problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class VerifyTask:
  """A shard to check: a process's unit of work.

  Attributes:
    path: The shard's file.
    shard: The manifest's entry.
    number: The shard's place in its split, for the fix.
    files: What is known of its files.
    is_relabelled: Whether labels inside the records are those of another set.
    names: What the set calls the identities of its records; none if not known.
    identities: Folder names by label, of the labels that the rows name.
    num_identities: Labels are below it.
    image_size: Height and width of every image in pixels.
  """

  path: str
  shard: manifest.Shard
  number: int
  files: ShardFiles
  is_relabelled: bool
  names: merge.Names | None
  identities: Mapping[int, str]
  num_identities: int
  image_size: int


@dataclasses.dataclass(frozen=True)
class CheckedShard:
  """What a task found.

  Attributes:
    records: Number of records looked at.
    bytes: Number of bytes read.
    problems: What is wrong with the records, then with the shard's files.
  """

  records: int
  bytes: int
  problems: list[Problem]


def check_files(
  folder: str, shard: manifest.Shard, *, number: int, is_selection: bool
) -> ShardFiles:
  """Checks a shard's size, and its index against manifest and shard.

  Args:
    folder: Local or in a bucket.
    shard: The manifest's entry.
    number: The shard's place in its split.
    is_selection: Whether the index may leave records out.
  """
  path = shard.path(folder)
  fix = REBUILD.format(number)
  if not storage.exists(path):
    reason = f"{shard.name} is missing"
    return ShardFiles(_no_rows(), False, 0, [_of_shard(reason, shard, number=number)])
  size = storage.size(path)
  problems = []
  if size != shard.bytes:
    if kind := tfrecord.kind_of_shard(path):
      reason, _, action = f"{shard.name} is {kind}".partition("; ")
      problem = Problem("shard", reason, action, file=shard.name, shard=number)
      return ShardFiles(_no_rows(), False, 0, [problem])
    reason = f"{shard.name} has {size} bytes, the manifest says {shard.bytes}"
    problems.append(_of_shard(reason, shard, number=number))
  try:
    rows = _load_index(shard.index_path(folder), shard, is_selection=is_selection)
  except errors.DataError as error:
    reason = str(error).rstrip(".")
    problems.append(Problem("index", reason, fix, file=shard.index_name, shard=number))
    return ShardFiles(scan.walk_part(path, size=size), False, size, problems)
  return ShardFiles(rows, True, size, problems)


def check_shard(task: VerifyTask) -> CheckedShard:
  """Checks framing, CRCs, schema, label and image of each record, then the shard.

  Holds a part of the shard in memory at a time (`scan.cut_parts`).
  """
  files, shard = task.files, task.shard
  problems, crc32c = [], 0
  for part in scan.cut_parts(task.path, files.rows, size=files.size):
    content = part.read()
    crc32c = storage.extend_crc32c(crc32c, content)
    for place, framed in enumerate(part.framed(content)):
      row = part.rows[place]
      try:
        _check_record(framed, row, task=task)
      except errors.DataError as error:
        problem = Problem(
          "record",
          str(error).rstrip("."),
          REBUILD.format(task.number),
          file=shard.name,
          shard=task.number,
          record=part.first + place,
          byte=int(row["offset"]),
        )
        problems.append(problem)
  problems += files.problems
  if files.size == shard.bytes and crc32c != shard.crc32c:
    reason = f"{shard.name} is not the manifest's: CRC mismatch"
    problems.append(_of_shard(reason, shard, number=task.number))
  counts = not files.has_index and files.size and shard.folder is None
  if counts and len(files.rows) != shard.records:
    reason = (
      f"{shard.name}: {len(files.rows)} records were found without the index, the "
      f"manifest says {shard.records}"
    )
    problems.append(_of_shard(reason, shard, number=task.number))
  return CheckedShard(len(files.rows), files.size, problems)


def _check_record(framed: bytes, row: np.void, *, task: VerifyTask) -> None:
  """Raises DataError for the first thing that is wrong with a record."""
  if len(framed) < row["length"]:
    raise errors.DataError("the shard ends inside the record")
  record = tfrecord.parse(tfrecord.unframe(framed))
  if task.files.has_index:
    start, length = int(row["image_offset"]), int(row["image_length"])
    if framed[start : start + length] != record.jpeg:
      raise errors.DataError("the index does not point at the record's image")
  if not task.is_relabelled:
    _check_label(record, row, task=task)
  elif task.files.has_index:
    _check_relabelled(record, row, task=task)
  # As the readers decode, so a header that claims a huge image allocates nothing.
  decoding.decode_record(
    record.jpeg, np.empty((task.image_size, task.image_size, 3), np.uint8)
  )


def _check_label(record: tfrecord.Record, row: np.void, *, task: VerifyTask) -> None:
  """Raises DataError unless record, index and manifest agree on its identity."""
  if not 0 <= record.label < task.num_identities:
    raise errors.DataError(
      f"label {record.label} is not below the {task.num_identities} identities"
    )
  if task.files.has_index and row["label"] != record.label:
    raise errors.DataError(f"label {record.label} is {row['label']} in the index")
  if task.identities[record.label] not in record.names:
    raise errors.DataError(
      f"identity {record.identity} has label {record.label}, which is "
      f"{task.identities[record.label]} in the manifest"
    )


def _check_relabelled(
  record: tfrecord.Record, row: np.void, *, task: VerifyTask
) -> None:
  """Raises DataError unless the index labels a record by its identity.

  A label inside the record is that of another set, and means nothing here.
  """
  label = int(row["label"])
  if not 0 <= label < task.num_identities:
    raise errors.DataError(
      f"label {label} is not below the {task.num_identities} identities"
    )
  if task.names is None:
    return
  names = [task.names.of(name) for name in record.names]
  if task.identities[label] not in names:
    raise errors.DataError(
      f"identity {record.names[0]}, here {names[0]}, has label {label} in the index, "
      f"which is {task.identities[label]} in the manifest"
    )


def _load_index(path: str, shard: manifest.Shard, *, is_selection: bool) -> np.ndarray:
  """Reads an index; DataError unless it fits manifest and shard."""
  content = storage.read_bytes(path)
  rows = shard_index.from_bytes(content, path)
  name = shard.index_name
  ends = rows["offset"] + rows["length"]
  starts = np.concatenate([np.zeros(1, np.uint64), ends])[:-1]
  if len(rows) != shard.records:
    raise errors.DataError(
      f"{name} has {len(rows)} records, the manifest {shard.records}"
    )
  if is_selection:
    shard_index.check_fits(rows, path=path, shard_bytes=shard.bytes)
    if (rows["offset"] < starts).any():
      raise errors.DataError(f"{name} has records that overlap")
  elif (rows["offset"] != starts).any() or (len(rows) and ends[-1] != shard.bytes):
    raise errors.DataError(f"{name} has records that leave gaps in the shard")
  if storage.crc32c_of(content) != shard.index_crc32c:
    raise errors.DataError(f"{name} is not the manifest's: CRC mismatch")
  return rows


def _of_shard(reason: str, shard: manifest.Shard, *, number: int) -> Problem:
  """Returns a problem of a shard as a whole."""
  return Problem("shard", reason, REBUILD.format(number), file=shard.name, shard=number)


def _no_rows() -> np.ndarray:
  """Returns an index of nothing."""
  return np.empty(0, shard_index.INDEX_DTYPE)
