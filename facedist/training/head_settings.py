"""The margin head of a training run: fields of its configuration, and so flags."""

import dataclasses
from typing import Any, TypeVar

from facedist import errors
from facedist.config import lookup, setting
from facedist.models.margin_table import MARGINS, Knobs
from facedist.models.row_table import PIECE_ROWS

_MARGIN_FLAGS = ("margin", "margin2", "margin3")


@dataclasses.dataclass(frozen=True)
class HeadSettings:
  """Which head, and its numbers; docs/losses.md tells when to use which."""

  head: str = setting(
    "cosface",
    heading="The head",
    help=f"Margin head: {', '.join(MARGINS)} (docs/losses.md).",
  )
  margin: float | None = setting(
    None,
    help="Margin, in the head's unit: cosine for cosface, a factor of the angle for "
    "sphereface and combined (m1), else radians; not given: the head's usual one.",
    at_least=0.0,
  )
  margin2: float | None = setting(
    None,
    help="Second margin in radians: combined's m2, magface's at --norm_high.",
    at_least=0.0,
  )
  margin3: float | None = setting(
    None, help="Third margin, in cosine units: combined's m3.", at_least=0.0
  )
  scale: float = setting(64.0, help="Scale of the cosines.", at_least=1.0)
  sub_centres: int | None = setting(
    None,
    help="Centres an identity, of which the nearest counts; not given: 3 for "
    "subcentre_arcface, 1 for others.",
    at_least=1,
  )
  norm_low: float = setting(
    10.0, help="Length of embeddings with magface's smallest margin.", at_least=1e-3
  )
  norm_high: float = setting(
    110.0, help="Length of embeddings with magface's largest margin.", at_least=1e-3
  )
  norm_weight: float = setting(
    35.0, help="Weight of magface's penalty of short embeddings.", at_least=0.0
  )
  norm_concentration: float = setting(
    0.333,
    help="Adaface's h: its score of an embedding is h times the standard deviations "
    "that its length is above the mean.",
    at_least=0.0,
  )
  head_momentum: float = setting(
    0.99,
    help="Weight of what adaface and curricularface remember against a new batch.",
    at_least=0.0,
    at_most=1.0,
  )
  head_shard_rows: int = setting(
    PIECE_ROWS,
    help="Identities of a sharded head that are saved, restored or drawn at a time.",
    at_least=1,
    may_change=True,
  )


Settings = TypeVar("Settings", bound=HeadSettings)


def with_usual_margins(settings: Settings) -> Settings:
  """Fills in what was not given, so that a run keeps its numbers.

  Raises:
    errors.UsageError: There is no such head, or a number makes no sense with it.
  """
  head = lookup(MARGINS, settings.head, "head")
  usual = dict(zip(_MARGIN_FLAGS, head.margins, strict=False))
  for flag in _MARGIN_FLAGS:
    if getattr(settings, flag) is not None and flag not in usual:
      raise errors.UsageError(
        f"--{flag}={getattr(settings, flag)} is none of --head={settings.head}'s, "
        f"which has {', '.join(f'--{name}' for name in usual) or 'no margin'}; leave "
        "it out."
      )
  numbers: dict[str, Any] = {**usual, "sub_centres": head.sub_centres}
  filled = dataclasses.replace(
    settings,
    **{
      name: value for name, value in numbers.items() if getattr(settings, name) is None
    },
  )
  if filled.head == "sphereface" and filled.margin is not None and filled.margin < 1:
    raise errors.UsageError(
      f"--margin={filled.margin} would make the angle smaller; sphereface multiplies "
      "it: give at least 1, such as 1.35."
    )
  if filled.norm_low >= filled.norm_high:
    raise errors.UsageError(
      f"--norm_low={filled.norm_low} must be below --norm_high={filled.norm_high}."
    )
  return filled


def knobs(settings: HeadSettings) -> Knobs:
  """Returns the head's numbers; a margin that it does not have is 0."""
  filled = with_usual_margins(settings)
  return Knobs(
    margin=filled.margin or 0.0,
    margin2=filled.margin2 or 0.0,
    margin3=filled.margin3 or 0.0,
    scale=filled.scale,
    norm_low=filled.norm_low,
    norm_high=filled.norm_high,
    norm_weight=filled.norm_weight,
    norm_concentration=filled.norm_concentration,
    momentum=filled.head_momentum,
  )
