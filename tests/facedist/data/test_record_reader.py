"""Records by number: the right ones, and errors that name each kind of corruption."""

import concurrent.futures
import io
import json
import os
import pathlib

import cv2
import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from PIL import Image

from facedist import errors
from facedist.data import image_source, noise
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import integrity, manifest, open_files, shard_index, tfrecord
from tests import files, noise_sets

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


def write_images(folder: str, jpegs: list[bytes]) -> None:
  """Writes JPEGs, whatever they are, as a set whose manifest says SIZE."""
  noise_sets.write(folder, identities=1, images=1, size=SIZE)
  content = [tfrecord.Record(jpeg, 0, "n0", "n0/0.jpg") for jpeg in jpegs]
  split = noise.write_split(folder, "train", content, num_shards=1)
  described = manifest.load(folder)
  described.splits["train"] = split
  manifest.save(described, folder)


def jpeg_of(height: int, width: int, channels: int = 3) -> bytes:
  pixels = np.random.default_rng(0).integers(
    0, 256, (height, width, channels), np.uint8
  )
  colorspace = "RGB" if channels == 3 else "GRAY"
  return simplejpeg.encode_jpeg(pixels, colorspace=colorspace)


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


def test_no_numbers_give_an_empty_batch(folder):
  images, labels = local_reader.open_reader(folder, "train").read_batch(
    np.zeros(0, np.int64)
  )
  assert images.shape == (0, SIZE, SIZE, 3)
  assert labels.shape == (0,)


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


def test_a_grey_jpeg_has_three_equal_channels(tmp_path):
  write_images(str(tmp_path), [jpeg_of(SIZE, SIZE, channels=1)])
  images, _ = local_reader.open_reader(str(tmp_path), "train").read_batch(np.array([0]))
  np.testing.assert_array_equal(images[..., 0], images[..., 2])
  assert images.std() > 10


def test_each_batch_has_its_own_aligned_memory(folder):
  opened = local_reader.open_reader(folder, "train")
  batches = [opened.read_batch(np.arange(3))[0] for _ in range(4)]
  assert all(batch.ctypes.data % 64 == 0 for batch in batches)
  for number, batch in enumerate(batches):
    assert not any(np.shares_memory(batch, other) for other in batches[:number])


def test_many_threads_read_the_same(folder):
  opened = local_reader.open_reader(folder, "train")
  alone, _ = opened.read_batch(np.arange(20))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for images, _ in pool.map(opened.read_batch, [np.arange(20)] * 32):
      np.testing.assert_array_equal(images, alone)


def test_a_reader_closes_its_files(folder):
  before = len(os.listdir("/proc/self/fd"))
  opened = local_reader.open_reader(folder, "train")
  assert len(os.listdir("/proc/self/fd")) == before + 3
  del opened
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_flipped_byte_is_named_by_shard_record_and_byte(folder):
  row = row_of(folder, shard=1, record=2)
  path = shard_paths(folder)[1]
  files.flip_byte(path, int(row["offset"]) + 40)
  opened = local_reader.open_reader(folder, "train")
  opened.read_batch(np.array([7, 9]))  # the shards hold 6, 7 and 7 records
  with pytest.raises(errors.DataError) as caught:
    opened.read_batch(np.array([7, 8, 9]))
  assert str(caught.value) == (
    f"{path}, record 2 at byte {row['offset']}: CRC mismatch; rebuild this shard with "
    "--only_shards=1."
  )


def test_crc_checks_can_be_turned_off(folder):
  row = row_of(folder, shard=0, record=0)
  # The last byte before the image's: the payload differs, the image does not.
  files.flip_byte(shard_paths(folder)[0], int(row["offset"] + row["length"]) - 5)
  with pytest.raises(errors.DataError, match="CRC mismatch"):
    local_reader.open_reader(folder, "train").read(np.array([0]))
  jpegs, _ = local_reader.open_reader(folder, "train", verify_crc=False).read(
    np.array([0])
  )
  assert jpegs[0].startswith(b"\xff\xd8")


@pytest.mark.parametrize(
  ("height", "width"), [(SIZE, 2 * SIZE), (12, 48), (8, 8), (96, 6)]
)
def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path, height, width):
  write_images(str(tmp_path), [jpeg_of(SIZE, SIZE), jpeg_of(height, width)])
  opened = local_reader.open_reader(str(tmp_path), "train")
  opened.read_batch(np.array([0]))
  with pytest.raises(
    errors.DataError,
    match=rf"train-00000-of-00001.tfrecord, record 1 at byte \d+: the image has "
    rf"{width}x{height} pixels, but the manifest says 24x24",
  ):
    opened.read_batch(np.array([0, 1]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_others_tagged_are_upright_as_embed_sees_their_files(
  tmp_path, orientation
):
  exif = Image.Exif()
  exif[0x0112] = orientation
  stream = io.BytesIO()
  Image.open(io.BytesIO(jpeg_of(SIZE, SIZE))).save(stream, "JPEG", exif=exif)
  plain, tagged = jpeg_of(SIZE, SIZE), stream.getvalue()
  write_images(str(tmp_path), [plain, tagged])
  pixels, _ = local_reader.open_reader(str(tmp_path), "train").read_batch(
    np.array([0, 1])
  )
  for found, file in zip(pixels, (plain, tagged), strict=True):
    np.testing.assert_array_equal(found, image_source.decode(file, image_size=SIZE))
  with staged_dataset.open_set(str(tmp_path), "unused") as data:
    faces = [one() for one in image_source.loaders(data, "train", image_size=SIZE)]
  np.testing.assert_array_equal([face.image for face in faces], pixels)


@pytest.mark.parametrize(
  ("content", "reason"),
  [(b"this is no image", "not a JPEG"), (jpeg_of(SIZE, SIZE)[:-300], "broken JPEG")],
)
def test_an_image_that_is_no_whole_jpeg_is_named(tmp_path, content, reason):
  write_images(str(tmp_path), [content])
  with pytest.raises(errors.DataError, match=f"record 0 at byte 0: {reason}"):
    local_reader.open_reader(str(tmp_path), "train").read_batch(np.array([0]))


def test_a_shard_cut_off_while_it_is_read_is_named(folder):
  opened = local_reader.open_reader(folder, "train")
  os.truncate(shard_paths(folder)[2], 100)
  for verify_crc in (True, False):
    opened._verify_crc = verify_crc
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


def test_a_missing_split_is_a_data_error(folder):
  with pytest.raises(errors.DataError, match="no split 'images', only train, val"):
    local_reader.open_reader(folder, "images")


def test_a_label_that_no_identity_has_is_named(folder):
  path = os.path.join(folder, manifest.MANIFEST_NAME)
  content = json.loads(pathlib.Path(path).read_text())
  content["identities"] = content["identities"][:1]
  pathlib.Path(path).write_text(json.dumps(content))
  shards = local_reader.open_reader(folder, "train")
  with pytest.raises(errors.DataError, match=r"its label is .* has 1 identities"):
    shards.read_batch(np.arange(shards.num_records))
