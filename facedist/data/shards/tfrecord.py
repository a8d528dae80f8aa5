"""One record: the Example schema and TFRecord's framing of it.

A record is `uint64 length, uint32 crc(length), payload, uint32 crc(payload)`, little
endian, with masked CRC-32C (TensorFlow's `tf.io.TFRecordWriter` format). The payload
is a `tf.train.Example` with the feature names of TensorFlow's image classification
data sets, so that `tf.data`, DALI and others read the shards without this project.

Shards of others are read too. Their image and label may have other names, and where the
text of an identity or the file name is missing, so are they here.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterator, Mapping

import google_crc32c

from facedist import errors, storage

IMAGE = "image/encoded"
LABEL = "image/class/label"
IDENTITY = "image/class/text"
FILENAME = "image/filename"
FORMAT = "image/format"

_IMAGES = (IMAGE, "image", "image_raw")
_LABELS = (LABEL, "label", "image/source_id")
"""What others call them: TensorFlow Datasets, InsightFace_TF and arcface-tf2."""

HEADER_BYTES = 12
FOOTER_BYTES = 4
MAX_PAYLOAD_BYTES = 64 << 20
"""No face takes more; who reads a shard without its index believes no longer one."""
_CRC_MASK_DELTA = 0xA282EAD8
# https://protobuf.dev/programming-guides/encoding: a field's tag is 8 times its number
# plus its wire type. FIRST and SECOND are tags of fields that start with their size.
_VARINT, _SIZED, _FIXED_BYTES = 0, 2, {1: 8, 5: 4}
_VARINT_BYTES = 10
_FIRST, _SECOND, _THIRD, _FIRST_NUMBER = 0x0A, 0x12, 0x1A, 0x08
_KINDS = {_FIRST: "bytes", _SECOND: "float", _THIRD: "int64"}
_SHOWN_FEATURES = 8


@dataclasses.dataclass(frozen=True)
class Record:
  """One face image and what is known of it.

  Attributes:
    jpeg: The encoded image.
    label: Number of the identity, in the manifest unless that has renumbered them.
    identity: Name of the identity's folder, such as n000002; empty if not known.
    filename: The source image's path below the input folder, or label/path where a
      list's label is the identity; empty if not known.
  """

  jpeg: bytes
  label: int
  identity: str
  filename: str

  @property
  def names(self) -> tuple[str, ...]:
    """What a manifest may call the identity: its own name, or one of `named_by`."""
    own = (self.identity,) if self.identity else ()
    return *own, named_by(self.identity, self.label)


def named_by(identity: str, label: int) -> str:
  """Returns a name that holds the label, where `identity` is empty or not unique."""
  return f"{identity}-label{label:07d}" if identity else f"label{label:07d}"


def serialize(record: Record) -> bytes:
  """Returns the record as a serialised `tf.train.Example`, the same bytes each time.

  They are those of `SerializeToString(deterministic=True)`, made by hand: TensorFlow's
  import takes seconds and half a gigabyte in each of a builder's processes, and its
  message a tenth of the time that an image takes. An Example is a length and entries
  in the order of their keys; an entry is a length, the key, and the value in a list
  in a Feature, each with its length (https://protobuf.dev/programming-guides/encoding).

  Args:
    record: Its label is not negative.
  """
  label = _varint(record.label)
  number = b"".join(
    (b"\x12", _varint(len(label) + 4), b"\x1a", _varint(len(label) + 2), _sized(label))
  )
  identity, filename = record.identity.encode(), record.filename.encode()
  parts = (
    _sized(_LABEL_KEY + number),
    _before_bytes(_IDENTITY_KEY, len(identity)),
    identity,
    _before_bytes(_IMAGE_KEY, len(record.jpeg)),
    record.jpeg,
    _before_bytes(_FILENAME_KEY, len(filename)),
    filename,
    _FORMAT_ENTRY,
  )
  return b"".join((b"\n", _varint(sum(map(len, parts))), *parts))


def parse(payload: bytes) -> Record:
  """Reads a record from a `tf.train.Example` of this project or of others.

  By hand, for the reason that `serialize` has. The work grows with the payload's
  length, whatever numbers it claims; features of other names are passed over.

  Raises:
    errors.DataError: The payload is no Example, lacks image or label, has a feature
      twice, or has more or less than one value in it.
  """
  try:
    features = _features(memoryview(payload))
    return Record(
      jpeg=_bytes_of(features, _first_of(_IMAGES, features)),
      label=_int64(_one_value(features, _first_of(_LABELS, features), kind=_THIRD)),
      identity=_text_of(features, IDENTITY),
      filename=_text_of(features, FILENAME),
    )
  except ValueError as error:
    raise errors.DataError(f"not a face record ({error}).") from error


def frame(payload: bytes) -> bytes:
  """Returns `payload` framed as TFRecord stores it."""
  header = struct.pack("<Q", len(payload))
  return b"".join(
    (
      header,
      struct.pack("<I", masked_crc(header)),
      payload,
      struct.pack("<I", masked_crc(payload)),
    )
  )


def unframe(framed: bytes) -> bytes:
  """Returns the payload of one whole framed record after checking both CRCs.

  Raises:
    errors.DataError: The length or a CRC does not match.
  """
  if len(framed) < HEADER_BYTES + FOOTER_BYTES:
    raise errors.DataError("the record is cut off.")
  length, length_crc = struct.unpack_from("<QI", framed)
  if length_crc != masked_crc(bytes(framed[:8])):
    raise errors.DataError("CRC mismatch in the record's length.")
  if length != len(framed) - HEADER_BYTES - FOOTER_BYTES:
    raise errors.DataError("the record's length is not the index's.")
  payload = bytes(framed[HEADER_BYTES:-FOOTER_BYTES])
  if struct.unpack_from("<I", framed, len(framed) - FOOTER_BYTES)[0] != masked_crc(
    payload
  ):
    raise errors.DataError("CRC mismatch.")
  return payload


def kind_of_shard(path: str) -> str | None:
  """Returns what a shard is that holds no records, as `storage.kind_of` says it.

  None of a file that begins with a record, or with what is not known.
  """
  head = storage.read_range(path, 0, min(storage.size(path), storage.HEAD_BYTES))
  if head[8:HEADER_BYTES] == struct.pack("<I", masked_crc(head[:8])):
    return None
  return storage.kind_of(head)


def masked_crc(content: bytes) -> int:
  """Returns TFRecord's masked CRC-32C: rotated right by 15 bits plus a constant."""
  crc = google_crc32c.value(content)
  return (((crc >> 15) | (crc << 17)) + _CRC_MASK_DELTA) & 0xFFFFFFFF


def _before_bytes(key: bytes, length: int) -> bytes:
  """Returns what stands in an Example before a value of `length` bytes."""
  value = b"\n" + _varint(length)
  values = b"\n" + _varint(len(value) + length)
  feature = b"\x12" + _varint(len(values) + len(value) + length)
  entry = len(key) + len(feature) + len(values) + len(value) + length
  return b"".join((b"\n", _varint(entry), key, feature, values, value))


def _sized(content: bytes) -> bytes:
  """Returns a message's first field: its tag, its length and its content."""
  return b"\n" + _varint(len(content)) + content


def _varint(value: int) -> bytes:
  """Returns a number in groups of seven bits, the lowest first."""
  if value < 0x80:
    return bytes((value,))
  return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


def _features(example: memoryview) -> dict[str, memoryview]:
  """Returns an Example's features, each as the bytes of its message.

  Raises:
    ValueError: It is no Example, or has a feature twice.
  """
  found: dict[str, memoryview] = {}
  for tag, features in _fields(example):
    if tag != _FIRST:
      continue
    for _, entry in _fields(features):
      parts = dict(_fields(entry))
      name = bytes(parts.get(_FIRST, b"")).decode()
      if name in found:
        raise ValueError(f"it has {name!r} twice")
      found[name] = memoryview(parts.get(_SECOND, b""))
  return found


def _first_of(names: tuple[str, ...], features: Mapping[str, memoryview]) -> str:
  """Returns the first of these features that is there; ValueError if none is."""
  for name in names:
    if name in features:
      return name
  held = ", ".join(sorted(features)[:_SHOWN_FEATURES]) or "nothing"
  raise ValueError(f"it has no {' or '.join(names)}, only {held:.200}")


def _bytes_of(features: Mapping[str, memoryview], name: str) -> bytes:
  """Returns the one byte string of a feature; ValueError unless it is one."""
  return _one_value(features, name, kind=_FIRST)


def _text_of(features: Mapping[str, memoryview], name: str) -> str:
  """Returns a feature's text, empty where there is none.

  What is no UTF-8 is read as Latin-1, which gives every byte a letter.
  """
  if name not in features:
    return ""
  content = _bytes_of(features, name)
  try:
    return content.decode()
  except UnicodeDecodeError:
    return content.decode("latin-1")


def _one_value(features: Mapping[str, memoryview], name: str, *, kind: int) -> bytes:
  """Returns the one value in a feature; ValueError unless it is one, of that kind.

  Its kind is its list's tag: FIRST for bytes, SECOND for floats, THIRD for whole
  numbers.
  """
  # No more than two of each, not a million, to count them.
  lists = list(itertools.islice(_fields(features[name]), 2))
  tags = [tag for tag, _ in lists]
  if tags != [kind]:
    held = _KINDS.get(tags[0], "unknown") if tags else "empty"
    raise ValueError(f"{name} is {held}, where one {_KINDS[kind]} is needed")
  values = list(itertools.islice(_fields(lists[0][1]), 2))
  if len(values) != 1 or values[0][0] not in (_FIRST, _FIRST_NUMBER):
    raise ValueError(f"{name} does not have one value")
  return bytes(values[0][1])


def _int64(packed: bytes) -> int:
  """Returns the one signed number in a packed list; ValueError unless it is one."""
  number, end = _read_varint(memoryview(packed), 0)
  if end != len(packed):
    raise ValueError("its label does not have one value")
  return number - (1 << 64) if number >> 63 else number


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
  """Yields tag and content of each of a message's fields; a number's is its varint.

  Raises:
    ValueError: A field is cut off, has no number, or is a group, which none may be.
  """
  start, end = 0, len(message)
  while start < end:
    tag, start = _read_varint(message, start)
    if tag & 7 == _SIZED:
      length, start = _read_varint(message, start)
    elif tag & 7 == _VARINT:
      length = _read_varint(message, start)[1] - start
    elif tag & 7 in _FIXED_BYTES:
      length = _FIXED_BYTES[tag & 7]
    else:
      raise ValueError(f"wire type {tag & 7}")
    if length > end - start or tag < 8:
      raise ValueError("it is cut off")
    yield tag, message[start : start + length]
    start += length


def _read_varint(content: memoryview, start: int) -> tuple[int, int]:
  """Returns the 64-bit number that starts there and where it ends; or ValueError."""
  number = 0
  for place, byte in enumerate(content[start : start + _VARINT_BYTES]):
    number |= (byte & 0x7F) << 7 * place
    if byte < 0x80:
      return number & 0xFFFFFFFFFFFFFFFF, start + place + 1
  raise ValueError("a number does not end")


_LABEL_KEY, _IDENTITY_KEY, _IMAGE_KEY, _FILENAME_KEY = (
  _sized(name.encode()) for name in (LABEL, IDENTITY, IMAGE, FILENAME)
)
_FORMAT_ENTRY = _before_bytes(_sized(FORMAT.encode()), 4) + b"jpeg"
