"""The margins of the heads: from the cosine with the own class centre to a harder one.

Each function is a paper's equation of the target logit, before it is scaled. `target`
is float[batch], the cosine of every embedding with the centre of its own identity, of
any length and of float32 or float64; the result is alike. All are finite with finite
gradients everywhere, at cosines of ±1 and beyond them by rounding too.
"""

import math

import tensorflow as tf

_SMALLEST_SINE = 1e-3
"""Bounds the slope of the angle, -1 / sine, which has none at a cosine of ±1."""


def softmax(target: tf.Tensor) -> tf.Tensor:
  """Leaves the target: cos θ, CosFace's L_ns (arXiv:1801.09414, section 3.1)."""
  return target


def sphereface(target: tf.Tensor, *, margin: float) -> tf.Tensor:
  """Multiplies the angle: ψ(θ) of A-Softmax (arXiv:1704.08063).

  ψ(θ) = (-1)^k cos(mθ) - 2k for θ in [kπ/m, (k+1)π/m], which falls all the way to π.

  Args:
    target: float[batch] cosines.
    margin: Factor m of the angle, not below 1; need not be whole.
  """
  return _falling_cosine(margin * angles(target))


def cosface(target: tf.Tensor, *, margin: float) -> tf.Tensor:
  """Lowers the cosine: cos θ - m, CosFace's L_lmc (arXiv:1801.09414, section 3.1).

  Args:
    target: float[batch] cosines.
    margin: m in cosine units, not radians.
  """
  return target - margin


def arcface(target: tf.Tensor, *, margin: float | tf.Tensor) -> tf.Tensor:
  """Widens the angle: cos(θ + m) (arXiv:1801.07698, eq. 3).

  From π - m on, where cos(θ + m) would rise again, cos θ - m sin m takes its place, as
  in the authors' code (arcface_torch, losses.py): it steps down there and falls on.

  Args:
    target: float[batch] cosines.
    margin: m in radians, one or float[batch].
  """
  width = tf.convert_to_tensor(margin, target.dtype)
  widened = target * tf.cos(width) - sines(target) * tf.sin(width)
  return tf.where(target > -tf.cos(width), widened, target - width * tf.sin(width))


def combined(target: tf.Tensor, *, m1: float, m2: float, m3: float) -> tf.Tensor:
  """Combines three margins: cos(m1 θ + m2) - m3 (arXiv:1801.07698, eq. 4).

  Past m1 θ + m2 = π the cosine is continued as SphereFace's is, so it falls on.

  Args:
    target: float[batch] cosines.
    m1: Factor of the angle.
    m2: Radians added to it.
    m3: Cosine units taken from its cosine.
  """
  return _falling_cosine(m1 * angles(target) + m2) - m3


def adaface(target: tf.Tensor, *, norm_score: tf.Tensor, margin: float) -> tf.Tensor:
  """Chooses the kind of margin by the norm (arXiv:2204.00964, "Adaptive Margin").

  cos(θ + g_angle) - g_add with g_angle = -m ẑ and g_add = m ẑ + m: CosFace with twice
  the margin and an angle eased by it for long embeddings, ArcFace for short ones. The
  angle stays within [0, π] and has no gradient at its ends; in the authors' head.py it
  stays 0.001 inside.

  Args:
    target: float[batch] cosines.
    norm_score: float[batch], ẑ in [-1, 1]; no gradient goes through it.
    margin: m, both in radians and in cosine units.
  """
  score = tf.stop_gradient(norm_score)
  angle = tf.clip_by_value(angles(target) - margin * score, 0, math.pi)
  return tf.cos(angle) - margin * (score + 1)


def magface(
  target: tf.Tensor,
  *,
  norms: tf.Tensor,
  margins: tuple[float, float],
  norm_range: tuple[float, float],
) -> tf.Tensor:
  """Widens the angle the more the longer the embedding (arXiv:2103.06627).

  cos(θ + m(a)) with m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a). Past π - m(a) as
  ArcFace: one of two branches of the authors' models/magface.py, whose default
  (`easy_margin`) puts no margin on any cosine below 0.

  Args:
    target: float[batch] cosines.
    norms: float[batch] lengths of the embeddings, a; the gradient reaches them.
    margins: (l_m, u_m) in radians, at the shortest and at the longest.
    norm_range: (l_a, u_a), what `norms` are clipped to.
  """
  (lowest, highest), (shortest, longest) = margins, norm_range
  share = (tf.clip_by_value(norms, shortest, longest) - shortest) / (longest - shortest)
  return arcface(target, margin=lowest + (highest - lowest) * share)


def magface_penalty(norms: tf.Tensor, *, norm_range: tuple[float, float]) -> tf.Tensor:
  """Favours long embeddings: g(a) = a / u_a² + 1 / a (arXiv:2103.06627).

  Args:
    norms: float[batch] lengths, a, clipped to `norm_range`: outside, no gradient.
    norm_range: (l_a, u_a).

  Returns:
    float[batch], to be weighted with λ_g and added to the losses.
  """
  length = tf.clip_by_value(norms, *norm_range)
  return length / norm_range[1] ** 2 + 1 / length


def curricularface_others(
  cosines: tf.Tensor, margined: tf.Tensor, *, curriculum: tf.Tensor
) -> tf.Tensor:
  """Reweights hard negatives: N(t, cos θ_j) (arXiv:2004.00288, section 3.2).

  cos θ_j where it is at most the target with its margin, T(cos θ_y), else
  cos θ_j (t + cos θ_j). T is `arcface`, also past π - m, where the authors' code
  compares with cos(θ_y + m).

  Args:
    cosines: float[batch, identities] of all centres.
    margined: float[batch], the target with its margin.
    curriculum: float[], t; no gradient goes through it.
  """
  is_hard = cosines > margined[:, None]
  weighted = cosines * (tf.stop_gradient(curriculum) + cosines)
  return tf.where(is_hard, weighted, cosines)


def nearest_sub_centre(cosines: tf.Tensor) -> tf.Tensor:
  """Takes each identity's nearest centre: max over K (arXiv:1801.07698v4, sub-centres).

  Args:
    cosines: float[batch, identities, K].

  Returns:
    float[batch, identities].
  """
  return tf.reduce_max(cosines, axis=-1)


def angles(cosines: tf.Tensor) -> tf.Tensor:
  """Returns angles in radians; those nearer to 0 or π than 0.001 become 0.001."""
  return tf.atan2(sines(cosines), cosines)


def sines(cosines: tf.Tensor) -> tf.Tensor:
  """Returns the sines of the angles, at least 0.001; there, with no gradient."""
  return tf.sqrt(tf.maximum(1 - cosines * cosines, _SMALLEST_SINE**2))


def _falling_cosine(angles: tf.Tensor) -> tf.Tensor:
  """Returns (-1)^k cos(angle) - 2k, k = floor(angle / π): cosine that never rises."""
  turns = tf.stop_gradient(tf.floor(angles / math.pi))
  sign = 1 - 2 * tf.math.floormod(turns, 2)
  return sign * tf.cos(angles) - 2 * turns
