"""Records of shards: the Example schema and the TFRecord framing.

A record is `uint64 length, uint32 crc(length), payload, uint32 crc(payload)`, little
endian, with masked CRC-32C (TensorFlow's `tf.io.TFRecordWriter` format). The payload
is a `tf.train.Example` with the feature names of TensorFlow's image classification
data sets, so that `tf.data`, DALI and others read the shards without this project.

Shards written by other programs are read too: image and label may have other feature
names, and identity and file name may be missing.
"""

import dataclasses
import functools
import struct
from collections.abc import Mapping
from typing import Any

import google_crc32c
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message,
  message_factory,
  text_format,
)

from facedist import errors, storage

IMAGE = "image/encoded"
LABEL = "image/class/label"
IDENTITY = "image/class/text"
FILENAME = "image/filename"
FORMAT = "image/format"

_IMAGES = (IMAGE, "image", "image_raw")
_LABELS = (LABEL, "label", "image/source_id")
"""Also the names of TensorFlow Datasets, InsightFace_TF and arcface-tf2."""

HEADER_BYTES = 12
FOOTER_BYTES = 4
MAX_PAYLOAD_BYTES = 64 << 20
"""The longest record accepted when a shard is read without its index."""
_CRC_MASK_DELTA = 0xA282EAD8


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
    """Names that a manifest may have for the identity: its own, or `named_by`'s."""
    own = (self.identity,) if self.identity else ()
    return *own, named_by(self.identity, self.label)


def named_by(identity: str, label: int) -> str:
  """Returns a name that holds the label, where `identity` is empty or not unique."""
  return f"{identity}-label{label:07d}" if identity else f"label{label:07d}"


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


def masked_crc(content: bytes) -> int:
  """Returns TFRecord's masked CRC-32C: rotated right by 15 bits plus a constant."""
  crc = google_crc32c.value(content)
  return (((crc >> 15) | (crc << 17)) + _CRC_MASK_DELTA) & 0xFFFFFFFF


def kind_of_shard(path: str) -> str | None:
  """Returns the kind of a file that is not a shard, see `storage.kind_of`.

  None if it begins with a record, or is of no known kind.
  """
  head = storage.read_range(path, 0, min(storage.size(path), storage.HEAD_BYTES))
  if head[8:HEADER_BYTES] == struct.pack("<I", masked_crc(head[:8])):
    return None
  return storage.kind_of(head)


def serialize(record: Record) -> bytes:
  """Returns the record as a serialised `tf.train.Example`, the same bytes each time.

  The bytes are those of `SerializeToString(deterministic=True)`. They are assembled
  here because TensorFlow's import takes seconds and half a gigabyte in each process of
  a builder, and its message a tenth of the time of an image. An Example is a length and
  entries in the order of their keys; an entry is a length, the key, and the value in a
  list in a Feature, each with its length
  (https://protobuf.dev/programming-guides/encoding).

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


def _before_bytes(key: bytes, length: int) -> bytes:
  """Returns the bytes of an Example that precede a value of `length` bytes."""
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


_LABEL_KEY, _IDENTITY_KEY, _IMAGE_KEY, _FILENAME_KEY = (
  _sized(name.encode()) for name in (LABEL, IDENTITY, IMAGE, FILENAME)
)
_FORMAT_ENTRY = _before_bytes(_sized(FORMAT.encode()), 4) + b"jpeg"

_SHOWN_FEATURES = 8
_EXAMPLE_SCHEMA = """
name: "facedist/example.proto" package: "facedist" syntax: "proto3"
message_type {
  name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "FloatList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT }
}
message_type {
  name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Feature"
  oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: ".facedist.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: ".facedist.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: ".facedist.Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  nested_type {
    name: "FeatureEntry"
    options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: ".facedist.Feature" }
  }
  field {
    name: "feature" number: 1 label: LABEL_REPEATED
    type_name: ".facedist.Features.FeatureEntry"
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type_name: ".facedist.Features" }
}
"""


def parse(payload: bytes) -> Record:
  """Reads a record from a `tf.train.Example` of this project or of others.

  Features of other names are skipped.

  Raises:
    errors.DataError: The payload is no Example, lacks image or label, or has more or
      less than one value in a feature.
  """
  try:
    features = _example_class().FromString(payload).features.feature
    return Record(
      jpeg=_value_of(features, _first_of(_IMAGES, features), kind="bytes"),
      label=_value_of(features, _first_of(_LABELS, features), kind="int64"),
      identity=_text_of(features, IDENTITY),
      filename=_text_of(features, FILENAME),
    )
  except (message.DecodeError, ValueError) as error:
    raise errors.DataError(f"not a face record ({error}).") from error


def _first_of(names: tuple[str, ...], features: Mapping[str, Any]) -> str:
  """Returns the first of these names that is a feature; ValueError if none is."""
  for name in names:
    if name in features:
      return name
  held = ", ".join(sorted(features)[:_SHOWN_FEATURES]) or "nothing"
  raise ValueError(f"it has no {' or '.join(names)}, only {held:.200}")


def _text_of(features: Mapping[str, Any], name: str) -> str:
  """Returns a feature's text, empty if there is none.

  Text that is not UTF-8 is read as Latin-1, in which every byte is a letter.
  """
  if name not in features:
    return ""
  content: bytes = _value_of(features, name, kind="bytes")
  try:
    return content.decode()
  except UnicodeDecodeError:
    return content.decode("latin-1")


def _value_of(features: Mapping[str, Any], name: str, *, kind: str) -> Any:
  """Returns the one value of a feature; ValueError unless it is one of that kind."""
  held = features[name].WhichOneof("kind")
  if held != f"{kind}_list":
    found = held.removesuffix("_list") if held else "empty"
    raise ValueError(f"{name} is {found}, where one {kind} is needed")
  values = getattr(features[name], held).value
  if len(values) != 1:
    raise ValueError(f"{name} does not have one value")
  return values[0]


@functools.cache
def _example_class() -> Any:
  """Returns the message class of `tf.train.Example`, made without TensorFlow.

  TensorFlow's import takes seconds and half a gigabyte in each of a tool's processes.
  """
  schema = text_format.Parse(_EXAMPLE_SCHEMA, descriptor_pb2.FileDescriptorProto())
  pool = descriptor_pool.DescriptorPool()
  pool.AddSerializedFile(schema.SerializeToString())
  example = pool.FindMessageTypeByName("facedist.Example")
  return message_factory.GetMessageClass(example)
