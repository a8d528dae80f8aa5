"""An exported model, with a network whose embeddings can be computed by hand."""

import io
import pathlib
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from facedist.data import image_source
from facedist.models import serving

SIZE = 16


def _network(images: tf.Tensor) -> tf.Tensor:
  """Embeds an image as the red values of its top left and top right pixels."""
  return tf.cast(tf.stack([images[:, 0, 0, 0], images[:, 0, -1, 0]], 1), tf.float32)


def _save(folder: pathlib.Path, *, mirror: bool, normalize: bool) -> Any:
  """Saves and loads; returns the signatures."""
  model = serving.ServedNetwork(
    _network, [], image_size=SIZE, mirror=mirror, normalize=normalize
  )
  model.save(str(folder))
  return tf.saved_model.load(str(folder)).signatures


def _image(left: int, right: int, *, size: int = SIZE) -> np.ndarray:
  """An image of two halves, whose red is given."""
  pixels = np.full((size, size, 3), 90, np.uint8)
  pixels[:, : size // 2, 0], pixels[:, size // 2 :, 0] = left, right
  return pixels


def _file(pixels: np.ndarray, ending: str) -> bytes:
  return cv2.imencode(ending, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """The signatures of a model that leaves embeddings as they are."""
  folder = tmp_path_factory.mktemp("plain")
  return _save(folder, mirror=False, normalize=False)


@pytest.mark.parametrize(
  ("mirror", "normalize", "expected"),
  [
    (False, True, [[0.6, 0.8], [1.0, 0.0], [0.0, 0.0]]),
    (True, False, [[70, 70], [5, 5], [0, 0]]),
    (True, True, [[0.5**0.5, 0.5**0.5], [0.5**0.5, 0.5**0.5], [0.0, 0.0]]),
  ],
)
def test_mirror_images_are_added_and_norms_are_1_as_set(
  tmp_path: pathlib.Path, mirror: bool, normalize: bool, expected: list
):
  embed = _save(tmp_path, mirror=mirror, normalize=normalize)["serving_default"]
  images = np.stack([_image(30, 40), _image(5, 0), _image(0, 0)])
  found = embed(images=tf.constant(images))["embeddings"]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_signatures_have_their_documented_names_and_shapes(plain: Any):
  images = tf.TensorSpec([None, SIZE, SIZE, 3], tf.uint8, "images")
  files = tf.TensorSpec([None], tf.string, "image_bytes")
  takes = {"serving_default": images, "serving_encoded": files}
  assert set(plain) == set(takes)
  for name, spec in takes.items():
    assert plain[name].structured_input_signature[1] == {spec.name: spec}
    (returned,) = plain[name].structured_outputs.items()
    assert returned[0] == "embeddings"
    assert returned[1].dtype == tf.float32
    assert returned[1].shape.as_list() == [None, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_images_is_a_batch(plain: Any, count: int):
  images = [_image(n, 2 * n) for n in range(count)]
  pixels = np.array(images, np.uint8).reshape(count, SIZE, SIZE, 3)
  files = tf.constant([_file(image, ".png") for image in images], tf.string, [count])
  expected = np.array([[n, 2 * n] for n in range(count)], np.float32).reshape(count, 2)
  for found in (
    plain["serving_default"](images=tf.constant(pixels)),
    plain["serving_encoded"](image_bytes=files),
  ):
    np.testing.assert_array_equal(found["embeddings"], expected)


def assert_embeds_as_embed_does(plain: Any, content: bytes) -> None:
  """Compares the pixels of an encoded image, of which two are its embedding."""
  pixels = image_source.decode(content, image_size=SIZE)
  found = plain["serving_encoded"](image_bytes=tf.constant([content]))["embeddings"]
  np.testing.assert_array_equal(found, [pixels[0, [0, -1], 0].astype(np.float32)])


@pytest.mark.parametrize("quality", [60, 95])
def test_a_jpeg_is_decoded_to_the_pixels_that_embed_sees(plain: Any, quality: int):
  noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
  content = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
  assert_embeds_as_embed_does(plain, content.tobytes())


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_an_image_is_turned_as_embed_turns_it(
  plain: Any, kind: str, endian: str, orientation: int
):
  exif = Image.Exif()
  exif.endian = endian
  exif[0x010E], exif[0x0112], exif[0x0131] = "a face", orientation, "a camera"
  noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
  stream = io.BytesIO()
  Image.fromarray(noise).save(stream, kind, exif=exif)
  assert_embeds_as_embed_does(plain, stream.getvalue())


def test_corrupt_exif_data_turn_an_image_as_embed_does_or_not_at_all(plain: Any):
  exif = Image.Exif()
  exif[0x0112] = 6
  stream = io.BytesIO()
  Image.fromarray(_image(30, 40)).save(stream, "JPEG", quality=95, exif=exif)
  whole = stream.getvalue()
  start = whole.index(b"Exif") + 6
  rng = np.random.default_rng(0)
  for _ in range(100):
    content = bytearray(whole)
    for place in rng.integers(start, start + 22, 2):
      content[place] = rng.integers(256)
    assert_embeds_as_embed_does(plain, bytes(content))


def test_a_grey_image_has_three_channels(plain: Any):
  content = cv2.imencode(".png", np.full((SIZE, SIZE), 7, np.uint8))[1].tobytes()
  found = plain["serving_encoded"](image_bytes=tf.constant([content]))["embeddings"]
  np.testing.assert_array_equal(found, [[7, 7]])


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (_file(_image(1, 2, size=20), ".png"), r"of 16 x 16 pixels, .*\[20 20 3\]"),
    (_file(_image(1, 2, size=20), ".jpg"), r"of 16 x 16 pixels, .*\[20 20 3\]"),
    (_file(_image(1, 2)[:8].repeat(2, 1), ".png"), r"of 16 x 16 .*\[8 32 3\]"),
    (_file(_image(1, 2), ".bmp"), "BMP"),
    (b"no image", "Unknown image file format. One of JPEG, "),
    (b"", "empty"),
    (_file(_image(1, 2), ".jpg")[:-30], "Invalid JPEG data"),
  ],
)
def test_anything_but_an_image_of_the_networks_size_is_an_error(
  plain: Any, content: bytes, said: str
):
  files = tf.constant([_file(_image(1, 2), ".png"), content])
  with pytest.raises(tf.errors.InvalidArgumentError, match=said):
    plain["serving_encoded"](image_bytes=files)
