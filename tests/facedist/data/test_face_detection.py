"""Finds faces by OpenCV's FaceDetectorYN, with a network of cells, and by MTCNN."""

import csv
import importlib.util
import pathlib

import cv2
import numpy as np
import pytest

from facedist import errors
from facedist.data import alignment, face_detection
from tests import face_model


@pytest.fixture
def cells(tmp_path: pathlib.Path) -> str:
  """The network's file."""
  path = tmp_path / "cells.onnx"
  path.write_bytes(face_model.model())
  return str(path)


def finder(cells: str, face: str = "largest") -> face_detection.FaceFinder:
  return face_detection.load(face_detection.DetectorSettings(yunet=cells, face=face))


def test_box_and_landmarks_are_those_that_the_network_says(cells):
  image = np.zeros((224, 200, 3), np.uint8)
  face_model.paint(image, 3, 2)
  face, count = finder(cells).find(image)
  assert (count, face.score) == (1, pytest.approx(1))
  np.testing.assert_allclose(face.box, [16, 48, 128, 128], atol=1e-3)
  np.testing.assert_allclose(face.landmarks, face_model.landmarks_of(3, 2), atol=1e-3)


def test_a_large_photo_is_shrunk_and_its_landmarks_are_in_its_own_pixels(cells):
  image = np.zeros((224 * 10, 160 * 10, 3), np.uint8)
  face_model.paint(image, 3, 2, scale=10)
  face, _ = finder(cells).find(image)
  expected = (face_model.landmarks_of(3, 2) + 0.5) * 10 - 0.5
  np.testing.assert_allclose(face.landmarks, expected, atol=1e-2)
  np.testing.assert_allclose(face.box[2:], 1280, atol=1e-2)


def test_a_small_face_is_looked_at_again_in_more_detail(cells):
  image = np.zeros((896, 896, 3), np.uint8)  # 32 pixels of a face at 224, 128 at 896
  face_model.paint(image, 8, 9, cell=face_model.SMALL, scale=4)  # what the first sees
  face_model.paint(image, 9, 9)  # what the second sees, one cell further down
  face, _ = finder(cells).find(image)
  np.testing.assert_allclose(face.landmarks, face_model.landmarks_of(9, 9), atol=1e-3)


def test_of_two_faces_the_largest_or_the_most_central_is_taken(cells):
  image = np.zeros((224, 224, 3), np.uint8)
  face_model.paint(image, 1, 1)
  face_model.paint(image, 14, 14, cell=face_model.SMALL)
  large, count = finder(cells).find(image)
  central, _ = finder(cells, "central").find(image)
  assert count == 2
  np.testing.assert_allclose(large.box, [-16, -16, 128, 128], atol=1e-3)
  np.testing.assert_allclose(central.box, [100, 100, 32, 32], atol=1e-3)


def test_of_two_alike_the_surer_one_is_taken():
  faces = [
    face_detection.DetectedFace(np.array([x, 0, 60, 60.0]), np.ones((5, 2)), score)
    for x, score in ((0, 0.8), (140, 0.9), (0, 0.7))
  ]
  for choice in ("largest", "central"):
    find = face_detection.FaceFinder(lambda image: faces, name="", choice=choice).find
    assert find(np.zeros((60, 200, 3), np.uint8))[0].score == 0.9


def test_the_aligned_face_has_its_points_on_the_template(cells):
  image = np.zeros((224, 224, 3), np.uint8)
  face_model.paint(image, 3, 3)
  points = face_model.landmarks_of(3, 3)
  for x, y in points:
    cv2.circle(image, (round(x), round(y)), 3, (0, 255, 0), thickness=-1)
  pixels, count = finder(cells).aligned(image, size=112)
  assert (pixels.shape, count) == ((112, 112, 3), 1)
  for x, y in alignment.TEMPLATE:
    assert pixels[round(y), round(x), 1] > 200


def test_no_face_and_one_that_cannot_be_aligned_are_told_apart_from_broken_files(cells):
  with pytest.raises(face_detection.NoFaceError, match=f"^{face_detection.NO_FACE}$"):
    finder(cells).find(np.zeros((30, 40, 3), np.uint8))
  one_place = face_detection.DetectedFace(np.ones(4), np.ones((5, 2)), 1.0)
  with pytest.raises(face_detection.NoFaceError, match="landmarks are all in one"):
    face_detection.align(np.zeros((9, 9, 3), np.uint8), one_place, size=112)


def test_a_file_that_is_no_network_and_a_missing_package_name_the_fix(
  tmp_path, monkeypatch
):
  path = tmp_path / "x.onnx"
  path.write_bytes(b"no network")
  with pytest.raises(errors.DataError, match=rf"--yunet={path} is no network.*; give"):
    finder(str(path))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UsageError, match=r"pip install 'facedist\[align\]'"):
    face_detection.load(face_detection.DetectorSettings())


@pytest.fixture(scope="module")
def mtcnn() -> face_detection.FaceFinder:
  return face_detection.load(face_detection.DetectorSettings())


@pytest.mark.real_data
def test_mtcnn_finds_the_landmarks_that_another_mtcnn_found(real_data, mtcnn):
  """In most images as they are, in some inside a photo of 12 megapixels."""
  folder = real_data / "vggface2_sample"
  with open(folder / "loose_landmark_test.csv") as stream:
    rows = list(csv.reader(stream))[1::60]
  distances = []
  for number, (name, *numbers) in enumerate(rows):
    image = cv2.imread(str(folder / "test" / f"{name}.jpg"))
    points = np.array(numbers, float).reshape(5, 2)
    warp = alignment.warp_to_template(points, size=112)
    if number % 3 == 0:
      photo = np.zeros((3000, 4000, 3), np.uint8)
      photo[900 : 900 + len(image), 1500 : 1500 + image.shape[1]] = image
      image, points = photo, points + np.array([1500, 900])
    face, _ = mtcnn.find(image)
    moved = (face.landmarks - points) @ warp[:, :2].T
    distances.append(np.linalg.norm(moved, axis=1).mean())
  assert len(distances) == 7
  assert np.median(distances) < 2.5
  assert max(distances) < 10


def test_mtcnn_finds_no_face_in_noise(mtcnn):
  noise = np.random.default_rng(0).integers(0, 256, (200, 160, 3), np.uint8)
  for image in (noise, noise[:5, :5], np.zeros((300, 300, 3), np.uint8)):
    with pytest.raises(face_detection.NoFaceError):
      mtcnn.find(image)
