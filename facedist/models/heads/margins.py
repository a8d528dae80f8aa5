"""The margin heads: how each makes the target's cosine harder to reach.

A head is a pure function of cosines, a small class with its hyperparameters, and an
entry of `MARGINS`. The functions are the papers' equations, before the logits are
scaled. Their `target` is float[batch], the cosine of every embedding with the class
weight of its own identity, in float32 or float64; the result has its shape and dtype.
Values and gradients are finite everywhere: at cosines of ±1, and where rounding takes
cosines beyond them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf

from facedist.models.heads import running_stats

_MIN_SINE = 1e-3
"""Bounds the slope of the angle, -1 / sine, which is infinite at a cosine of ±1."""


@dataclasses.dataclass(frozen=True)
class MarginInput:
  """What a margin computes its logits from.

  Attributes:
    cosines: float32[batch, identities], with the nearest sub-centre of each identity.
    is_target: bool[batch, identities].
    target: float32[batch], the cosine with the own identity.
    norms: float32[batch], L2 norms of the embeddings.
    running_statistics: float32[n], the head's; n is 0 for most heads.
  """

  cosines: tf.Tensor
  is_target: tf.Tensor
  target: tf.Tensor
  norms: tf.Tensor
  running_statistics: tf.Tensor


def _hyperparameter(default: float, *, flag: str) -> Any:
  """Declares a hyperparameter of a head, its default and the flag that sets it."""
  return dataclasses.field(default=default, metadata={"flag": flag})


@dataclasses.dataclass(frozen=True)
class Margin:
  """A head's hyperparameters and its logits before scaling; one subclass a head.

  Attributes:
    initial_statistics: Running statistics at step 0; empty for a head without them.
    default_sub_centres: Class weights of an identity where --sub_centres is not given.
  """

  initial_statistics: ClassVar[tuple[float, ...]] = ()
  default_sub_centres: ClassVar[int] = 1

  @classmethod
  def defaults(cls) -> dict[str, float]:
    """Returns the default of each of the head's hyperparameters, by its flag."""
    return {
      field.metadata["flag"]: float(field.default)  # type: ignore[arg-type]
      for field in dataclasses.fields(cls)
    }

  @classmethod
  def from_flags(cls, values: Mapping[str, Any]) -> "Margin":
    """Makes the head from the values of flags, of which it takes its own."""
    own = {
      field.name: values[field.metadata["flag"]] for field in dataclasses.fields(cls)
    }
    return cls(**own)

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns float32[batch], the targets' cosines with the margin."""
    raise NotImplementedError

  def other_cosines(self, inputs: MarginInput, margined: tf.Tensor) -> tf.Tensor:
    """Returns float32[batch, identities]; the targets' columns are not used.

    Args:
      inputs: Of the batch.
      margined: float32[batch], the result of `target_cosines`.
    """
    del margined
    return inputs.cosines

  def penalty(self, inputs: MarginInput) -> tf.Tensor | None:
    """Returns float32[batch] to add to the losses; none without a penalty."""
    del inputs
    return None

  def batch_sums(self, inputs: MarginInput) -> tf.Tensor:
    """Returns one replica's part of the sums that the statistics follow from."""
    raise NotImplementedError

  def next_statistics(self, statistics: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
    """Returns the running statistics after a global batch with these sums."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Softmax(Margin):
  """No margin: cos θ, CosFace's L_ns (arXiv:1801.09414, section 3.1)."""

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the cosines as they are."""
    return inputs.target


def sphereface(target: tf.Tensor, *, angle_factor: float) -> tf.Tensor:
  """Multiplies the angle: ψ(θ) of A-Softmax (arXiv:1704.08063).

  ψ(θ) = (-1)^k cos(mθ) - 2k for θ in [kπ/m, (k+1)π/m], which falls all the way to π.

  Args:
    target: float[batch] cosines.
    angle_factor: m, at least 1; need not be an integer.
  """
  return _falling_cosine(angle_factor * angles(target))


@dataclasses.dataclass(frozen=True)
class SphereFace(Margin):
  """ψ(θ), a multiplied angle; see `sphereface`.

  Attributes:
    angle_factor: Factor of the angle, at least 1.
  """

  angle_factor: float = _hyperparameter(1.35, flag="margin")

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns ψ of the targets' angles."""
    return sphereface(inputs.target, angle_factor=self.angle_factor)


def cosface(target: tf.Tensor, *, margin: float) -> tf.Tensor:
  """Lowers the cosine: cos θ - m, CosFace's L_lmc (arXiv:1801.09414, section 3.1).

  Args:
    target: float[batch] cosines.
    margin: m in cosine units, not radians.
  """
  return target - margin


@dataclasses.dataclass(frozen=True)
class CosFace(Margin):
  """cos θ - m; see `cosface`.

  Attributes:
    margin: m in cosine units.
  """

  margin: float = _hyperparameter(0.35, flag="margin")

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the lowered cosines."""
    return cosface(inputs.target, margin=self.margin)


def arcface(target: tf.Tensor, *, margin: float | tf.Tensor) -> tf.Tensor:
  """Widens the angle: cos(θ + m) (arXiv:1801.07698, eq. 3).

  From π - m on, where cos(θ + m) would rise again, the result is cos θ - m sin m, as in
  the authors' code (arcface_torch, losses.py): it steps down there and keeps falling.

  Args:
    target: float[batch] cosines.
    margin: m in radians, one or float[batch].
  """
  width = tf.convert_to_tensor(margin, target.dtype)
  widened = target * tf.cos(width) - sines(target) * tf.sin(width)
  return tf.where(target > -tf.cos(width), widened, target - width * tf.sin(width))


@dataclasses.dataclass(frozen=True)
class ArcFace(Margin):
  """cos(θ + m); see `arcface`.

  Attributes:
    margin: m in radians.
  """

  margin: float = _hyperparameter(0.5, flag="margin")

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the cosines of the widened angles."""
    return arcface(inputs.target, margin=self.margin)


@dataclasses.dataclass(frozen=True)
class SubcentreArcFace(ArcFace):
  """ArcFace with K class weights an identity, sub-centres (arXiv:1801.07698v4)."""

  default_sub_centres: ClassVar[int] = 3


def nearest_sub_centre(cosines: tf.Tensor) -> tf.Tensor:
  """Takes each identity's nearest sub-centre: max over K (arXiv:1801.07698v4).

  Args:
    cosines: float[batch, identities, K].

  Returns:
    float[batch, identities].
  """
  return tf.reduce_max(cosines, axis=-1)


def combined(
  target: tf.Tensor, *, angle_factor: float, angle_margin: float, cosine_margin: float
) -> tf.Tensor:
  """Combines three margins: cos(m1 θ + m2) - m3 (arXiv:1801.07698, eq. 4).

  Past m1 θ + m2 = π the cosine is continued as SphereFace's is, so it keeps falling.

  Args:
    target: float[batch] cosines.
    angle_factor: m1, factor of the angle.
    angle_margin: m2, added to the angle, in radians.
    cosine_margin: m3, subtracted from the cosine.
  """
  return _falling_cosine(angle_factor * angles(target) + angle_margin) - cosine_margin


@dataclasses.dataclass(frozen=True)
class Combined(Margin):
  """cos(m1 θ + m2) - m3; see `combined`.

  Attributes:
    angle_factor: m1.
    angle_margin: m2 in radians.
    cosine_margin: m3 in cosine units.
  """

  angle_factor: float = _hyperparameter(1.0, flag="margin")
  angle_margin: float = _hyperparameter(0.3, flag="margin2")
  cosine_margin: float = _hyperparameter(0.2, flag="margin3")

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the cosines with all three margins."""
    return combined(
      inputs.target,
      angle_factor=self.angle_factor,
      angle_margin=self.angle_margin,
      cosine_margin=self.cosine_margin,
    )


def curricularface_others(
  cosines: tf.Tensor, margined: tf.Tensor, *, curriculum: tf.Tensor
) -> tf.Tensor:
  """Reweights hard negatives: N(t, cos θ_j) (arXiv:2004.00288, section 3.2).

  cos θ_j where it is at most the target with its margin, T(cos θ_y), else
  cos θ_j (t + cos θ_j). T is `arcface`, also past π - m, where the authors' code
  compares with cos(θ_y + m).

  Args:
    cosines: float[batch, identities].
    margined: float[batch], the target with its margin.
    curriculum: float[], t; no gradient goes through it.
  """
  is_hard = cosines > margined[:, None]
  weighted = cosines * (tf.stop_gradient(curriculum) + cosines)
  return tf.where(is_hard, weighted, cosines)


@dataclasses.dataclass(frozen=True)
class CurricularFace(ArcFace):
  """ArcFace with reweighted hard negatives; its running statistic is t.

  Attributes:
    momentum: Weight of the old t against the batch's mean target cosine.
  """

  momentum: float = _hyperparameter(0.99, flag="head_momentum")
  initial_statistics: ClassVar[tuple[float, ...]] = (0.0,)

  def other_cosines(self, inputs: MarginInput, margined: tf.Tensor) -> tf.Tensor:
    """Returns the cosines, those of hard negatives reweighted."""
    return curricularface_others(
      inputs.cosines, margined, curriculum=inputs.running_statistics[0]
    )

  def batch_sums(self, inputs: MarginInput) -> tf.Tensor:
    """Returns float32[2] of `running_stats.curriculum_sums`."""
    return running_stats.curriculum_sums(inputs.target)

  def next_statistics(self, statistics: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
    """Returns float32[1], the next t."""
    return running_stats.next_curriculum(statistics, sums, momentum=self.momentum)


def adaface(target: tf.Tensor, *, norm_score: tf.Tensor, margin: float) -> tf.Tensor:
  """Chooses the kind of margin by the norm (arXiv:2204.00964, "Adaptive Margin").

  cos(θ + g_angle) - g_add with g_angle = -m ẑ and g_add = m ẑ + m. For large norms that
  is CosFace with twice the margin and an angle reduced by m, for small ones ArcFace.
  The angle stays within [0, π] and has no gradient at its ends; in the authors' head.py
  it stays 0.001 inside.

  Args:
    target: float[batch] cosines.
    norm_score: float[batch], ẑ in [-1, 1]; no gradient goes through it.
    margin: m, both in radians and in cosine units.
  """
  score = tf.stop_gradient(norm_score)
  angle = tf.clip_by_value(angles(target) - margin * score, 0, math.pi)
  return tf.cos(angle) - margin * (score + 1)


@dataclasses.dataclass(frozen=True)
class AdaFace(Margin):
  """A margin by the embedding's norm; see `adaface`.

  Its running statistics are mean and standard deviation of the norms.

  Attributes:
    margin: m, both in radians and in cosine units.
    concentration: h; the score ẑ is h times the standard deviations above the mean.
    momentum: Weight of the old statistics against the batch's.
  """

  margin: float = _hyperparameter(0.4, flag="margin")
  concentration: float = _hyperparameter(0.333, flag="norm_concentration")
  momentum: float = _hyperparameter(0.99, flag="head_momentum")
  initial_statistics: ClassVar[tuple[float, ...]] = (20.0, 100.0)

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the cosines with the margin that fits each norm."""
    score = running_stats.norm_score(
      inputs.running_statistics, inputs.norms, concentration=self.concentration
    )
    return adaface(inputs.target, norm_score=score, margin=self.margin)

  def batch_sums(self, inputs: MarginInput) -> tf.Tensor:
    """Returns float32[3] of `running_stats.norm_sums`."""
    return running_stats.norm_sums(inputs.running_statistics, inputs.norms)

  def next_statistics(self, statistics: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
    """Returns float32[2], the next mean and standard deviation."""
    return running_stats.next_norms(statistics, sums, momentum=self.momentum)


def magface(
  target: tf.Tensor,
  *,
  norms: tf.Tensor,
  margins: tuple[float, float],
  norm_range: tuple[float, float],
) -> tf.Tensor:
  """Widens the angle more, the larger the norm (arXiv:2103.06627).

  cos(θ + m(a)) with m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a). Past π - m(a) as
  ArcFace: one of two branches of the authors' models/magface.py, whose default
  (`easy_margin`) puts no margin on any cosine below 0.

  Args:
    target: float[batch] cosines.
    norms: float[batch], a; the gradient reaches them.
    margins: (l_m, u_m) in radians, at the smallest and at the largest norm.
    norm_range: (l_a, u_a), what `norms` are clipped to.
  """
  (min_margin, max_margin), (min_norm, max_norm) = margins, norm_range
  above = tf.clip_by_value(norms, min_norm, max_norm) - min_norm
  fraction = above / (max_norm - min_norm)
  return arcface(target, margin=min_margin + (max_margin - min_margin) * fraction)


def magface_penalty(norms: tf.Tensor, *, norm_range: tuple[float, float]) -> tf.Tensor:
  """Favours large norms: g(a) = a / u_a² + 1 / a (arXiv:2103.06627).

  Args:
    norms: float[batch], a, clipped to `norm_range`: outside, no gradient.
    norm_range: (l_a, u_a).

  Returns:
    float[batch], to be weighted with λ_g and added to the losses.
  """
  clipped = tf.clip_by_value(norms, *norm_range)
  return clipped / norm_range[1] ** 2 + 1 / clipped


@dataclasses.dataclass(frozen=True)
class MagFace(Margin):
  """A margin that grows with the norm, and a penalty; see `magface`.

  Attributes:
    min_margin, max_margin: l_m and u_m in radians.
    min_norm, max_norm: l_a and u_a, norms of embeddings.
    penalty_weight: λ_g.
  """

  min_margin: float = _hyperparameter(0.45, flag="margin")
  max_margin: float = _hyperparameter(0.8, flag="margin2")
  min_norm: float = _hyperparameter(10.0, flag="norm_low")
  max_norm: float = _hyperparameter(110.0, flag="norm_high")
  penalty_weight: float = _hyperparameter(35.0, flag="norm_weight")

  def target_cosines(self, inputs: MarginInput) -> tf.Tensor:
    """Returns the cosines of the widened angles."""
    return magface(
      inputs.target,
      norms=inputs.norms,
      margins=(self.min_margin, self.max_margin),
      norm_range=(self.min_norm, self.max_norm),
    )

  def penalty(self, inputs: MarginInput) -> tf.Tensor:
    """Returns λ_g g(a)."""
    norm_range = (self.min_norm, self.max_norm)
    return self.penalty_weight * magface_penalty(inputs.norms, norm_range=norm_range)


MARGINS: dict[str, type[Margin]] = {
  "softmax": Softmax,
  "sphereface": SphereFace,
  "cosface": CosFace,
  "arcface": ArcFace,
  "combined": Combined,
  "curricularface": CurricularFace,
  "adaface": AdaFace,
  "magface": MagFace,
  "subcentre_arcface": SubcentreArcFace,
}
"""The margin heads by --head."""


def angles(cosines: tf.Tensor) -> tf.Tensor:
  """Returns angles in radians; those nearer to 0 or π than 0.001 become 0.001."""
  return tf.atan2(sines(cosines), cosines)


def sines(cosines: tf.Tensor) -> tf.Tensor:
  """Returns the sines of the angles, at least 0.001; there, with no gradient."""
  return tf.sqrt(tf.maximum(1 - cosines * cosines, _MIN_SINE**2))


def _falling_cosine(angles: tf.Tensor) -> tf.Tensor:
  """Returns (-1)^k cos(angle) - 2k, k = floor(angle / π), which never rises."""
  turns = tf.stop_gradient(tf.floor(angles / math.pi))
  sign = 1 - 2 * tf.math.floormod(turns, 2)
  return sign * tf.cos(angles) - 2 * turns
