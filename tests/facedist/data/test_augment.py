"""Augmentation against NumPy, image by image, and what its draws depend on."""

import colorsys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from facedist.data import augment

FLIP, SIDE, TOP, LEFT, BRIGHTNESS, CONTRAST, SATURATION, DROPOUT = range(
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


def run(images, draws, *, flip=False, crop=0.0, color=0.0) -> np.ndarray:
  images, draws = tf.constant(images), tf.constant(draws)
  return augment.augment(images, draws, flip=flip, crop=crop, color=color).numpy()


def bilinear(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Samples an image at fractional rows and columns of its pixel grid."""
  last = image.shape[0] - 1
  result = np.zeros((len(rows), len(columns), 3))
  for i, y in enumerate(rows):
    for j, x in enumerate(columns):
      top, left = int(np.floor(y)), int(np.floor(x))
      bottom, right = min(top + 1, last), min(left + 1, last)
      down, over = y - top, x - left
      upper = (1 - over) * image[top, left] + over * image[top, right]
      lower = (1 - over) * image[bottom, left] + over * image[bottom, right]
      result[i, j] = (1 - down) * upper + down * lower
  return result


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


@pytest.mark.parametrize("size", [11, 12, 112])
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
  expected = bilinear(
    images[0].astype(float), np.linspace(1, 7, 9), np.linspace(0, 6, 9)
  )
  np.testing.assert_allclose(run(images, draws, crop=0.5)[0], expected, atol=1e-3)


def test_a_crop_of_whole_pixels_keeps_their_values():
  # 5 of 9 pixels across: every second result lies on a pixel.
  images = random_images(1, 9)
  draws = chosen({SIDE: 1.0, TOP: 0.25, LEFT: 0.75})
  result = run(images, draws, crop=0.5)[0]
  np.testing.assert_allclose(result[::2, ::2], images[0, 1:6, 3:8], atol=1e-3)


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


def test_brightness_multiplies_every_value_up_to_white():
  images = random_images(2)
  draws = chosen({BRIGHTNESS: 1.0}, {BRIGHTNESS: 0.25})
  result = run(images, draws, color=0.4)
  factors = np.array([1.4, 0.8])[:, None, None, None]
  expected = np.minimum(images * factors, 255)
  np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_contrast_moves_values_away_from_the_images_mean_grey():
  images = random_images(2)
  draws = chosen({CONTRAST: 0.0}, {CONTRAST: 0.75})
  result = run(images, draws, color=0.4)
  for image, changed, factor in zip(images, result, (0.6, 1.2), strict=True):
    grey = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    expected = np.clip(grey.mean() + factor * (image - grey.mean()), 0, 255)
    np.testing.assert_allclose(changed, expected, atol=1e-3)


def test_without_saturation_images_are_grey():
  images = random_images(1)
  result = run(images, chosen({SATURATION: 0.0}), color=1.0)[0]
  grey = images[0] @ np.array([0.299, 0.587, 0.114])
  np.testing.assert_allclose(result, np.repeat(grey[..., None], 3, axis=2), atol=1e-3)


def test_saturation_keeps_hue_and_grey_value():
  images = random_images(1) // 4 + 96  # far from black and white, so nothing is cut
  result = run(images, chosen({SATURATION: 0.75}), color=0.4)[0]
  luma = np.array([0.299, 0.587, 0.114])
  np.testing.assert_allclose(result @ luma, images[0] @ luma, atol=1e-3)
  for before, after in zip(
    images[0].reshape(-1, 3), result.reshape(-1, 3), strict=True
  ):
    hues = [colorsys.rgb_to_hsv(*(pixel / 255.0))[0] for pixel in (before, after)]
    assert abs(hues[0] - hues[1]) < 1e-3
    np.testing.assert_allclose(np.ptp(after), 1.2 * np.ptp(before), atol=1e-3)


def test_brightness_contrast_and_saturation_follow_each_other():
  images = random_images(1) // 2 + 50
  result = run(
    images, chosen({BRIGHTNESS: 0.6, CONTRAST: 0.4, SATURATION: 0.9}), color=0.2
  )[0]
  luma = np.array([0.299, 0.587, 0.114])
  brighter = images[0] * 1.04
  mean = (brighter @ luma).mean()
  contrasted = mean + 0.96 * (brighter - mean)
  grey = (contrasted @ luma)[..., None]
  expected = grey + 1.16 * (contrasted - grey)
  np.testing.assert_allclose(result, expected, atol=1e-2)


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
  for place in range(8):
    alone = run(images[place : place + 1], draws[place : place + 1], **options)
    np.testing.assert_allclose(alone[0], whole[place], atol=1e-3)


def test_a_graph_computes_what_eager_code_does():
  images = random_images(4)
  draws = augment.draws(3, np.arange(4), np.zeros(4, np.int64))
  options = {"flip": True, "crop": 0.2, "color": 0.3}
  graph = tf.function(lambda x, d: augment.augment(x, d, **options))
  np.testing.assert_allclose(
    graph(images, draws), run(images, draws, **options), atol=1e-3
  )


@given(
  samples=st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(0, 1000)), min_size=1, max_size=20
  ),
  seed=st.integers(-(2**70), 2**70),
  data=st.data(),
)
def test_draws_of_a_sample_do_not_depend_on_its_batch(samples, seed, data):
  records, epochs = np.array(samples).T
  whole = augment.draws(seed, records, epochs)
  assert whole.dtype == np.float32
  place = data.draw(st.integers(0, len(samples) - 1))
  alone = augment.draws(seed, records[place : place + 1], epochs[place : place + 1])
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
