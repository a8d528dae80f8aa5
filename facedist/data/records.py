"""One record: the Example schema and TFRecord's framing of it.

A record is `uint64 length, uint32 crc(length), payload, uint32 crc(payload)`, little
endian, with masked CRC-32C (TensorFlow's `tf.io.TFRecordWriter` format). The payload
is a `tf.train.Example` with the feature names of TensorFlow's image classification
data sets, so that `tf.data`, DALI and others read the shards without this project.
"""

import dataclasses
import struct

import google_crc32c

from facedist import errors

IMAGE = "image/encoded"
LABEL = "image/class/label"
IDENTITY = "image/class/text"
FILENAME = "image/filename"
FORMAT = "image/format"

HEADER_BYTES = 12
FOOTER_BYTES = 4
_CRC_MASK_DELTA = 0xA282EAD8


@dataclasses.dataclass(frozen=True)
class Record:
  """One face image and what is known of it.

  Attributes:
    jpeg: The encoded image.
    label: Number of the identity in the manifest.
    identity: Name of the identity's folder, such as n000002.
    filename: The source image's path below the input folder.
  """

  jpeg: bytes
  label: int
  identity: str
  filename: str


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
  """Reads a record that `serialize` wrote.

  Raises:
    errors.DataError: The payload is no Example or lacks a feature.
  """
  import tensorflow as tf
  from google.protobuf import message

  try:
    features = tf.train.Example.FromString(payload).features.feature
    return Record(
      jpeg=features[IMAGE].bytes_list.value[0],
      label=features[LABEL].int64_list.value[0],
      identity=features[IDENTITY].bytes_list.value[0].decode(),
      filename=features[FILENAME].bytes_list.value[0].decode(),
    )
  except (message.DecodeError, IndexError, UnicodeDecodeError) as error:
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


_LABEL_KEY, _IDENTITY_KEY, _IMAGE_KEY, _FILENAME_KEY = (
  _sized(name.encode()) for name in (LABEL, IDENTITY, IMAGE, FILENAME)
)
_FORMAT_ENTRY = _before_bytes(_sized(FORMAT.encode()), 4) + b"jpeg"
