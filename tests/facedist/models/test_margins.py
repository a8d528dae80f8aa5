"""Each margin against numpy on a sweep of angles, and its slope against differences.

The references work with the angle itself, by other formulas than the code's.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist.models.heads import margins

ANGLES = np.concatenate([np.linspace(0.002, np.pi - 0.002, 631), [0.0, np.pi]])
INNER = np.abs(ANGLES - np.pi / 2) < np.pi / 2 - 0.02


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


def mixed(angles: np.ndarray, score: float) -> np.ndarray:
  """AdaFace with m = 0.4."""
  return np.cos(np.clip(angles - 0.4 * score, 0, np.pi)) - 0.4 * score - 0.4


def adaface(target: tf.Tensor, score: float) -> tf.Tensor:
  scores = tf.fill(target.shape, tf.cast(score, target.dtype))
  return margins.adaface(target, norm_score=scores, margin=0.4)


def magface(target: tf.Tensor, norm: float) -> tf.Tensor:
  """Margins of 0.45 at norm 10 to 0.8 at norm 110."""
  norms = tf.fill(target.shape, tf.cast(norm, target.dtype))
  return margins.magface(
    target, norms=norms, margins=(0.45, 0.8), norm_range=(10.0, 110.0)
  )


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
      functools.partial(adaface, score=score),
      functools.partial(mixed, score=score),
    )
    for score in (-1.0, 0.5, 1.0)
  },
  **{
    f"magface norm {norm}": (
      functools.partial(magface, norm=norm),
      functools.partial(widened, margin=margin),
    )
    for norm, margin in ((1.0, 0.45), (60.0, 0.625), (500.0, 0.8))
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


def test_adafaces_score_gets_no_gradient():
  with tf.GradientTape() as tape:
    score = tf.constant([0.5])
    tape.watch(score)
    value = margins.adaface(tf.constant([0.3]), norm_score=score, margin=0.4)
  assert tape.gradient(value, score) is None
