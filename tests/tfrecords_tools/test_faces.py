import io

import cv2
import numpy as np
import pytest
from PIL import Image

from facedist import errors
from facedist.data import alignment, decoding

SETTINGS = alignment.FaceSettings(size=48, quality=95, margin=0.0)
NOWHERE = np.zeros(10, np.float32)
NO_CUT = alignment.plan_cut(NOWHERE, alignment.Place.UNKNOWN, size=48)


def picture(size=(60, 48)):
  """Left half red, right half blue; RGB for Pillow."""
  pixels = np.zeros((*size, 3), np.uint8)
  pixels[:, : size[1] // 2] = (220, 30, 30)
  pixels[:, size[1] // 2 :] = (30, 30, 220)
  return pixels


def encoded(pixels, kind="JPEG", mode="RGB", **options):
  stream = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
  return stream.getvalue()


def made(source, place=alignment.Place.UNKNOWN, geometry=NOWHERE, settings=SETTINGS):
  """The face's pixels, RGB, and how it was made."""
  cut = alignment.plan_cut(geometry, place, size=settings.size)
  jpeg, method = alignment.make_face(source, cut, settings=settings)
  return np.asarray(Image.open(io.BytesIO(jpeg))), method


@pytest.mark.parametrize(
  ("kind", "mode"),
  [
    *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")),
    *(("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("JPEG2000", "RGB")),
  ],
)
def test_every_kind_of_colour_image_keeps_its_colours(kind, mode):
  face, _ = made(encoded(picture(), kind, mode))
  assert face.shape == (48, 48, 3)
  np.testing.assert_allclose(face[24, 10], (220, 30, 30), atol=25)
  np.testing.assert_allclose(face[24, 38], (30, 30, 220), atol=25)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_grey_image_becomes_a_colour_image_of_grey(kind):
  face, _ = made(encoded(np.full((60, 48, 3), 77, np.uint8), kind, "L"))
  assert face.shape == (48, 48, 3)
  np.testing.assert_allclose(face, 77, atol=2)


def turned_by_a_quarter(size=(60, 48)):
  """Red above blue as it is to be seen; stored as `picture`."""
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(picture(size), exif=exif)


@pytest.mark.parametrize(
  ("size", "expected"), [((60, 48), "centre_crop"), ((48, 48), "source_size_kept")]
)
def test_an_image_is_turned_as_its_exif_data_ask_and_then_asks_no_more(size, expected):
  jpeg, method = alignment.make_face(
    turned_by_a_quarter(size), NO_CUT, settings=SETTINGS
  )
  assert method == expected
  assert decoding.orientation(jpeg) == 1
  face = np.asarray(Image.open(io.BytesIO(jpeg)))
  for column in (5, 42):
    np.testing.assert_allclose(face[5, column], (220, 30, 30), atol=25)
    np.testing.assert_allclose(face[42, column], (30, 30, 220), atol=25)


def test_boxes_and_landmarks_are_those_of_the_upright_image():
  blue = np.array([0, 30, 18, 18, 0, 0, 0, 0, 0, 0], np.float32)
  face, _ = made(turned_by_a_quarter(), alignment.Place.BOX, blue)
  np.testing.assert_allclose(face.mean(axis=(0, 1)), (30, 30, 220), atol=15)
  points = alignment.template(48) + np.array([6, 0])  # in the middle of 60 x 48 pixels
  face, _ = made(
    turned_by_a_quarter(), alignment.Place.LANDMARKS, points.ravel().astype(np.float32)
  )
  np.testing.assert_allclose(face[5, 24], (220, 30, 30), atol=25)
  np.testing.assert_allclose(face[42, 24], (30, 30, 220), atol=25)


def test_the_box_and_the_centre_give_different_faces():
  box = np.array([0, 0, 20, 20, 0, 0, 0, 0, 0, 0], np.float32)
  face, method = made(encoded(picture()), alignment.Place.BOX, box)
  assert method == "bounding_box"
  np.testing.assert_allclose(face.mean(axis=(0, 1)), (220, 30, 30), atol=15)
  face, method = made(encoded(picture()))
  assert method == "centre_crop"
  np.testing.assert_allclose(face.mean(axis=(0, 1)), (125, 30, 125), atol=15)


def test_a_jpeg_of_the_target_size_keeps_its_bytes():
  source = encoded(picture((48, 48)), quality=60)
  jpeg, method = alignment.make_face(source, NO_CUT, settings=SETTINGS)
  assert (jpeg, method) == (source, "source_bytes_kept")


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    (encoded(picture((48, 48)), "PNG"), "source_size_kept"),
    (encoded(picture((48, 48)), mode="L"), "source_size_kept"),
    (encoded(picture((48, 48)), mode="CMYK"), "source_size_kept"),
    (encoded(picture((49, 48))), "centre_crop"),
  ],
)
def test_other_images_are_encoded_again(source, expected):
  jpeg, method = alignment.make_face(source, NO_CUT, settings=SETTINGS)
  assert method == expected
  assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
  assert Image.open(io.BytesIO(jpeg)).mode == "RGB"


def test_landmarks_count_for_more_than_the_target_size():
  source = encoded(picture((48, 48)))
  landmarks = np.array([15, 20, 33, 20, 24, 28, 17, 38, 31, 38], np.float32)
  _, method = made(source, alignment.Place.LANDMARKS, landmarks)
  assert method == "landmarks"


def test_a_higher_quality_takes_more_bytes():
  noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
  sizes = [
    len(
      alignment.make_face(
        encoded(noise), NO_CUT, settings=alignment.FaceSettings(48, quality, 0.0)
      )[0]
    )
    for quality in (30, 60, 95)
  ]
  assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("source", [b"no image", encoded(picture((48, 48)))[:-30]])
def test_a_broken_image_is_an_error(source):
  with pytest.raises(errors.DataError, match="cut off"):
    alignment.make_face(source, NO_CUT, settings=SETTINGS)


def test_the_bytes_do_not_depend_on_opencvs_threads():
  rng = np.random.default_rng(0)
  source = cv2.imencode(".png", rng.integers(0, 255, (900, 900, 3), np.uint8))[1]
  before = cv2.getNumThreads()
  results = set()
  for threads in (1, 2):
    cv2.setNumThreads(threads)
    results.add(alignment.make_face(source.tobytes(), NO_CUT, settings=SETTINGS)[0])
  cv2.setNumThreads(before)
  assert len(results) == 1
