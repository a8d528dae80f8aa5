import io

import cv2
import numpy as np
import pytest
from PIL import Image

from facedist.data import alignment, decoding
from facedist.data.alignment import Place

SETTINGS = alignment.FaceSettings(size=48, quality=95, margin=0.0)
RED, BLUE = (220, 30, 30), (30, 30, 220)


def picture(size=(60, 48), kind="JPEG", mode="RGB", **options):
  """An encoded image, red on the left and blue on the right."""
  pixels = np.zeros((*size, 3), np.uint8)
  pixels[:, : size[1] // 2], pixels[:, size[1] // 2 :] = RED, BLUE
  stream = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
  return stream.getvalue()


def turned_by_a_quarter(size=(60, 48)):
  """Red above blue as it is to be seen; stored as `picture`."""
  exif = Image.Exif()
  exif[0x0112] = 6
  return picture(size, exif=exif)


def make(source, place=Place.UNKNOWN, geometry=(0,), settings=SETTINGS):
  """Returns the face's JPEG and how it was made."""
  numbers = np.zeros(10, np.float32)
  numbers[: len(geometry)] = geometry
  cut = alignment.plan_cut(numbers, place, size=settings.size)
  return alignment.make_face(source, cut, settings=settings)


def pixels_of(jpeg):
  return np.asarray(Image.open(io.BytesIO(jpeg)))


@pytest.mark.parametrize(
  ("size", "expected"), [((60, 48), "centre_crop"), ((48, 48), "source_size_kept")]
)
def test_an_image_is_turned_as_its_exif_data_ask_and_then_asks_no_more(size, expected):
  jpeg, method = make(turned_by_a_quarter(size))
  assert method == expected
  assert decoding.orientation(jpeg) == 1
  for column in (5, 42):
    np.testing.assert_allclose(pixels_of(jpeg)[5, column], RED, atol=25)
    np.testing.assert_allclose(pixels_of(jpeg)[42, column], BLUE, atol=25)


def test_boxes_and_landmarks_are_those_of_the_upright_image():
  jpeg, _ = make(turned_by_a_quarter(), Place.BOX, (0, 30, 18, 18))
  np.testing.assert_allclose(pixels_of(jpeg).mean(axis=(0, 1)), BLUE, atol=15)
  points = alignment.template(48) + np.array([6, 0])  # in the middle of 60 x 48 pixels
  jpeg, _ = make(turned_by_a_quarter(), Place.LANDMARKS, points.ravel())
  np.testing.assert_allclose(pixels_of(jpeg)[5, 24], RED, atol=25)
  np.testing.assert_allclose(pixels_of(jpeg)[42, 24], BLUE, atol=25)


@pytest.mark.parametrize(
  ("place", "geometry", "expected", "colour"),
  [
    (Place.BOX, (0, 0, 20, 20), "bounding_box", RED),
    (Place.UNKNOWN, (0,), "centre_crop", (125, 30, 125)),
  ],
)
def test_the_box_and_the_centre_give_different_faces(place, geometry, expected, colour):
  jpeg, method = make(picture(), place, geometry)
  assert method == expected
  np.testing.assert_allclose(pixels_of(jpeg).mean(axis=(0, 1)), colour, atol=15)


def test_a_jpeg_of_the_target_size_keeps_its_bytes():
  source = picture((48, 48), quality=60)
  assert make(source) == (source, "source_bytes_kept")


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    (picture((48, 48), "PNG"), "source_size_kept"),
    (picture((48, 48), mode="L"), "source_size_kept"),
    (picture((48, 48), mode="CMYK"), "source_size_kept"),
    (picture((49, 48)), "centre_crop"),
  ],
)
def test_other_images_are_encoded_again_with_their_colours(source, expected):
  jpeg, method = make(source)
  assert method == expected
  assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
  before = np.asarray(Image.open(io.BytesIO(source)).convert("RGB"))
  for column in (10, 38):
    np.testing.assert_allclose(pixels_of(jpeg)[24, column], before[24, column], atol=25)


def test_landmarks_count_for_more_than_the_target_size():
  landmarks = (15, 20, 33, 20, 24, 28, 17, 38, 31, 38)
  assert make(picture((48, 48)), Place.LANDMARKS, landmarks)[1] == "landmarks"


def noise(size):
  pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
  return cv2.imencode(".png", pixels)[1].tobytes()


def test_a_higher_quality_takes_more_bytes():
  settings = [alignment.FaceSettings(48, quality, 0.0) for quality in (30, 60, 95)]
  sizes = [len(make(noise(60), settings=one)[0]) for one in settings]
  assert sizes == sorted(set(sizes))


def test_the_bytes_do_not_depend_on_opencvs_threads():
  before = cv2.getNumThreads()
  results = set()
  for threads in (1, 2):
    cv2.setNumThreads(threads)
    results.add(make(noise(900)))
  cv2.setNumThreads(before)
  assert len(results) == 1
