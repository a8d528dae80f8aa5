"""Augmentation against NumPy, image by image, and what its draws depend on."""

import cv2
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from facedist.data import augment

FLIP, SIDE, TOP, LEFT, BRIGHTNESS, CONTRAST, SATURATION, _, ROW, COLUMN = range(
  augment.NUM_DRAWS
)
NEUTRAL = {FLIP: 0.9, SIDE: 0.0, BRIGHTNESS: 0.5, CONTRAST: 0.5, SATURATION: 0.5}


def random_images(count: int, size: int = 12, *, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def chosen(*rows: dict[int, float]) -> np.ndarray:
  """Returns float32[rows, NUM_DRAWS] with the draws named and the rest neutral."""
  result = np.zeros((len(rows), augment.NUM_DRAWS), np.float32)
  for place, row in enumerate(rows):
    for draw, value in (NEUTRAL | row).items():
      result[place, draw] = value
  return result


def run(images, draws, *, flip=False, crop=0.0, color=0.0, cutout=0.0) -> np.ndarray:
  return augment.augment(
    tf.constant(images),
    tf.constant(draws),
    flip=flip,
    crop=crop,
    color=color,
    cutout=cutout,
  ).numpy()


def recolored(
  image: np.ndarray, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
  """Multiplies brightness, then contrast, then saturation by these factors."""
  luma = np.array([0.299, 0.587, 0.114])
  image = brightness * image
  mean = (image @ luma).mean()
  image = mean + contrast * (image - mean)
  grey = (image @ luma)[..., None]
  return np.clip(grey + saturation * (image - grey), 0, 255)


def test_images_without_augmentation_are_unchanged():
  images = random_images(4)
  draws = augment.draws(0, np.arange(4), np.zeros(4, np.int64))
  result = run(images, draws)
  assert result.dtype == np.float32
  np.testing.assert_array_equal(result, images)


def test_neutral_draws_change_nothing_at_any_strength():
  images = random_images(3)
  draws = chosen({}, {}, {})
  result = run(images, draws, flip=True, crop=0.3, color=0.5)
  np.testing.assert_allclose(result, images, atol=1e-3)


@pytest.mark.parametrize("size", [11, 12])
def test_mirroring_is_exact_and_for_the_lower_half_of_draws(size):
  images = random_images(4, size)
  draws = chosen({FLIP: 0.0}, {FLIP: 0.49}, {FLIP: 0.5}, {FLIP: 0.99})
  result = run(images, draws, flip=True)
  np.testing.assert_array_equal(result[:2], images[:2, :, ::-1])
  np.testing.assert_array_equal(result[2:], images[2:])


def test_a_crop_takes_the_square_that_its_draws_name():
  # Of 9 pixels 8 steps; half of a crop of 0.5 leaves a side of 0.75, 6 steps, and the
  # corner at 1 step of the 2 left over downwards and at 0 to the right.
  images = random_images(1, 9)
  draws = chosen({SIDE: 0.5, TOP: 0.5, LEFT: 0.0})
  columns, rows = np.meshgrid(np.linspace(0, 6, 9), np.linspace(1, 7, 9))
  places = columns.astype(np.float32), rows.astype(np.float32)
  expected = cv2.remap(images[0].astype(np.float32), *places, cv2.INTER_LINEAR)
  np.testing.assert_allclose(run(images, draws, crop=0.5)[0], expected, atol=1e-3)


def test_a_mirrored_crop_is_the_crop_mirrored():
  images = np.repeat(random_images(1, 16), 2, axis=0)
  place = {SIDE: 0.7, TOP: 0.2, LEFT: 0.9}
  draws = chosen({FLIP: 0.1} | place, {FLIP: 0.9} | place)
  mirrored, plain = run(images, draws, flip=True, crop=0.4)
  np.testing.assert_allclose(mirrored, plain[:, ::-1], atol=1e-3)


def test_corner_crops_stay_inside_the_image():
  # Outside it the op would fill in black.
  images = np.full((4, 112, 112, 3), 200, np.uint8)
  almost = 1 - 2**-24
  draws = chosen(
    {SIDE: almost, TOP: almost, LEFT: almost},
    {SIDE: 0.1, TOP: almost, LEFT: almost},
    {SIDE: 0.3, TOP: almost, LEFT: 0.0, FLIP: 0.0},
    {SIDE: 0.7, TOP: 0.0, LEFT: almost, FLIP: 0.0},
  )
  for crop in (0.07, 0.1, 0.3, 0.9):
    result = run(images, draws, flip=True, crop=crop)
    np.testing.assert_allclose(result, 200, atol=1e-3)


@pytest.mark.parametrize(
  ("draws", "factors"),
  [
    ({BRIGHTNESS: 1.0}, (1.4, 1, 1)),
    ({BRIGHTNESS: 0.25}, (0.8, 1, 1)),
    ({CONTRAST: 0.0}, (1, 0.6, 1)),
    ({CONTRAST: 0.75}, (1, 1.2, 1)),
    ({SATURATION: 0.0}, (1, 1, 0.6)),
    ({SATURATION: 0.75}, (1, 1, 1.2)),
    ({BRIGHTNESS: 0.7, CONTRAST: 0.3, SATURATION: 0.9}, (1.16, 0.84, 1.32)),
  ],
)
def test_brightness_contrast_and_saturation_follow_each_other(draws, factors):
  images = random_images(2)
  result = run(images, chosen(draws, draws), color=0.4)
  expected = [recolored(image, *factors) for image in images]
  np.testing.assert_allclose(result, expected, atol=1e-3)


def test_cutout_covers_the_square_around_the_pixel_that_the_draws_name():
  images = random_images(3, 10)
  almost = 1 - 2**-24
  draws = chosen({ROW: 0.5, COLUMN: 0.3}, {}, {ROW: almost, COLUMN: almost})
  expected = images.astype(np.float32)
  expected[0, 3:7, 1:5] = expected[1, :2, :2] = expected[2, 7:, 7:] = 127.5
  np.testing.assert_array_equal(run(images, draws, cutout=0.4), expected)


@settings(max_examples=30)
@given(
  images=np_st.arrays(np.uint8, (2, 6, 6, 3)),
  draws=np_st.arrays(
    np.float32, (2, augment.NUM_DRAWS), elements=st.floats(0, 1 - 2**-24, width=32)
  ),
  crop=st.floats(0, 0.9),
  color=st.floats(0, 1),
)
def test_values_stay_in_the_range_of_pixels(images, draws, crop, color):
  result = run(images, draws, flip=True, crop=crop, color=color)
  assert np.isfinite(result).all()
  assert result.min() >= 0
  assert result.max() <= 255 + 1e-3


def test_a_sample_is_changed_alike_in_any_batch():
  images = random_images(8)
  draws = augment.draws(3, np.arange(8), np.zeros(8, np.int64))
  options = {"flip": True, "crop": 0.2, "color": 0.3}
  whole = run(images, draws, **options)
  halves = [
    run(images[part], draws[part], **options) for part in (slice(4), slice(4, 8))
  ]
  np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_draws_of_a_sample_do_not_depend_on_its_batch():
  rng = np.random.default_rng(0)
  records, epochs = rng.integers(2**40, size=20), rng.integers(1000, size=20)
  whole = augment.draws(-(2**70), records, epochs)
  assert whole.dtype == np.float32
  for place in range(20):
    one = slice(place, place + 1)
    alone = augment.draws(-(2**70), records[one], epochs[one])
    np.testing.assert_array_equal(alone[0], whole[place])


def test_draws_are_uniform_and_independent():
  count = 20_000
  draws = augment.draws(0, np.arange(count), np.full(count, 2))
  assert draws.min() >= 0
  assert draws.max() < 1
  for column in draws.T:
    counts, _ = np.histogram(column, bins=20, range=(0, 1))
    expected = count / 20
    # Chi-squared of 19 degrees of freedom exceeds 60 once in a hundred thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 60
  correlations = np.corrcoef(draws.T) - np.eye(augment.NUM_DRAWS)
  assert np.abs(correlations).max() < 5 / count**0.5


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_draws_change_with_seed_record_and_epoch(other):
  def drawn(seed: int, record: int, epoch: int) -> np.ndarray:
    return augment.draws(seed, np.array([record]), np.array([epoch]))

  assert (drawn(0, 0, 0) != drawn(*other)).all()
