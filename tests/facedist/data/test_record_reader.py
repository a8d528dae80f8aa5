"""Records by number: the right ones, and errors that name each kind of corruption."""

import dataclasses
import io
import os
import pathlib

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from facedist import errors
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import integrity, manifest, open_files, shard_index, tfrecord
from tests import noise_sets

SIZE = 24


@pytest.fixture
def folder(tmp_path) -> str:
  noise_sets.write(tmp_path, identities=4, images=5, val_images=1, size=SIZE, shards=3)
  return str(tmp_path)


def stored(folder: str, split: str) -> list[tfrecord.Record]:
  """Reads a split as anyone would: with TensorFlow, without the index."""
  names = sorted(str(path) for path in pathlib.Path(folder).glob(f"{split}-*.tfrecord"))
  dataset = tf.data.TFRecordDataset(names)
  return [tfrecord.parse(payload) for payload in dataset.as_numpy_iterator()]


def shard_paths(folder: str) -> list[pathlib.Path]:
  return sorted(pathlib.Path(folder).glob("train-*.tfrecord"))


def row_of(folder: str, *, shard: int, record: int) -> np.void:
  path = str(shard_paths(folder)[shard])
  return shard_index.load(shard_index.index_name(path))[record]


@pytest.mark.parametrize("ids", [range(20), [19, 0, 7, 7, 13, 6]])
def test_records_are_numbered_in_manifest_order_and_read_in_any(folder, ids):
  expected = stored(folder, "train")
  opened = local_reader.open_reader(folder, "train")
  assert opened.num_records == len(expected) == 20
  jpegs, labels = opened.read(np.array(ids))
  assert jpegs == [expected[number].jpeg for number in ids]
  assert labels.dtype == np.int32
  assert labels.tolist() == [expected[number].label for number in ids]


def test_a_set_with_too_many_files_to_hold_open_is_read_the_same(folder, monkeypatch):
  images, labels = local_reader.open_reader(folder, "train").read_batch(np.arange(20))
  monkeypatch.setattr(local_reader, "_WHOLE_INDEX_BYTES", 0)
  monkeypatch.setattr(open_files, "max_open", lambda: 2)
  before = len(os.listdir("/proc/self/fd"))
  opened = local_reader.open_reader(folder, "train")
  for ids in (np.arange(20), np.array([19, 0, 7])):
    large_images, large_labels = opened.read_batch(ids)
    np.testing.assert_array_equal(large_images, images[ids])
    np.testing.assert_array_equal(large_labels, labels[ids])
  assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2  # of shards and indexes


def test_pixels_are_those_of_libjpeg_in_rgb_order(folder):
  ids = np.array([3, 11, 0])
  expected = stored(folder, "train")
  images, labels = local_reader.open_reader(folder, "train").read_batch(ids)
  assert images.dtype == np.uint8
  assert labels.tolist() == [expected[number].label for number in ids]
  for image, number in zip(images, ids, strict=True):
    encoded = np.frombuffer(expected[number].jpeg, np.uint8)
    bgr = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(image, bgr[..., ::-1])


def test_a_reader_closes_its_files(folder):
  before = len(os.listdir("/proc/self/fd"))
  opened = local_reader.open_reader(folder, "train")
  assert len(os.listdir("/proc/self/fd")) == before + 3
  del opened
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_flipped_byte_is_named_by_shard_record_and_byte(folder):
  noise_sets.corrupt(folder, "train", 8)
  row = row_of(folder, shard=1, record=2)
  opened = local_reader.open_reader(folder, "train")
  opened.read_batch(np.array([7, 9]))  # the shards hold 6, 7 and 7 records
  with pytest.raises(errors.DataError) as caught:
    opened.read_batch(np.array([7, 8, 9]))
  assert str(caught.value) == (
    f"{shard_paths(folder)[1]}, record 2 at byte {row['offset']}: CRC mismatch; "
    "rebuild this shard with --only_shards=1."
  )


def test_crc_checks_can_be_turned_off(folder):
  noise_sets.corrupt(folder, "train", 0)
  unchecked = local_reader.open_reader(folder, "train", verify_crc=False)
  (jpeg,), _ = unchecked.read(np.array([0]))
  assert jpeg.startswith(b"\xff\xd8")


def jpeg_of(height: int = SIZE, **options: object) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (height, SIZE, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "JPEG", **options)
  return stream.getvalue()


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"this is no image", "not a JPEG"),
    (jpeg_of()[:-300], "broken JPEG"),
    (jpeg_of(12), "the image has 24x12 pixels, but the manifest says 24x24"),
  ],
)
def test_an_image_that_is_no_whole_jpeg_of_the_size_is_named(tmp_path, content, reason):
  noise_sets.write_jpegs(tmp_path, [jpeg_of(), content], size=SIZE)
  opened = local_reader.open_reader(str(tmp_path), "train")
  opened.read_batch(np.array([0]))
  with pytest.raises(
    errors.DataError,
    match=rf"train-00000-of-00001.tfrecord, record 1 at byte \d+: {reason}",
  ):
    opened.read_batch(np.array([0, 1]))


def test_images_that_others_tagged_are_upright_as_embed_sees_their_files(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  jpegs = [jpeg_of(), jpeg_of(exif=exif)]
  noise_sets.write_jpegs(tmp_path, jpegs, size=SIZE)
  opened = local_reader.open_reader(str(tmp_path), "train")
  pixels, _ = opened.read_batch(np.array([0, 1]))
  expected = [image_source.decode(jpeg, image_size=SIZE) for jpeg in jpegs]
  np.testing.assert_array_equal(pixels, expected)
  with staged_dataset.open_set(str(tmp_path), "unused") as data:
    faces = [one() for one in image_source.loaders(data, "train", image_size=SIZE)]
  np.testing.assert_array_equal([face.image for face in faces], expected)


@pytest.mark.parametrize("verify_crc", [True, False])
def test_a_shard_cut_off_while_it_is_read_is_named(folder, verify_crc):
  opened = local_reader.open_reader(folder, "train", verify_crc=verify_crc)
  os.truncate(shard_paths(folder)[2], 100)
  with pytest.raises(errors.DataError, match=r"train-00002.* was replaced while it"):
    opened.read(np.array([19]))


def test_a_shard_replaced_while_it_is_read_is_told_from_corruption(folder):
  path = shard_paths(folder)[1]
  opened = local_reader.open_reader(folder, "train")
  opened.read_batch(np.arange(20))
  path.write_bytes(bytes(path.stat().st_size))  # in place, as a careless copy does
  with pytest.raises(
    errors.DataError, match=f"{path.name} was replaced while"
  ) as error:
    opened.read_batch(np.array([8]))
  assert not isinstance(error.value, integrity.BadRecordError)  # so it is never skipped


def test_a_shard_replaced_by_a_rename_is_read_to_the_end_as_it_was(folder):
  path = shard_paths(folder)[1]
  opened = local_reader.open_reader(folder, "train")
  before, _ = opened.read_batch(np.arange(20))
  other = path.with_suffix(".new")
  other.write_bytes(bytes(path.stat().st_size))
  other.replace(path)
  after, _ = opened.read_batch(np.arange(20))
  np.testing.assert_array_equal(before, after)


def test_records_that_do_not_start_where_the_index_says_are_told_from_corruption(
  folder,
):
  path = shard_paths(folder)[0]
  content = path.read_bytes()
  path.write_bytes(content[16:] + content[:16])  # of the same length, shifted
  opened = local_reader.open_reader(folder, "train")
  with pytest.raises(
    errors.DataError, match=r"record 1 at byte .*no record starts here: the index does"
  ):
    opened.read(np.array([1]))


def test_a_record_of_another_length_than_the_index_says_is_told_from_corruption(folder):
  row = row_of(folder, shard=0, record=0)
  payload = tfrecord.frame(bytes(int(row["length"]) - 17))  # a byte shorter
  path = shard_paths(folder)[0]
  content = path.read_bytes()
  path.write_bytes(payload + content[len(payload) :])
  length = int(row["length"]) - 16
  with pytest.raises(
    errors.DataError,
    match=f"record 0 at byte 0: the index does not match the shard: it says {length} "
    f"bytes, the record has {length - 1}",
  ):
    local_reader.open_reader(folder, "train").read(np.array([0]))


def test_a_label_that_no_identity_has_is_named(folder):
  content = manifest.load(folder)
  manifest.save(dataclasses.replace(content, identities=content.identities[:1]), folder)
  shards = local_reader.open_reader(folder, "train")
  with pytest.raises(errors.DataError, match=r"its label is .* has 1 identities"):
    shards.read_batch(np.arange(shards.num_records))
