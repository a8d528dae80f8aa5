"""The margins of the heads: from the cosine with the own class centre to a harder one.

Each function is a paper's equation of the target logit, before it is scaled. `target`
is float[batch], the cosine of every embedding with the centre of its own identity, of
any length and of float32 or float64; the result is alike. All are finite with finite
gradients everywhere, at cosines of ±1 and beyond them by rounding too.

Each margin head by name: its equations and its usual numbers.
"""

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from facedist.models.heads import running_stats

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


@dataclasses.dataclass(frozen=True)
class Knobs:
  """The numbers of a head; each head says in `MARGINS` which margins it has.

  Attributes:
    margin, margin2, margin3: Margins, in the units of the head's equation.
    scale: Inverse softmax temperature.
    norm_low, norm_high: Lengths that MagFace's margin runs between.
    norm_weight: Weight of MagFace's penalty of short embeddings.
    norm_concentration: Share of a deviation that moves AdaFace's score by 1.
    momentum: Weight of what a head remembers against the batch.
  """

  margin: float = 0.0
  margin2: float = 0.0
  margin3: float = 0.0
  scale: float = 64.0
  norm_low: float = 10.0
  norm_high: float = 110.0
  norm_weight: float = 35.0
  norm_concentration: float = 0.333
  momentum: float = 0.99


@dataclasses.dataclass(frozen=True)
class HeadInput:
  """What a head sees of a batch.

  Attributes:
    cosines: float32[batch, identities], the nearest sub-centre of each; no margin.
    is_target: bool[batch, identities].
    target: float32[batch], the cosine with the own identity.
    norms: float32[batch], lengths of the embeddings.
    memory: float32[n], what the head remembers; n is 0 for most.
  """

  cosines: tf.Tensor
  is_target: tf.Tensor
  target: tf.Tensor
  norms: tf.Tensor
  memory: tf.Tensor


@dataclasses.dataclass(frozen=True)
class RunningStats:
  """What a head keeps between steps, and how it follows from a batch.

  Attributes:
    first: Values at step 0.
    sums: One replica's sums, which add up over replicas.
    following: The next values, from the old ones and the sums of the global batch.
  """

  first: tuple[float, ...]
  sums: Callable[[HeadInput], tf.Tensor]
  following: Callable[..., tf.Tensor]


def _same(seen: HeadInput, margined: tf.Tensor) -> tf.Tensor:
  """Leaves the cosines with other identities as they are."""
  return seen.cosines


@dataclasses.dataclass(frozen=True)
class Margin:
  """A head's equations and its usual numbers.

  Attributes:
    margins: Usual values of --margin, --margin2 and --margin3, as many as it has.
    target: The target's margined cosine, float32[batch].
    others: The cosines with all identities, of which the target's place is not used.
    penalty: What is added to each loss, float32[batch].
    memory: What it remembers.
    sub_centres: Usual number of centres an identity.
    numbers: The flags of its other numbers.
  """

  margins: tuple[float, ...]
  target: Callable[[HeadInput, Knobs], tf.Tensor]
  others: Callable[[HeadInput, tf.Tensor], tf.Tensor] = _same
  penalty: Callable[[HeadInput, Knobs], tf.Tensor] | None = None
  memory: RunningStats | None = None
  sub_centres: int = 1
  numbers: tuple[str, ...] = ()


def _arcface(seen: HeadInput, knobs: Knobs) -> tf.Tensor:
  return arcface(seen.target, margin=knobs.margin)


def _combined(seen: HeadInput, knobs: Knobs) -> tf.Tensor:
  return combined(seen.target, m1=knobs.margin, m2=knobs.margin2, m3=knobs.margin3)


def _harder_others(seen: HeadInput, margined: tf.Tensor) -> tf.Tensor:
  return curricularface_others(seen.cosines, margined, curriculum=seen.memory[0])


def _adaface(seen: HeadInput, knobs: Knobs) -> tf.Tensor:
  score = running_stats.norm_score(
    seen.memory, seen.norms, concentration=knobs.norm_concentration
  )
  return adaface(seen.target, norm_score=score, margin=knobs.margin)


def _magface(seen: HeadInput, knobs: Knobs) -> tf.Tensor:
  return magface(
    seen.target,
    norms=seen.norms,
    margins=(knobs.margin, knobs.margin2),
    norm_range=(knobs.norm_low, knobs.norm_high),
  )


def _magface_penalty(seen: HeadInput, knobs: Knobs) -> tf.Tensor:
  norm_range = (knobs.norm_low, knobs.norm_high)
  return knobs.norm_weight * magface_penalty(seen.norms, norm_range=norm_range)


MARGINS: dict[str, Margin] = {
  "softmax": Margin((), lambda seen, knobs: softmax(seen.target)),
  "sphereface": Margin(
    (1.35,), lambda seen, knobs: sphereface(seen.target, margin=knobs.margin)
  ),
  "cosface": Margin(
    (0.35,), lambda seen, knobs: cosface(seen.target, margin=knobs.margin)
  ),
  "arcface": Margin((0.5,), _arcface),
  "combined": Margin((1.0, 0.3, 0.2), _combined),
  "curricularface": Margin(
    (0.5,),
    _arcface,
    others=_harder_others,
    memory=RunningStats(
      (0.0,),
      lambda seen: running_stats.curriculum_sums(seen.target),
      running_stats.next_curriculum,
    ),
    numbers=("head_momentum",),
  ),
  "adaface": Margin(
    (0.4,),
    _adaface,
    memory=RunningStats(
      (20.0, 100.0),
      lambda seen: running_stats.norm_sums(seen.memory, seen.norms),
      running_stats.next_norms,
    ),
    numbers=("norm_concentration", "head_momentum"),
  ),
  "magface": Margin(
    (0.45, 0.8),
    _magface,
    penalty=_magface_penalty,
    numbers=("norm_low", "norm_high", "norm_weight"),
  ),
  "subcentre_arcface": Margin((0.5,), _arcface, sub_centres=3),
}
