"""Images by name from folders and shards: valid, corrupt and replaced."""

import functools
import os
import pathlib
import threading

import cv2
import numpy as np
import pytest

from facedist import errors
from facedist.data import image_names, image_source
from facedist.data.cache import staged_dataset
from tests import files, noise_sets


def write_image(path: pathlib.Path, pixels: np.ndarray | None = None) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = flat(1) if pixels is None else pixels
  assert cv2.imwrite(str(path), pixels[..., ::-1])


def flat(value: int, height: int = 8, width: int = 8) -> np.ndarray:
  return np.full((height, width, 3), value, np.uint8)


def test_images_are_found_in_all_folders_in_order_of_their_parts(tmp_path):
  images = ["a/1.bmp", "a/deep/1.jpg", "a-b/1.webp", "b/10.png", "b/2.JPG", "z.jpeg"]
  others = ["notes.txt", "b/._2.jpg", ".cache/1.jpg", "noending"]
  for name in [*reversed(images), *others]:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  found = image_source.image_paths(str(tmp_path), image_names.NameFilter())
  assert list(found) == images


def test_links_are_followed_but_not_in_circles(tmp_path):
  write_image(tmp_path / "images" / "n1" / "1.png")
  (tmp_path / "input").mkdir()
  os.symlink(tmp_path / "images" / "n1", tmp_path / "input" / "linked")
  os.symlink(tmp_path / "input", tmp_path / "images" / "n1" / "back")
  assert list(
    image_source.image_paths(str(tmp_path / "input"), image_names.NameFilter())
  ) == ["linked/1.png"]


def test_the_parent_folder_is_the_identity(tmp_path):
  for name in ("n1/1.png", "test/n2/1.png", "loose.png"):
    write_image(tmp_path / name)
  faces = [load() for load in image_source.folder_loaders(str(tmp_path), image_size=8)]
  assert [(face.path, face.identity) for face in faces] == [
    ("loose.png", None),
    ("n1/1.png", "n1"),
    ("test/n2/1.png", "n2"),
  ]


def decoded(pixels: np.ndarray, image_size: int) -> np.ndarray:
  content = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
  return image_source.decode(content, image_size=image_size)


def test_an_image_of_the_right_size_stays_as_it_is():
  pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
  np.testing.assert_array_equal(decoded(pixels, 8), pixels)


def test_the_middle_square_is_shrunk_by_area():
  # 6 rows of 12 columns; the columns outside the middle six must not be seen.
  pixels = flat(255, 6, 12)
  pixels[:, 3:9] = 0
  pixels[0, 3], pixels[3, 6] = 90, 180
  # Means of blocks of 3 x 3, not their middle pixels.
  np.testing.assert_array_equal(decoded(pixels, 2)[..., 0], [[10, 0], [0, 20]])


def test_a_small_image_is_enlarged():
  np.testing.assert_array_equal(decoded(flat(70, 3, 5), 8), flat(70))


def test_files_that_are_no_whole_images_are_unreadable(tmp_path):
  (tmp_path / "2.jpg").write_bytes(b"")
  (tmp_path / "3.jpg").write_text("not an image")
  (tmp_path / "4.jpg").symlink_to(tmp_path / "gone.jpg")
  endings = (".bmp", ".jpg", ".png", ".webp")
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  for ending in endings:
    path = tmp_path / f"1{ending}"
    write_image(path, noise)
    os.truncate(path, path.stat().st_size // 2)
  loaded = [load() for load in image_source.folder_loaders(str(tmp_path), image_size=8)]
  assert [each.path for each in loaded] == [
    *(f"1{ending}" for ending in endings),
    *("2.jpg", "3.jpg", "4.jpg"),
  ]
  assert all(isinstance(each, image_source.Unreadable) for each in loaded)
  assert all("cut off" in each.reason for each in loaded[:4])
  assert loaded[-1].reason == "No such file or directory"


def test_threads_keep_the_order_and_read_a_bounded_number_ahead():
  gate = threading.Event()
  taken = []

  def load(number: int) -> image_source.Unreadable:
    if number == 0:  # the first is slow, and still the first
      gate.wait(10)
    return image_source.Unreadable(str(number), "")

  def loaders():
    for number in range(20):
      taken.append(number)
      yield functools.partial(load, number)

  loaded = image_source.load_in_order(loaders(), num_threads=4, ahead=6)
  threading.Timer(0.1, gate.set).start()
  assert next(loaded).path == "0"
  assert len(taken) == 7
  assert [each.path for each in loaded] == [str(number) for number in range(1, 20)]


def test_stopping_early_ends_all_threads():
  before = threading.active_count()
  loaders = [lambda: image_source.Unreadable("", "")] * 50
  loaded = image_source.load_in_order(loaders, num_threads=3, ahead=10)
  next(loaded)
  loaded.close()
  assert threading.active_count() == before


def test_names_that_are_no_utf_8_are_read_and_shown_escaped(tmp_path):
  write_image(tmp_path / "old" / "1.png")
  old, new = (os.fsencode(tmp_path) + name for name in (b"/old", b"/\xd5\xc5"))
  os.rename(old + b"/1.png", old + b"/caf\xe9.png")
  os.rename(old, new)
  (load,) = image_source.folder_loaders(str(tmp_path), image_size=8)
  face = load()
  assert (face.path, face.identity) == (r"\xd5\xc5/caf\xe9.png", r"\xd5\xc5")


def load(
  folder: object, split: str = "train", *, cache: object = "unused"
) -> list[image_source.Face | image_source.Unreadable]:
  with staged_dataset.open_set(
    str(folder), str(cache), accept_corrupt=True, keep=False
  ) as data:
    return [loader() for loader in image_source.loaders(data, split, image_size=16)]


def write_shards(folder: object) -> None:
  noise_sets.write(folder, identities=3, images=2, shards=2)


def test_records_come_in_order_with_path_and_identity(tmp_path):
  write_shards(tmp_path)
  faces = load(tmp_path)
  assert [(face.path, face.identity) for face in faces] == [
    (f"noise{identity:06d}/{image:04d}.jpg", f"noise{identity:06d}")
    for image in range(2)
    for identity in range(3)
  ]
  assert faces[0].image.shape == (16, 16, 3)


def test_a_corrupt_record_is_named_and_the_rest_are_read(tmp_path):
  write_shards(tmp_path)
  noise_sets.corrupt(str(tmp_path), "train", 3)
  loaded = load(tmp_path)
  valid = [isinstance(each, image_source.Face) for each in loaded]
  assert valid == [True, True, True, False, True, True]
  assert loaded[3].path == "train-00001-of-00002.tfrecord, record 0 at byte 0"
  assert "CRC" in loaded[3].reason


def test_an_unknown_split_is_an_error(tmp_path):
  write_shards(tmp_path)
  with pytest.raises(errors.DataError, match="no split 'val', only train"):
    load(tmp_path, "val")


def test_a_missing_shard_is_an_error_before_anything_is_read(tmp_path):
  write_shards(tmp_path)
  (tmp_path / "train-00001-of-00002.tfrecord").unlink()
  with (
    staged_dataset.open_set(str(tmp_path), "unused") as data,
    pytest.raises(errors.DataError, match=r"train-00001-of-00002.tfrecord does not"),
  ):
    next(image_source.loaders(data, "train", image_size=16))


def test_a_shard_replaced_while_it_is_read_is_told_from_corruption(tmp_path):
  write_shards(tmp_path)
  shard = tmp_path / "train-00001-of-00002.tfrecord"
  with staged_dataset.open_set(str(tmp_path), "unused") as data:
    loaders = list(image_source.loaders(data, "train", image_size=16))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(
      errors.DataError, match=f"{shard} was replaced while it was being read"
    ):
      loaders[3]()


def test_corruption_at_the_source_is_named_and_a_corrupt_copy_ends_the_run(
  bucket, tmp_path
):
  write_shards(f"{bucket}/faces")
  source = f"{bucket}/faces/train-00001-of-00002.tfrecord"
  files.flip_byte(source, 40)

  def readable() -> int:
    loaded = load(f"{bucket}/faces", cache=tmp_path)
    return sum(isinstance(each, image_source.Face) for each in loaded)

  assert readable() == 5
  files.flip_byte(source, 40)
  with pytest.raises(errors.CorruptCopyError, match="a restart fetches it again"):
    readable()
  assert readable() == 6
