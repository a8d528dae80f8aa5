"""facedist.data.shards.tfrecord against TensorFlow's own reader and writer."""

import pathlib
import struct

import pytest
import tensorflow as tf
from google.protobuf import message
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data.shards import tfrecord

RECORD = tfrecord.Record(b"\xff\xd8 jpeg", 7, "n000002", "n000002/0001_01.jpg")


@given(payload=st.binary(max_size=300))
def test_unframing_returns_what_was_framed(payload: bytes):
  framed = tfrecord.frame(payload)
  assert len(framed) == tfrecord.HEADER_BYTES + len(payload) + tfrecord.FOOTER_BYTES
  assert tfrecord.unframe(framed) == payload
  assert tfrecord.unframe(memoryview(framed)) == payload


def test_framed_bytes_equal_those_of_tensorflow_s_writer(tmp_path: pathlib.Path):
  payloads = [b"", b"a", bytes(range(256)) * 17]
  path = tmp_path / "tf.tfrecord"
  with tf.io.TFRecordWriter(str(path)) as writer:
    for payload in payloads:
      writer.write(payload)
  assert path.read_bytes() == b"".join(map(tfrecord.frame, payloads))


@given(
  jpeg=st.binary(max_size=40) | st.integers(0, 70_000).map(bytes),
  label=st.integers(0, 2**63 - 1),
  identity=st.text(max_size=200),
  filename=st.text(max_size=20),
)
def test_a_record_is_stored_as_tensorflow_s_own_example_and_parsed_back(
  jpeg: bytes, label: int, identity: str, filename: str
):
  texts = {
    "image/encoded": jpeg,
    "image/format": b"jpeg",
    "image/class/text": identity.encode(),
    "image/filename": filename.encode(),
  }
  example = tf.train.Example()
  for name, value in texts.items():
    example.features.feature[name].bytes_list.value.append(value)
  example.features.feature["image/class/label"].int64_list.value.append(label)
  record = tfrecord.Record(jpeg, label, identity, filename)
  payload = example.SerializeToString(deterministic=True)
  assert tfrecord.serialize(record) == payload
  assert tfrecord.parse(payload) == record


@given(
  payload=st.binary(min_size=1, max_size=60),
  position=st.integers(0, 10**6),
  bit=st.integers(0, 7),
)
def test_one_flipped_bit_anywhere_is_found(payload: bytes, position: int, bit: int):
  framed = bytearray(tfrecord.frame(payload))
  framed[position % len(framed)] ^= 1 << bit
  with pytest.raises(errors.DataError):
    tfrecord.unframe(bytes(framed))


@pytest.mark.parametrize("kept", [0, 11, 15, 16, 20])
def test_a_cut_record_is_a_data_error(kept: int):
  with pytest.raises(errors.DataError):
    tfrecord.unframe(tfrecord.frame(b"payload!!")[:kept])


def test_a_corrupt_record_says_what_does_not_match():
  framed = bytearray(tfrecord.frame(b"payload"))
  framed[tfrecord.HEADER_BYTES] ^= 1
  with pytest.raises(errors.DataError, match=r"^CRC mismatch\.$"):
    tfrecord.unframe(bytes(framed))
  with pytest.raises(errors.DataError, match="CRC mismatch in the record's length"):
    tfrecord.unframe(struct.pack("<Q", 8) + tfrecord.frame(b"payload")[8:])


def feature(**lists: list[object]) -> tf.train.Feature:
  """Returns a feature with the given list, such as int64=[1]."""
  ((kind, values),) = lists.items()
  made = tf.train.Feature()
  getattr(made, f"{kind}_list").value.extend(values)
  return made


def example(**changes: tf.train.Feature | None) -> bytes:
  """Returns RECORD as TensorFlow writes it, with some features changed or left out."""
  made = tf.train.Example.FromString(tfrecord.serialize(RECORD))
  for name, value in changes.items():
    key = {"jpeg": tfrecord.IMAGE, "label": tfrecord.LABEL, "name": tfrecord.FILENAME}
    if value is None:
      del made.features.feature[key[name]]
    else:
      made.features.feature[key[name]].CopyFrom(value)
  return made.SerializeToString()


def test_what_tensorflow_writes_is_read_with_features_of_other_names():
  made = tf.train.Example.FromString(example(label=feature(int64=[-3])))
  made.features.feature["embedding"].CopyFrom(feature(float=[1.0, 2.0]))
  label = tfrecord.Record(RECORD.jpeg, -3, RECORD.identity, RECORD.filename)
  assert tfrecord.parse(made.SerializeToString()) == label


@pytest.mark.parametrize(
  ("image", "label"),
  [
    ("image/encoded", "image/class/label"),
    ("image/encoded", "image/source_id"),
    ("image", "label"),
    ("image_raw", "label"),
  ],
)
def test_image_and_label_of_other_programs_are_read_without_text_and_name(
  image: str, label: str
):
  made = tf.train.Example()
  made.features.feature[image].CopyFrom(feature(bytes=[RECORD.jpeg]))
  made.features.feature[label].CopyFrom(feature(int64=[12]))
  read = tfrecord.parse(made.SerializeToString())
  assert read == tfrecord.Record(RECORD.jpeg, 12, "", "")
  assert read.names == ("label0000012",)


def test_text_that_is_no_utf_8_is_read_as_latin_1():
  text = "Zo\u00eb/1.jpg"
  payload = example(name=feature(bytes=[text.encode("latin-1")]))
  assert tfrecord.parse(payload).filename == text


@pytest.mark.parametrize(
  ("payload", "reason"),
  [
    (
      example(label=None),
      "it has no image/class/label or label or image/source_id, only image/class/text, "
      "image/encoded, image/filename, image/format",
    ),
    (
      example(label=feature(bytes=[b"4"])),
      "image/class/label is bytes, where one int64 is needed",
    ),
    (
      example(label=feature(float=[4.0])),
      "image/class/label is float, where one int64 is needed",
    ),
    (example(label=feature(int64=[])), "image/class/label does not have one value"),
    (example(label=feature(int64=[1, 2])), "image/class/label does not have one value"),
    (
      example(jpeg=feature(bytes=[b"a", b"b"])),
      "image/encoded does not have one value",
    ),
    (b"", "only nothing"),
    (tfrecord.serialize(RECORD)[:-3], "Error parsing message"),
    (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "Error parsing message"),
    (b"\n" + b"\x80" * 1000, "Error parsing message"),
    (b"\x0b" * 1000, "Error parsing message"),
  ],
)
def test_a_payload_says_why_it_is_no_face_record(payload: bytes, reason: str):
  with pytest.raises(errors.DataError, match=f"^not a face record .*{reason}"):
    tfrecord.parse(payload)


@given(data=st.binary(max_size=200), cut=st.integers(0, 200), at=st.integers(0, 200))
def test_any_bytes_are_a_data_error_or_what_tensorflow_reads(
  data: bytes, cut: int, at: int
):
  valid = tfrecord.serialize(RECORD)
  for payload in (data, valid[:at] + data + valid[at + cut :]):
    try:
      record = tfrecord.parse(payload)
      known = tf.train.Example.FromString(payload).features.feature
    except (errors.DataError, message.DecodeError):
      continue
    assert record.jpeg == known[tfrecord.IMAGE].bytes_list.value[0]
    assert record.label == known[tfrecord.LABEL].int64_list.value[0]
