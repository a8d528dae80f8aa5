import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data import alignment


def umeyama(points, targets):
  """The similarity by singular value decomposition, as the paper has it."""
  centred = points - points.mean(axis=0)
  covariance = (targets - targets.mean(axis=0)).T @ centred / len(points)
  left, singular, right = np.linalg.svd(covariance)
  signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
  rotation = left @ np.diag(signs) @ right
  scale = (singular * signs).sum() / centred.var(axis=0).sum()
  shift = targets.mean(axis=0) - scale * rotation @ points.mean(axis=0)
  return np.column_stack([scale * rotation, shift])


def aligned_to(image, landmarks, size=112):
  warp = alignment.warp_to_template(landmarks, size=size)
  return alignment.align(image, warp, size=size)


@given(st.integers(0, 2**32 - 1))
def test_the_closed_form_equals_umeyamas_decomposition(seed):
  """Which rotates mirrored points too, and reflects none."""
  points = np.random.default_rng(seed).uniform(-500, 500, (5, 2))
  matrix = alignment.similarity_transform(points, alignment.TEMPLATE)
  np.testing.assert_allclose(matrix, umeyama(points, alignment.TEMPLATE), atol=1e-8)


@pytest.mark.parametrize(("size", "angle"), [(112, 0), (160, 35), (224, 35)])
def test_landmarks_land_on_the_template_scaled_to_the_size(size, angle):
  turn = cv2.getRotationMatrix2D((150, 150), angle, 1.7)
  landmarks = cv2.transform(alignment.TEMPLATE[None] + 94, turn)[0]
  for place, landmark in enumerate(landmarks):
    image = np.zeros((300, 300, 3), np.uint8)
    x, y = np.round(landmark).astype(int)
    cv2.circle(image, (x, y), 6, (255, 255, 255), -1)
    aligned = aligned_to(image, landmarks, size)[:, :, 0].astype(float)
    rows, columns = np.mgrid[:size, :size]
    centre = [(axis * aligned).sum() / aligned.sum() for axis in (columns, rows)]
    expected = alignment.TEMPLATE[place] * size / 112
    assert np.hypot(*(centre - expected)) < 0.5 * size / 112


def test_the_template_is_arcfaces():
  assert alignment.template(112).tolist() == [
    [38.2946, 51.6963],
    [73.5318, 51.5014],
    [56.0252, 71.7366],
    [41.5493, 92.3655],
    [70.7299, 92.2041],
  ]
  np.testing.assert_allclose(alignment.template(224)[0], [76.5892, 103.3926])


def test_what_lies_beyond_the_source_image_is_black():
  image = np.full((60, 60, 3), 200, np.uint8)
  aligned = aligned_to(image, alignment.TEMPLATE - (20, 20))
  assert (aligned[30:70, 30:70] == 200).all()
  assert (aligned[:18] == 0).all()
  assert (aligned[:, 90:] == 0).all()


def test_landmarks_in_one_place_are_an_error():
  with pytest.raises(errors.DataError, match="in one place"):
    alignment.warp_to_template(np.full((5, 2), 4.0), size=112)


def test_landmarks_of_another_image_are_an_error():
  with pytest.raises(errors.DataError, match="outside the image"):
    aligned_to(np.zeros((50, 50, 3), np.uint8), alignment.TEMPLATE)


def numbered(height, width):
  """An image whose every pixel tells its column, its row and 99."""
  rows, columns = np.mgrid[:height, :width].astype(np.uint8)
  return np.dstack([columns, rows, np.full_like(rows, 99)])


def test_a_box_grows_by_the_margin_into_a_centred_square():
  # 20 x 40 at (30, 20) has its centre at (40, 40); 40 x 1.5 = 60: from 10 to 70.
  box = np.array([30, 20, 20, 40], np.float32)
  face = alignment.crop_box(numbered(100, 100), box, size=60, margin=0.5)
  np.testing.assert_array_equal(face, numbered(100, 100)[10:70, 10:70])


def test_a_box_over_the_edge_is_filled_up_with_black():
  box = np.array([-10, 70, 40, 40], np.float32)
  face = alignment.crop_box(numbered(100, 100), box, size=40, margin=0)
  np.testing.assert_array_equal(face[:30, 10:], numbered(100, 100)[70:, :30])
  assert (face[30:] == 0).all()
  assert (face[:, :10] == 0).all()


@pytest.mark.parametrize(
  ("box", "reason"),
  [
    ((10, 10, 0, 5), "empty"),
    ((200, 10, 20, 20), "outside"),
    ((0, 0, 5000, 5000), "far larger"),
  ],
)
def test_a_box_that_makes_no_sense_is_an_error(box, reason):
  with pytest.raises(errors.DataError, match=reason):
    alignment.crop_box(numbered(100, 100), np.array(box), size=40, margin=0)


def test_the_largest_centred_square_is_cut():
  np.testing.assert_array_equal(
    alignment.crop_centre(numbered(50, 90), size=50), numbered(50, 90)[:, 20:70]
  )
  np.testing.assert_array_equal(
    alignment.crop_centre(numbered(91, 50), size=50), numbered(91, 50)[20:70]
  )


def test_a_shrunk_crop_averages_the_pixels():
  stripes = np.zeros((80, 80, 3), np.uint8)
  stripes[:, ::2] = 200
  assert (alignment.crop_centre(stripes, size=20) == 100).all()


@pytest.mark.real_data
def test_points_of_real_faces_are_plausible_and_in_another_order_are_not(real_data):
  folder = real_data / "vggface2_sample"
  for name in ("loose_landmark_test.csv", "loose_landmark_train.csv"):
    rows = np.loadtxt(folder / name, delimiter=",", skiprows=1, usecols=range(1, 11))
    columns_last = np.hstack((rows[:, 0::2], rows[:, 1::2]))  # x1...x5,y1...y5
    for table, low, high in ((rows, 0.98, 1.0), (columns_last, 0.0, 0.05)):
      passed = [alignment.is_plausible(row.reshape(5, 2)) for row in table]
      assert low <= np.mean(passed) <= high
