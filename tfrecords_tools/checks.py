"""What must be true of a shard: checks that name each bad record and go on."""

import contextlib
import dataclasses
import io
import os
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg

from facedist import errors, storage
from facedist.data import manifest, records, shard_index

RECORDS_A_TASK = 512
_LENGTH = struct.Struct("<Q")
_MAX_LENGTH = 2**32 - 1  # bytes of a record, as the index can hold it
REBUILD = "rebuild this shard with --only_shards={}"


@dataclasses.dataclass(frozen=True)
class Task:
  """Some neighbouring records of a shard to check: a process's unit of work.

  Attributes:
    path: The shard.
    number: The shard's place in its split, for the fix.
    first: Number of the first record in the shard.
    rows: INDEX_DTYPE[records] where they should lie.
    has_index: Whether `rows` come from the index, not from walking the shard.
    identities: Folder names by label.
    image_size: Height and width of every image in pixels.
  """

  path: str
  number: int
  first: int
  rows: np.ndarray
  has_index: bool
  identities: tuple[str, ...]
  image_size: int


@dataclasses.dataclass(frozen=True)
class Found:
  """What a task found: records looked at, and a line for each problem."""

  records: int
  problems: list[str]


def check_files(
  folder: str, shard: manifest.Shard, *, number: int
) -> tuple[np.ndarray, bool, list[str]]:
  """Checks a shard's two files as wholes, and the index against the shard.

  Args:
    folder: A local folder.
    shard: The manifest's entry.
    number: The shard's place in its split.

  Returns:
    INDEX_DTYPE[records] where the records lie, whether that is the index, and a line
    for each problem.
  """
  path = os.path.join(folder, shard.name)
  fix = REBUILD.format(number)
  if not os.path.isfile(path):
    return _no_rows(), False, [f"{shard.name} is missing; {fix}"]
  problems = []
  size = os.path.getsize(path)
  if size != shard.bytes:
    problems.append(
      f"{shard.name} has {size} bytes, the manifest says {shard.bytes}; {fix}"
    )
  elif storage.crc32c(path) != shard.crc32c:
    problems.append(f"{shard.name} is not the manifest's: CRC mismatch; {fix}")
  try:
    rows = _load_index(os.path.join(folder, shard.index_name), shard)
  except errors.DataError as error:
    problems.append(f"{error}; {fix}")
    return _walk(path), False, problems
  return rows, True, problems


def check_records(task: Task) -> Found:
  """Checks framing, CRCs, schema, label and image of each record of a task."""
  problems = []
  with open(task.path, "rb") as stream:
    for place, row in enumerate(task.rows):
      offset = int(row["offset"])
      stream.seek(offset)
      try:
        _check_record(stream.read(int(row["length"])), row, task=task)
      except errors.DataError as error:
        problems.append(
          f"{os.path.basename(task.path)}, record {task.first + place} at byte "
          f"{offset}: {str(error).rstrip('.')}; {REBUILD.format(task.number)}"
        )
  return Found(len(task.rows), problems)


def check_pairs(folder: str, made: manifest.Manifest) -> list[str]:
  """Checks a verification set's pairs file against the manifest and the labels."""
  if made.pairs is None:
    return []
  path = os.path.join(folder, made.pairs.name)
  if not os.path.isfile(path):
    return [f"{made.pairs.name} is missing; build the set again"]
  content = storage.read_bytes(path)
  if storage.crc32c_of(content) != made.pairs.crc32c:
    return [f"{made.pairs.name} is not the manifest's: CRC mismatch; build again"]
  pairs = np.load(io.BytesIO(content), allow_pickle=False)
  num_images = sum(split.records for split in made.splits.values())
  if pairs.shape != (made.pairs.pairs, 4):
    return [f"{made.pairs.name} has shape {pairs.shape}, not {(made.pairs.pairs, 4)}"]
  if set(np.unique(pairs[:, 3])) != set(range(made.pairs.folds)):
    return [f"{made.pairs.name} does not have {made.pairs.folds} folds"]
  if pairs[:, :2].min() < 0 or pairs[:, :2].max() >= num_images:
    return [f"{made.pairs.name} names records past the {num_images} there are"]
  labels = _labels(folder, made)
  if len(labels) != num_images:
    return []  # an index is missing or damaged, which is told elsewhere
  same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
  wrong = np.flatnonzero(same != pairs[:, 2])
  if not len(wrong):
    return []
  return [
    f"{made.pairs.name} has {len(wrong)} pairs whose 'same' contradicts the labels, "
    f"such as pair {wrong[0]}"
  ]


def _labels(folder: str, made: manifest.Manifest) -> np.ndarray:
  """Returns int32[records] from the indexes that can be read."""
  labels = [_no_rows()["label"]]
  for split in made.splits.values():
    for shard in split.shards:
      with contextlib.suppress(errors.DataError):
        path = os.path.join(folder, shard.index_name)
        labels.append(shard_index.load(path)["label"])
  return np.concatenate(labels)


def _check_record(framed: bytes, row: np.void, *, task: Task) -> None:
  """Raises DataError for the first thing that is wrong with a record."""
  payload = records.unframe(framed)
  record = records.parse(payload)
  if not 0 <= record.label < len(task.identities):
    raise errors.DataError(
      f"label {record.label} is not below the {len(task.identities)} identities"
    )
  if record.identity != task.identities[record.label]:
    raise errors.DataError(
      f"identity {record.identity} has label {record.label}, which is "
      f"{task.identities[record.label]} in the manifest"
    )
  if task.has_index:
    start, length = int(row["image_offset"]), int(row["image_length"])
    if framed[start : start + length] != record.jpeg:
      raise errors.DataError("the index does not point at the record's image")
    if row["label"] != record.label:
      raise errors.DataError(f"label {record.label} is {row['label']} in the index")
  _check_image(record.jpeg, task.image_size)


def _check_image(jpeg: bytes, size: int) -> None:
  """Raises DataError unless the image decodes, as readers do it, to the right size."""
  try:
    shape = simplejpeg.decode_jpeg(jpeg).shape
  except ValueError as error:
    raise errors.DataError(f"broken JPEG ({error})") from error
  if shape != (size, size, 3):
    raise errors.DataError(
      f"the image has {shape[1]}x{shape[0]} pixels, the manifest says {size}x{size}"
    )


def _load_index(path: str, shard: manifest.Shard) -> np.ndarray:
  """Reads an index; DataError unless its records fill the shard."""
  content = storage.read_bytes(path)
  rows = shard_index.load(path)
  name = os.path.basename(path)
  ends = rows["offset"] + rows["length"]
  starts = np.concatenate([[0], ends[:-1]]) if len(rows) else ends
  if len(rows) != shard.records:
    raise errors.DataError(
      f"{name} has {len(rows)} records, the manifest {shard.records}"
    )
  if (rows["offset"] != starts).any() or (len(rows) and ends[-1] != shard.bytes):
    raise errors.DataError(f"{name} has records that leave gaps in the shard")
  if storage.crc32c_of(content) != shard.index_crc32c:
    raise errors.DataError(f"{name} is not the manifest's: CRC mismatch")
  return rows


def _walk(path: str) -> np.ndarray:
  """Finds the records of a shard without an index, by their lengths, as far as it goes.

  The last row may lie over the end of a shard that is cut off.
  """
  return np.array(list(_walk_rows(path)), shard_index.INDEX_DTYPE)


def _walk_rows(path: str) -> Iterator[tuple[int, int, int, int, int]]:
  """Yields rows of which offset and length alone mean something."""
  size, offset = os.path.getsize(path), 0
  with open(path, "rb") as stream:
    while offset < size:
      stream.seek(offset)
      header = stream.read(records.HEADER_BYTES)
      if len(header) < records.HEADER_BYTES:
        yield offset, len(header), 0, 0, 0
        return
      (payload,) = _LENGTH.unpack_from(header)
      length = payload + records.HEADER_BYTES + records.FOOTER_BYTES
      if offset + length > size:
        yield offset, min(size - offset, _MAX_LENGTH), 0, 0, 0
        return
      yield offset, length, 0, 0, 0
      offset += length


def _no_rows() -> np.ndarray:
  """Returns an index of nothing."""
  return np.empty(0, shard_index.INDEX_DTYPE)
