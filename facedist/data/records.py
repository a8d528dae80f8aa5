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
  """Returns the record as a serialised `tf.train.Example`, the same bytes each time."""
  import tensorflow as tf  # a reader of framed records does without it

  def feature(*values: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

  features = {
    IMAGE: feature(record.jpeg),
    FORMAT: feature(b"jpeg"),
    LABEL: tf.train.Feature(int64_list=tf.train.Int64List(value=[record.label])),
    IDENTITY: feature(record.identity.encode()),
    FILENAME: feature(record.filename.encode()),
  }
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return bytes(example.SerializeToString(deterministic=True))


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
