"""Images by name from folders, valid and corrupt."""

import functools
import os
import pathlib
import threading

import cv2
import numpy as np
import pytest

from facedist.data import image_names, image_source


def _write(path: pathlib.Path, pixels: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  assert cv2.imwrite(str(path), pixels[..., ::-1])


def _flat(value: int, height: int = 8, width: int = 8) -> np.ndarray:
  return np.full((height, width, 3), value, np.uint8)


def test_images_are_found_in_all_folders_in_order_of_their_parts(tmp_path):
  for name in (
    "b/2.JPG",
    "b/10.png",
    "a-b/1.webp",
    "a/1.bmp",
    "z.jpeg",
    "a/deep/1.jpg",
  ):
    _write(tmp_path / name, _flat(1))
  for name in ("notes.txt", "b/._2.jpg", ".cache/1.jpg", "noending"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
  assert list(image_source.image_paths(str(tmp_path), image_names.NameFilter())) == [
    "a/1.bmp",
    "a/deep/1.jpg",
    "a-b/1.webp",
    "b/10.png",
    "b/2.JPG",
    "z.jpeg",
  ]


def test_links_are_followed_but_not_in_circles(tmp_path):
  _write(tmp_path / "images" / "n1" / "1.png", _flat(1))
  (tmp_path / "input").mkdir()
  os.symlink(tmp_path / "images" / "n1", tmp_path / "input" / "linked")
  os.symlink(tmp_path / "input", tmp_path / "images" / "n1" / "back")
  assert list(
    image_source.image_paths(str(tmp_path / "input"), image_names.NameFilter())
  ) == ["linked/1.png"]


def test_the_parent_folder_is_the_identity(tmp_path):
  for name in ("n1/1.png", "test/n2/1.png", "loose.png"):
    _write(tmp_path / name, _flat(1))
  faces = [load() for load in image_source.folder_loaders(str(tmp_path), image_size=8)]
  assert [(face.path, face.identity) for face in faces] == [
    ("loose.png", None),
    ("n1/1.png", "n1"),
    ("test/n2/1.png", "n2"),
  ]


def test_an_image_of_the_right_size_stays_as_it_is(tmp_path):
  pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
  _write(tmp_path / "1.png", pixels)
  content = (tmp_path / "1.png").read_bytes()
  np.testing.assert_array_equal(image_source.decode(content, image_size=8), pixels)


def test_the_middle_square_is_shrunk_by_area(tmp_path):
  # 4 rows of 8 columns; the columns outside the middle four must not be seen.
  pixels = _flat(255, 4, 8)
  pixels[:, 2:6] = np.arange(16).reshape(4, 4, 1) * 10
  _write(tmp_path / "1.png", pixels)
  content = (tmp_path / "1.png").read_bytes()
  shrunk = image_source.decode(content, image_size=2)
  # Means of the four 2 x 2 blocks of 0, 10, ..., 150.
  np.testing.assert_array_equal(shrunk[..., 0], [[25, 45], [105, 125]])


def test_a_small_image_is_enlarged(tmp_path):
  _write(tmp_path / "1.png", _flat(70, 3, 5))
  content = (tmp_path / "1.png").read_bytes()
  np.testing.assert_array_equal(image_source.decode(content, image_size=8), _flat(70))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".webp"])
def test_an_image_that_is_cut_off_is_unreadable(tmp_path, ending):
  rng = np.random.default_rng(0)
  path = tmp_path / ("1" + ending)
  _write(path, rng.integers(0, 256, (64, 64, 3), np.uint8))
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  (tmp_path / "2.jpg").write_bytes(b"")
  (tmp_path / "3.jpg").write_text("not an image")
  (tmp_path / "4.jpg").symlink_to(tmp_path / "gone.jpg")
  loaded = [load() for load in image_source.folder_loaders(str(tmp_path), image_size=8)]
  assert [each.path for each in loaded] == ["1" + ending, "2.jpg", "3.jpg", "4.jpg"]
  assert all(isinstance(each, image_source.Unreadable) for each in loaded)
  assert "cut off" in loaded[0].reason
  assert loaded[3].reason == "No such file or directory"


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
  _write(tmp_path / "old" / "1.png", _flat(1))
  old, new = (os.fsencode(tmp_path) + name for name in (b"/old", b"/\xd5\xc5"))
  os.rename(old + b"/1.png", old + b"/caf\xe9.png")
  os.rename(old, new)
  (load,) = image_source.folder_loaders(str(tmp_path), image_size=8)
  face = load()
  assert (face.path, face.identity) == (r"\xd5\xc5/caf\xe9.png", r"\xd5\xc5")
