"""Every kind of image becomes the same upright pixels with both decoders."""

import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from facedist import errors
from facedist.data import decoding, image_names

SIZE = 32
TAG = 0x0112
# OpenCV encodes these, Pillow the others.
BY_OPENCV = (".ras", ".sr")


def picture(height: int = SIZE, width: int = SIZE) -> Image.Image:
  """Smooth colours that look otherwise from every side."""
  coarse = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
  return Image.fromarray(cv2.resize(coarse, (width, height)))


def encoded(kind: str, *, image: Image.Image | None = None, **options) -> bytes:
  stream = io.BytesIO()
  (image or picture()).save(stream, kind, **options)
  return stream.getvalue()


def tagged(
  kind: str, orientation: int, *, endian: str = "<", width: int = SIZE + 8, **options
) -> bytes:
  """A file whose EXIF data hold an orientation, among other entries."""
  exif = Image.Exif()
  exif.endian = endian
  exif[0x010E], exif[TAG], exif[0x0131] = "a face", orientation, "a camera"
  return encoded(kind, image=picture(width=width), exif=exif, **options)


def rgb(content: bytes) -> np.ndarray:
  return decoding.decode(content)[..., ::-1]


def recorded(jpeg: bytes) -> np.ndarray:
  pixels = np.empty((SIZE, SIZE, 3), np.uint8)
  decoding.decode_record(jpeg, pixels)
  return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(
  ("kind", "options"),
  [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_an_image_is_turned_as_its_orientation_says(kind, options, endian, orientation):
  content = tagged(kind, orientation, endian=endian, **options)
  with Image.open(io.BytesIO(content)) as stored:
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
  found = rgb(content)
  assert found.shape == expected.shape
  assert found.flags.c_contiguous or found[..., ::-1].flags.c_contiguous
  # Pillow's own libjpeg may round otherwise.
  np.testing.assert_allclose(found.astype(int), expected, atol=3)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_record_has_the_pixels_of_its_file(mode, orientation):
  exif = Image.Exif()
  exif[TAG] = orientation
  for subsampling, progressive in itertools.product((0, 2), (False, True)):
    jpeg = encoded(
      "JPEG",
      image=picture().convert(mode),
      exif=exif,
      subsampling=subsampling,
      progressive=progressive,
    )
    np.testing.assert_array_equal(recorded(jpeg), rgb(jpeg))
    np.testing.assert_array_equal(recorded(memoryview(jpeg)), rgb(jpeg))


def test_orientation_is_found_behind_other_segments():
  jpeg = tagged("JPEG", 6)
  comment = b"\xff\xfe\x00\x06abcd"
  padded = jpeg[:2] + comment + b"\xff\xff\xff" + comment + jpeg[2:]
  assert decoding.orientation(padded) == decoding.orientation(jpeg) == 6


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(value):
  exif = Image.Exif()
  exif[TAG] = value
  jpeg = encoded("JPEG", exif=exif)
  assert decoding.orientation(jpeg) == 1
  np.testing.assert_array_equal(rgb(jpeg), rgb(encoded("JPEG")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_corrupt_exif_data_end_in_an_orientation(kind, endian):
  whole = tagged(kind, 6, endian=endian)
  start = whole.index(b"II*\0" if endian == "<" else b"MM\0*")
  for length in range(start + 80):
    assert decoding.orientation(whole[:length]) in (1, 6)
  rng = np.random.default_rng(0)
  for _ in range(300):
    content = bytearray(whole)
    for place in rng.integers(start - 12, start + 60, 3):
      content[place] = rng.integers(256)
    assert 1 <= decoding.orientation(bytes(content)) <= 8


def example_of(ending: str) -> bytes:
  """A file of each ending."""
  if ending in BY_OPENCV:
    return cv2.imencode(ending, np.asarray(picture())[..., ::-1])[1].tobytes()
  if ending == ".pbm":
    return encoded("PPM", image=picture().convert("1"))
  if ending == ".pgm":
    return encoded("PPM", image=picture().convert("L"))
  kind = {".jpe": "JPEG", ".jfif": "JPEG", ".dib": "BMP", ".pnm": "PPM"}
  return encoded(kind.get(ending) or Image.registered_extensions()[ending])


@pytest.mark.parametrize("ending", image_names.ENDINGS)
def test_every_accepted_ending_is_decoded(ending):
  with Image.open(io.BytesIO(example_of(ending))) as read:
    expected = np.asarray(read.convert("RGB")).astype(int)
  np.testing.assert_allclose(rgb(example_of(ending)), expected, atol=3)


@pytest.mark.parametrize(
  ("kind", "mode"),
  [
    *itertools.product(["PNG", "TIFF"], ["1", "L", "P"]),
    *(("PNG", "LA"), ("PNG", "RGBA"), ("BMP", "P"), ("WEBP", "RGBA"), ("TIFF", "CMYK")),
  ],
)
def test_other_colours_become_rgb_and_transparency_is_dropped(kind, mode):
  image = picture().convert(mode)
  if "A" in mode:
    image.putalpha(100)
  options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
  found = rgb(encoded(kind, image=image, **options)).astype(int)
  np.testing.assert_allclose(found, np.asarray(image.convert("RGB")), atol=1)


def test_sixteen_bits_become_eight():
  levels = (np.arange(SIZE * SIZE) * 60).reshape(SIZE, SIZE).astype(np.uint16)
  content = cv2.imencode(".png", levels)[1].tobytes()
  found = rgb(content).astype(int)
  np.testing.assert_allclose(found[..., 0], levels // 256, atol=1)


def test_the_first_picture_of_several_counts():
  others = [Image.new("RGB", (SIZE, SIZE)) for _ in range(2)]
  for kind in ("TIFF", "PNG"):
    content = encoded(kind, save_all=True, append_images=others)
    np.testing.assert_array_equal(rgb(content), np.asarray(picture()))


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "the file is empty"),
    (b"no image", "cut off or not an image"),
    (encoded("JPEG")[:-200], "cut off"),
    (encoded("PNG")[:60], "cut off"),
    (encoded("GIF"), "not an image"),
  ],
)
def test_a_file_that_cannot_be_decoded_is_an_error(content, reason):
  with pytest.raises(errors.DataError, match=reason):
    decoding.decode(content)


@pytest.mark.parametrize(
  ("jpeg", "reason"),
  [
    (b"", "not a JPEG"),
    (encoded("PNG"), "not a JPEG"),
    (encoded("JPEG")[:-40], "broken JPEG"),
    (encoded("JPEG", image=picture(16, 64)), "has 64x16 pixels, .* says 32x32"),
    (encoded("JPEG", image=picture(64, 64)), "has 64x64 pixels, .* says 32x32"),
  ],
)
def test_a_record_that_is_no_jpeg_of_the_size_is_an_error(jpeg, reason):
  with pytest.raises(errors.DataError, match=reason):
    recorded(jpeg)


def test_a_file_is_finished_only_if_it_is_an_upright_colour_jpeg_of_the_size():
  assert decoding.is_finished(encoded("JPEG"), size=SIZE)
  assert decoding.is_finished(tagged("JPEG", 1, width=SIZE), size=SIZE)
  for content in (
    *(tagged("JPEG", orientation, width=SIZE) for orientation in range(2, 9)),
    encoded("JPEG", image=picture().convert("L")),
    encoded("JPEG", image=picture(SIZE, SIZE + 1)),
    encoded("JPEG")[:-30],
    encoded("PNG"),
    b"",
  ):
    assert not decoding.is_finished(content, size=SIZE)
