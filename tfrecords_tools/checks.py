"""What must be true of a shard: checks that name each bad record and go on."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from facedist import errors, storage
from facedist.data import images, manifest, records, shard_index
from tfrecords_tools import record_names, shard_parts
from tfrecords_tools.problems import REBUILD, Problem


@dataclasses.dataclass(frozen=True)
class Task:
  """A part of a shard to check: a process's unit of work.

  Attributes:
    part: Where the records lie.
    name: The shard's file name.
    number: The shard's place in its split, for the fix.
    has_index: Whether the part's rows come from the index, not from walking the shard.
    is_relabelled: Whether labels inside the records are those of another set.
    names: What the set calls the identities of its records; none if not known.
    identities: Folder names by label, of the labels that the rows name.
    num_identities: Labels are below it.
    image_size: Height and width of every image in pixels.
  """

  part: shard_parts.Part
  name: str
  number: int
  has_index: bool
  is_relabelled: bool
  names: record_names.Names | None
  identities: Mapping[int, str]
  num_identities: int
  image_size: int


@dataclasses.dataclass(frozen=True)
class Found:
  """What a task found.

  Attributes:
    records: Number of records looked at.
    bytes: Number of bytes read.
    crc32c: Of those bytes.
    problems: What is wrong with records.
  """

  records: int
  bytes: int
  crc32c: int
  problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class Files:
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


def check_files(
  folder: str, shard: manifest.Shard, *, number: int, is_selection: bool
) -> Files:
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
    return Files(_no_rows(), False, 0, [_of_shard(reason, shard, number=number)])
  size = storage.size(path)
  problems = []
  if size != shard.bytes:
    if kind := records.kind_of_shard(path):
      reason, _, action = f"{shard.name} is {kind}".partition("; ")
      problem = Problem("shard", reason, action, file=shard.name, shard=number)
      return Files(_no_rows(), False, 0, [problem])
    reason = f"{shard.name} has {size} bytes, the manifest says {shard.bytes}"
    problems.append(_of_shard(reason, shard, number=number))
  try:
    rows = _load_index(shard.index_path(folder), shard, is_selection=is_selection)
  except errors.DataError as error:
    reason = str(error).rstrip(".")
    problems.append(Problem("index", reason, fix, file=shard.index_name, shard=number))
    return Files(shard_parts.walk(path, size=size), False, size, problems)
  return Files(rows, True, size, problems)


def check_whole(
  found: Files, shard: manifest.Shard, *, crc32c: int, number: int
) -> list[Problem]:
  """Checks a shard's CRC, and its records' number where there is no index."""
  problems = []
  if found.size == shard.bytes and crc32c != shard.crc32c:
    reason = f"{shard.name} is not the manifest's: CRC mismatch"
    problems.append(_of_shard(reason, shard, number=number))
  counts = not found.has_index and found.size and shard.folder is None
  if counts and len(found.rows) != shard.records:
    reason = (
      f"{shard.name}: {len(found.rows)} records were found without the index, the "
      f"manifest says {shard.records}"
    )
    problems.append(_of_shard(reason, shard, number=number))
  return problems


def check_records(task: Task) -> Found:
  """Checks framing, CRCs, schema, label and image of each record of a task."""
  problems = []
  content = task.part.read()
  for place, framed in enumerate(task.part.framed(content)):
    row = task.part.rows[place]
    try:
      _check_record(framed, row, task=task)
    except errors.DataError as error:
      problem = Problem(
        "record",
        str(error).rstrip("."),
        REBUILD.format(task.number),
        file=task.name,
        shard=task.number,
        record=task.part.first + place,
        byte=int(row["offset"]),
      )
      problems.append(problem)
  checksum = storage.crc32c_of(content)
  return Found(len(task.part.rows), len(content), checksum, problems)


def _check_record(framed: bytes, row: np.void, *, task: Task) -> None:
  """Raises DataError for the first thing that is wrong with a record."""
  if len(framed) < row["length"]:
    raise errors.DataError("the shard ends inside the record")
  record = records.parse(records.unframe(framed))
  if task.has_index:
    start, length = int(row["image_offset"]), int(row["image_length"])
    if framed[start : start + length] != record.jpeg:
      raise errors.DataError("the index does not point at the record's image")
  if not task.is_relabelled:
    _check_label(record, row, task=task)
  elif task.has_index:
    _check_relabelled(record, row, task=task)
  # As readers do it, and never setting aside what a header claims.
  images.decode_record(
    record.jpeg, np.empty((task.image_size, task.image_size, 3), np.uint8)
  )


def _check_label(record: records.Record, row: np.void, *, task: Task) -> None:
  """Raises DataError unless record, index and manifest agree on who it shows."""
  if not 0 <= record.label < task.num_identities:
    raise errors.DataError(
      f"label {record.label} is not below the {task.num_identities} identities"
    )
  if task.has_index and row["label"] != record.label:
    raise errors.DataError(f"label {record.label} is {row['label']} in the index")
  if task.identities[record.label] not in record.names:
    raise errors.DataError(
      f"identity {record.identity} has label {record.label}, which is "
      f"{task.identities[record.label]} in the manifest"
    )


def _check_relabelled(record: records.Record, row: np.void, *, task: Task) -> None:
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
  """Reads an index; DataError unless its records fill the shard, or can be a choice."""
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
      raise errors.DataError(f"{name} has records that lie over others")
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
