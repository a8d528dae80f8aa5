"""Each margin against numpy on a sweep of angles, and its slope against differences.

The references work with the angle itself, by other formulas than the code's.
"""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import margins

ANGLES = np.concatenate([np.linspace(0.002, np.pi - 0.002, 631), [0.0, np.pi]])
INNER = np.abs(ANGLES - np.pi / 2) < np.pi / 2 - 0.02
NORM_RANGE = (10.0, 110.0)


def multiplied(angles: np.ndarray, factor: float, added: float = 0.0) -> np.ndarray:
  """SphereFace's ψ(factor · θ + added), branch by branch."""
  wide = factor * angles + added
  result = np.full_like(angles, np.nan)
  for branch in range(8):
    inside = (wide >= branch * np.pi) & (wide <= (branch + 1) * np.pi)
    result[inside] = (-1) ** branch * np.cos(wide[inside]) - 2 * branch
  return result


def widened(angles: np.ndarray, margin: float | np.ndarray) -> np.ndarray:
  """ArcFace's cos(θ + m), or what stands in for it past π - m."""
  past = np.cos(angles) - margin * np.sin(margin)
  return np.where(angles + margin < np.pi, np.cos(angles + margin), past)


def by_norm(norm: float) -> float:
  """MagFace's margin between 0.45 at norm 10 and 0.8 at 110."""
  return float(np.interp(norm, [10, 110], [0.45, 0.8]))


def mixed(angles: np.ndarray, score: float) -> np.ndarray:
  """AdaFace with m = 0.4."""
  return np.cos(np.clip(angles - 0.4 * score, 0, np.pi)) - 0.4 * score - 0.4


Curve = Callable[[tf.Tensor], tf.Tensor]
CURVES: dict[str, tuple[Curve, Callable[[np.ndarray], np.ndarray]]] = {
  "sphereface 1.35": (
    lambda target: margins.sphereface(target, angle_factor=1.35),
    lambda angles: multiplied(angles, 1.35),
  ),
  "sphereface 4": (
    lambda target: margins.sphereface(target, angle_factor=4.0),
    lambda angles: multiplied(angles, 4.0),
  ),
  "cosface": (
    lambda target: margins.cosface(target, margin=0.35),
    lambda angles: np.cos(angles) - 0.35,
  ),
  "arcface": (
    lambda target: margins.arcface(target, margin=0.5),
    lambda angles: widened(angles, 0.5),
  ),
  "combined": (
    lambda target: margins.combined(
      target, angle_factor=1.2, angle_margin=0.3, cosine_margin=0.2
    ),
    lambda angles: multiplied(angles, 1.2, 0.3) - 0.2,
  ),
  **{
    f"adaface score {score}": (
      lambda target, score=score: margins.adaface(
        target,
        norm_score=tf.fill(target.shape, tf.cast(score, target.dtype)),
        margin=0.4,
      ),
      lambda angles, score=score: mixed(angles, score),
    )
    for score in (-1.0, 0.0, 0.5, 1.0)
  },
  **{
    f"magface norm {norm}": (
      lambda target, norm=norm: margins.magface(
        target,
        norms=tf.fill(target.shape, tf.cast(norm, target.dtype)),
        margins=(0.45, 0.8),
        norm_range=NORM_RANGE,
      ),
      lambda angles, norm=norm: widened(angles, by_norm(norm)),
    )
    for norm in (1.0, 10.0, 60.0, 110.0, 500.0)
  },
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CURVES)
def test_a_margin_is_its_papers_equation_at_every_angle(name: str, dtype: str):
  curve, reference = CURVES[name]
  value = curve(tf.constant(np.cos(ANGLES), dtype))
  assert value.dtype == dtype
  # within 0.001 of 0 and π the angle is held, which moves cosines by its square
  np.testing.assert_allclose(value, reference(ANGLES), atol=2e-3)
  close = {"float32": 3e-5, "float64": 1e-10}[dtype]
  np.testing.assert_allclose(value[INNER], reference(ANGLES)[INNER], atol=close)


@pytest.mark.parametrize("name", CURVES)
def test_the_slope_of_a_margin_is_that_of_differences(name: str):
  curve, _ = CURVES[name]
  cosines = np.cos(ANGLES[INNER])
  step = 1e-6
  with tf.GradientTape() as tape:
    target = tf.constant(cosines)
    tape.watch(target)
    value = curve(target)
  slope = tape.gradient(value, target).numpy()
  below, above = curve(target - step).numpy(), curve(target + step).numpy()
  differences = (above - below) / (2 * step)
  # a branch point between the two sides has no slope: at most two of the angles
  is_off = ~np.isclose(slope, differences, rtol=1e-4, atol=1e-5)
  assert is_off.sum() <= 2, ANGLES[INNER][is_off]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CURVES)
def test_a_margin_and_its_slope_are_finite_at_the_ends_and_beyond(
  name: str, dtype: str
):
  ends = [-1.0000002, -1.0, -0.99999994, 0.0, 0.99999994, 1.0, 1.0000002]
  with tf.GradientTape() as tape:
    target = tf.constant(ends, dtype)
    tape.watch(target)
    value = CURVES[name][0](target)
  assert np.isfinite(value).all()
  assert np.isfinite(tape.gradient(value, target)).all()


@pytest.mark.parametrize("name", CURVES)
def test_a_margin_never_helps_and_falls_with_the_angle(name: str):
  angles = np.linspace(0.01, np.pi - 0.01, 1000)
  value = CURVES[name][0](tf.constant(np.cos(angles))).numpy()
  if not name.startswith("adaface"):  # it reduces the angle for large norms
    assert (value <= np.cos(angles) + 1e-12).all()
  assert (np.diff(value) <= 1e-12).all()


def test_the_combined_margin_has_the_others_as_its_corners():
  target = tf.constant(np.cos(np.linspace(0.01, np.pi - 0.51, 200)))
  for corner, alone in (
    (
      margins.combined(target, angle_factor=1.0, angle_margin=0.0, cosine_margin=0.35),
      "cosface",
    ),
    (
      margins.combined(target, angle_factor=1.35, angle_margin=0.0, cosine_margin=0.0),
      "sphereface 1.35",
    ),
    (
      margins.combined(target, angle_factor=1.0, angle_margin=0.5, cosine_margin=0.0),
      "arcface",
    ),
  ):
    np.testing.assert_allclose(corner, CURVES[alone][0](target), atol=1e-12)


def test_magfaces_gradient_by_the_norm_is_that_of_differences():
  norms = np.linspace(11.0, 109.0, 50)
  target = tf.constant(np.cos(np.linspace(0.1, 2.2, 50)))

  def both(given: tf.Tensor) -> tf.Tensor:
    margined = margins.magface(
      target, norms=given, margins=(0.45, 0.8), norm_range=NORM_RANGE
    )
    return margined + margins.magface_penalty(given, norm_range=NORM_RANGE)

  with tf.GradientTape() as tape:
    given = tf.constant(norms)
    tape.watch(given)
    value = both(given)
  slope = tape.gradient(value, given)
  differences = (both(given + 1e-5) - both(given - 1e-5)) / 2e-5
  np.testing.assert_allclose(slope, differences, atol=1e-8)


def test_magfaces_penalty_falls_until_the_largest_norm():
  value = margins.magface_penalty(
    tf.constant([1.0, 10.0, 50.0, 110.0, 999.0]), norm_range=NORM_RANGE
  )
  ends = [10 / 12100 + 0.1, 50 / 12100 + 0.02, 2 / 110]
  np.testing.assert_allclose(value, [ends[0], *ends, ends[2]], rtol=1e-6)


def test_adafaces_score_gets_no_gradient():
  with tf.GradientTape() as tape:
    score = tf.constant([0.5])
    tape.watch(score)
    value = margins.adaface(tf.constant([0.3]), norm_score=score, margin=0.4)
  assert tape.gradient(value, score) is None


def test_curricularface_reweights_only_negatives_above_the_margined_target():
  cosines = tf.constant([[0.6, 0.2, -0.5], [0.1, 0.9, 0.4]])
  margined = tf.constant([0.15, 0.5])
  value = margins.curricularface_others(cosines, margined, curriculum=tf.constant(0.3))
  np.testing.assert_allclose(
    value, [[0.6 * 0.9, 0.2 * 0.5, -0.5], [0.1, 0.9 * 1.2, 0.4]], rtol=1e-6
  )


def test_curricularfaces_slope_is_that_of_differences():
  rng = np.random.default_rng(0)
  cosines = tf.constant(rng.uniform(-1, 1, (5, 40)))
  margined = tf.constant(rng.uniform(-0.5, 0.5, 5))
  t = tf.constant(0.3, tf.float64)

  def total(values: tf.Tensor) -> tf.Tensor:
    return margins.curricularface_others(values, margined, curriculum=t)

  with tf.GradientTape() as tape:
    tape.watch(cosines)
    value = total(cosines)
  slope = tape.gradient(value, cosines)  # each value depends on its own cosine alone
  differences = (total(cosines + 1e-7) - total(cosines - 1e-7)) / 2e-7
  np.testing.assert_allclose(slope, differences, atol=1e-6)


def test_the_nearest_sub_centre_counts_and_alone_gets_the_gradient():
  with tf.GradientTape() as tape:
    cosines = tf.constant([[[0.1, 0.7, -0.2], [-0.9, -0.8, -0.3]]])
    tape.watch(cosines)
    nearest = margins.nearest_sub_centre(cosines)
  np.testing.assert_allclose(nearest, [[0.7, -0.3]])
  np.testing.assert_array_equal(
    tape.gradient(nearest, cosines), [[[0, 1, 0], [0, 0, 1]]]
  )
