"""Each margin head by name: its equations and its usual numbers."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from facedist.models import head_memory, margins


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
class Seen:
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
class Memory:
  """What a head keeps between steps, and how it follows from a batch.

  Attributes:
    first: Values at step 0.
    sums: One replica's sums, which add up over replicas.
    following: The next values, from the old ones and the sums of the global batch.
  """

  first: tuple[float, ...]
  sums: Callable[[Seen], tf.Tensor]
  following: Callable[..., tf.Tensor]


def _same(seen: Seen, margined: tf.Tensor) -> tf.Tensor:
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
  target: Callable[[Seen, Knobs], tf.Tensor]
  others: Callable[[Seen, tf.Tensor], tf.Tensor] = _same
  penalty: Callable[[Seen, Knobs], tf.Tensor] | None = None
  memory: Memory | None = None
  sub_centres: int = 1
  numbers: tuple[str, ...] = ()


def _arcface(seen: Seen, knobs: Knobs) -> tf.Tensor:
  return margins.arcface(seen.target, margin=knobs.margin)


def _combined(seen: Seen, knobs: Knobs) -> tf.Tensor:
  return margins.combined(
    seen.target, m1=knobs.margin, m2=knobs.margin2, m3=knobs.margin3
  )


def _harder_others(seen: Seen, margined: tf.Tensor) -> tf.Tensor:
  return margins.curricularface_others(
    seen.cosines, margined, curriculum=seen.memory[0]
  )


def _adaface(seen: Seen, knobs: Knobs) -> tf.Tensor:
  score = head_memory.norm_score(
    seen.memory, seen.norms, concentration=knobs.norm_concentration
  )
  return margins.adaface(seen.target, norm_score=score, margin=knobs.margin)


def _magface(seen: Seen, knobs: Knobs) -> tf.Tensor:
  return margins.magface(
    seen.target,
    norms=seen.norms,
    margins=(knobs.margin, knobs.margin2),
    norm_range=(knobs.norm_low, knobs.norm_high),
  )


def _magface_penalty(seen: Seen, knobs: Knobs) -> tf.Tensor:
  norm_range = (knobs.norm_low, knobs.norm_high)
  return knobs.norm_weight * margins.magface_penalty(seen.norms, norm_range=norm_range)


MARGINS: dict[str, Margin] = {
  "softmax": Margin((), lambda seen, knobs: margins.softmax(seen.target)),
  "sphereface": Margin(
    (1.35,), lambda seen, knobs: margins.sphereface(seen.target, margin=knobs.margin)
  ),
  "cosface": Margin(
    (0.35,), lambda seen, knobs: margins.cosface(seen.target, margin=knobs.margin)
  ),
  "arcface": Margin((0.5,), _arcface),
  "combined": Margin((1.0, 0.3, 0.2), _combined),
  "curricularface": Margin(
    (0.5,),
    _arcface,
    others=_harder_others,
    memory=Memory(
      (0.0,),
      lambda seen: head_memory.curriculum_sums(seen.target),
      head_memory.next_curriculum,
    ),
    numbers=("head_momentum",),
  ),
  "adaface": Margin(
    (0.4,),
    _adaface,
    memory=Memory(
      (20.0, 100.0),
      lambda seen: head_memory.norm_sums(seen.memory, seen.norms),
      head_memory.next_norms,
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
