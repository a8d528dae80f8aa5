"""InsightFace's training sets: train.rec, train.idx and property, as MXNet writes them.

All numbers are little-endian. A .rec file (RecordIO) is a row of records, each of one
or more parts; a part starts at a multiple of 4 bytes:

  uint32   0xced7230a, the magic number
  uint32   kind << 29 | length; kind 0 is a whole record, 1 a record's first part,
           2 one in its middle, 3 its last
  bytes    `length` bytes, then zeros up to the next multiple of 4

Where the magic number lies inside a record, 4 bytes aligned, the writer cuts the record
there and leaves the number out; a reader puts it back between two parts.

A record starts with the IRHeader, and an image's file (JPEG, PNG) follows:

  uint32   flag: the number of labels that follow the header, or 0
  float32  label, if the flag is 0
  uint64   id, the record's key in the .idx
  uint64   id2, not used
  float32[flag]  labels; the first is the identity

Record 0, if there is one, is the identity header and has no image: its labels are the
key of the first identity record, and the key after the last. An identity record has no
image either; its labels are the key of the identity's first image, and the key after
its last. Both only repeat what the images' own labels say, and float32 rounds keys
above 2^24, so records without an image are left out; an image's own label decides.

A line of the .idx is a record's key, a tab and its first byte in the .rec. The property
file is `identities,height,width`.
"""

import array
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from absl import logging

from facedist import errors, progress, storage
from tfrecords_tools import external_sort
from tfrecords_tools.sources import base, tables, tar

MAGIC = struct.pack("<I", 0xCED7230A)
_PART = struct.Struct("<4sI")
_IR_HEADER = struct.Struct("<IfQQ")
_LABEL = struct.Struct("<f")
_PLACE = struct.Struct("<IQQ")  # origin, first byte, length with the parts' heads
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_HEAD_BYTES = _PART.size + _IR_HEADER.size + _LABEL.size
_MAX_LABEL = 2**24  # float32 holds every whole number up to here
_MAX_DIGITS = 18
_UNLISTED = "records that the .idx does not list"


class _Record(NamedTuple):
  """A record: first byte, length with its parts' heads, id, label, and if it is one."""

  start: int
  length: int
  number: int
  label: float
  has_image: bool


def read(
  input_dir: str, *, image_size: int, scratch_dir: str | None = None
) -> base.Source:
  """Returns the images of a set, called LABEL/KEY.jpg.

  A label has at least seven digits, so the sorted identities are in the order of their
  labels. The key is that of the .idx; without one, the record's id, or its place in the
  file where the id is 0.

  Args:
    input_dir: A .rec file, local or in a bucket, or a folder with one. The .idx and the
      property file beside it may be missing.
    image_size: Height and width in pixels that the build makes.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: There is no such file; or, while the groups are iterated, it is
      damaged or cut off, or the .idx or the property file is of another set.
  """
  path = _find(input_dir)
  num_identities = _read_property(path, image_size=image_size)
  left_out: dict[str, int] = {}
  return base.Source(
    path,
    _groups(path, num_identities, left_out=left_out, scratch_dir=scratch_dir),
    [path],
    left_out=left_out,
    unwrap=image_of,
  )


def _find(input_dir: str) -> str:
  """Returns the .rec file that --input_dir names."""
  if input_dir.endswith(".rec") and not os.path.isdir(input_dir):
    return input_dir
  found = [name for name in storage.list_names(input_dir) if name.endswith(".rec")]
  if len(found) != 1:
    raise errors.DataError(
      f"--input_dir={input_dir} has {', '.join(found) or 'no .rec file'}; name the one "
      "file to build, such as train.rec."
    )
  return storage.join(input_dir, found[0])


def _read_property(path: str, *, image_size: int) -> int | None:
  """Returns the number of identities that the property file gives; None without one."""
  place = storage.join(os.path.dirname(path), "property")
  if not storage.exists(place):
    return None
  words = "".join(tables.read_lines(place)).split(",")
  if len(words) != 3 or not all(word.strip().isdecimal() for word in words):
    raise errors.DataError(
      f"{place} must be identities,height,width, such as 85742,112,112; correct it, or "
      "take it away: the build does not need it."
    )
  num_identities, height, width = map(int, words)
  if (height, width) != (image_size, image_size):
    logging.warning(
      "%s says %d x %d pixels; with --image_size=%d each image is encoded again",
      *(place, height, width, image_size),
    )
  return num_identities


def _groups(
  path: str,
  num_identities: int | None,
  *,
  left_out: dict[str, int],
  scratch_dir: str | None,
) -> Iterator[base.IdentityGroup]:
  """Yields the images by identity."""
  labels: set[int] = set()

  def named() -> Iterator[external_sort.Record]:
    shown = progress.CountLogger("scanned %s records")
    for count, (key, record) in enumerate(_with_keys(path, left_out), 1):
      shown.update(count)
      if not record.has_image:
        continue
      label = _checked_label(record, num_identities, path=path)
      labels.add(label)
      name = f"{base.name_of_label(label)}/{key:08d}.jpg"
      yield name.encode(), _PLACE.pack(0, record.start, record.length)

  ordered = external_sort.sorted_by_key(named(), scratch_dir=scratch_dir)
  for identity, paths, places in base.by_identity(ordered, _PLACE, [path]):
    _, starts, lengths = zip(*places, strict=True)
    yield base.new_group(identity, paths, starts=starts, lengths=lengths)
  if not labels:
    raise errors.DataError(f"{path} has no image in any record.")
  if num_identities is not None and len(labels) < num_identities:
    logging.warning(
      "%s has images of %d identities, its property file says %d",
      *(path, len(labels), num_identities),
    )


def _checked_label(record: _Record, num_identities: int | None, *, path: str) -> int:
  """Returns a record's label; DataError for one that is no identity's number."""
  end = _MAX_LABEL if num_identities is None else num_identities
  if not (record.label.is_integer() and 0 <= record.label < end):
    raise errors.DataError(
      f"{path}, record {record.number} at byte {record.start}: the label is "
      f"{record.label:g}, but labels are whole numbers from 0 to {end - 1}"
      + (
        " by the property file beside it; correct that file." if num_identities else "."
      )
    )
  return int(record.label)


def _with_keys(path: str, left_out: dict[str, int]) -> Iterator[tuple[int, _Record]]:
  """Yields the records that the .idx lists, in the file's order, with their keys.

  Every record without an .idx.
  """
  index = f"{path.removesuffix('.rec')}.idx"
  if not storage.exists(index):
    logging.warning("%s does not exist; every record of %s is taken", index, path)
    for place, record in enumerate(_scan(path)):
      yield record.number or place, record
    return
  keys, starts = _read_index(index)
  listed = 0
  for record in _scan(path):
    if listed < len(starts) and starts[listed] < record.start:
      break
    if listed < len(starts) and starts[listed] == record.start:
      yield int(keys[listed]), record
      listed += 1
    else:
      left_out[_UNLISTED] = left_out.get(_UNLISTED, 0) + 1
  if listed < len(starts):
    raise errors.DataError(
      f"{index} has record {keys[listed]} at byte {starts[listed]} of {path}, where no "
      "record starts, or a second one; if the .rec is whole, take the .idx away: every "
      "record is then taken."
    )


def _read_index(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the keys and the first bytes of an .idx: int64[records] each, by place."""
  numbers = array.array("q")
  for line, text in tables.numbered_lines(path):
    words = text.split("\t")
    if len(words) != 2 or not all(map(_is_number, words)):
      raise errors.DataError(
        f"{path}, line {line}: {tables.shortened(text)!r} is not key<TAB>byte; take "
        "the file away: every record is then taken."
      )
    numbers.extend(map(int, words))
  table = np.array(numbers, np.int64).reshape(-1, 2)
  table = table[np.argsort(table[:, 1], kind="stable")]
  keys, counts = np.unique(table[:, 0], return_counts=True)
  if len(keys) < len(table):
    raise errors.DataError(
      f"{path} lists the key {keys[counts > 1][0]} twice; take the file away: every "
      "record is then taken."
    )
  return table[:, 0], table[:, 1]


def _is_number(word: str) -> bool:
  """Says whether a word is a number that 64 bits hold."""
  return word.isdecimal() and len(word) <= _MAX_DIGITS


def _scan(path: str) -> Iterator[_Record]:
  """Yields all records of a .rec file by their heads, from its start to its end.

  Raises:
    errors.DataError: It is no such file, is damaged or cut off.
  """
  found = storage.status(path)
  with storage.readable(path), tar.open_archive(path, found) as stream:
    position = 0
    while position < found.size:
      record = _scan_one(stream, position, path=path, size=found.size)
      yield record
      position += record.length


def _scan_one(stream: BinaryIO, start: int, *, path: str, size: int) -> _Record:
  """Returns the record at a byte."""
  stream.seek(start)
  head = stream.read(_HEAD_BYTES)
  try:
    kind, length = _part(head)
    if kind == _WHOLE:
      end = start + _PART.size + _padded(length)
      content = head[_PART.size : _PART.size + length]
    else:
      content, end = _joined(stream, start)
      length = len(content)
    if end > size:
      raise errors.DataError(
        f"it goes on to byte {end}, but the file has {size}: it is cut off; copy it "
        "again"
      )
    number, label, first = _header(content, length)
  except errors.DataError as error:
    if not start:
      stream.seek(0)
      storage.refuse_kind(stream.read(storage.HEAD_BYTES), path)
    raise errors.DataError(f"{path}, record at byte {start}: {error}.") from error
  return _Record(start, end - start, number, label, first < length)


def _part(head: bytes) -> tuple[int, int]:
  """Returns a part's kind and length."""
  if len(head) < _PART.size:
    raise errors.DataError("the file is cut off; copy it again")
  magic, word = _PART.unpack_from(head)
  if magic != MAGIC:
    raise errors.DataError(
      f"it starts with {magic.hex()}, not with RecordIO's {MAGIC.hex()}; the file is "
      "damaged or no .rec file"
    )
  return word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)


def _padded(length: int) -> int:
  """Returns a length rounded up to a multiple of 4."""
  return -(-length // 4) * 4


def _joined(stream: BinaryIO, start: int) -> tuple[bytes, int]:
  """Returns the content of a record of several parts, and the byte after its end."""
  parts: list[bytes] = []
  position, kind = start, _FIRST
  while kind != _LAST:
    stream.seek(position)
    kind, length = _part(stream.read(_PART.size))
    if kind not in ((_MIDDLE, _LAST) if parts else (_FIRST,)):
      raise errors.DataError(
        f"the part at byte {position} is of kind {kind}, which cannot come there; the "
        "file is damaged"
      )
    parts.append(stream.read(length))
    if len(parts[-1]) < length:
      raise errors.DataError("the file is cut off; copy it again")
    position += _PART.size + _padded(length)
  return MAGIC.join(parts), position


def _header(content: bytes, length: int) -> tuple[int, float, int]:
  """Returns a record's id, its label, and where its image starts.

  Args:
    content: The record's start, at least to its first label.
    length: The whole record's, in bytes.
  """
  if length < _IR_HEADER.size:
    raise errors.DataError(f"its {length} bytes are no IRHeader; the file is damaged")
  flag, label, number, _ = _IR_HEADER.unpack_from(content)
  first = _IR_HEADER.size + flag * _LABEL.size
  if first > length:
    raise errors.DataError(f"its {length} bytes do not hold {flag} labels")
  if flag:
    (label,) = _LABEL.unpack_from(content, _IR_HEADER.size)
  return number, label, first


def image_of(record: bytes) -> bytes:
  """Returns the image's file of a record, whose parts' heads come with it."""
  position, parts = 0, []
  while position < len(record):
    _, length = _part(record[position : position + _PART.size])
    position += _PART.size
    parts.append(record[position : position + length])
    position += _padded(length)
  content = MAGIC.join(parts) if len(parts) > 1 else parts[0]
  return content[_header(content, len(content))[2] :]
