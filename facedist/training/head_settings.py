"""The margin head of a training run: fields of its configuration, and so flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from facedist import errors
from facedist.config import lookup, setting
from facedist.models.margin_table import MARGINS, Knobs
from facedist.models.row_table import PIECE_ROWS

SHARDINGS = ("replicated", "sharded", "sampled")
NO_HEAD = "none"
_USUAL_SAMPLE_RATE = 0.1
_MARGIN_FLAGS = ("margin", "margin2", "margin3")
_OTHER_FLAGS = sorted({flag for head in MARGINS.values() for flag in head.numbers})


@dataclasses.dataclass(frozen=True)
class HeadSettings:
  """Which head, and its numbers; docs/losses.md tells when to use which."""

  head: str = setting(
    "cosface",
    heading="The head",
    help=f"Margin head: {', '.join(MARGINS)}; or none: no class centres, and "
    "--metric_loss alone (docs/losses.md).",
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
    at_most=64,
  )
  norm_low: float = setting(
    10.0,
    help="Magface's: length of embeddings with its smallest margin.",
    at_least=1e-3,
  )
  norm_high: float = setting(
    110.0,
    help="Magface's: length of embeddings with its largest margin.",
    at_least=1e-3,
  )
  norm_weight: float = setting(
    35.0, help="Magface's: weight of its penalty of short embeddings.", at_least=0.0
  )
  norm_concentration: float = setting(
    0.333,
    help="Adaface's h: its score of an embedding is h times the standard deviations "
    "that its length is above the mean.",
    at_least=0.0,
  )
  head_momentum: float = setting(
    0.99,
    help="Adaface's and curricularface's: weight of what they remember against a new "
    "batch.",
    at_least=0.0,
    at_most=1.0,
  )
  head_sharding: str = setting(
    "replicated",
    help="Where the class centres are. replicated: all of them on every replica, best "
    "up to some 100,000 identities. sharded: every replica holds its share of them and "
    "of their optimizer's slots, with the same result; memory and work a replica fall "
    "with the replicas, and what travels a step grows with the batch instead of the "
    "identities. sampled: sharded, and a step trains the batch's identities and a "
    "share of the others (Partial FC), for millions of identities.",
    choices=SHARDINGS,
  )
  head_sample_rate: float | None = setting(
    None,
    help="Share of the other identities in a step of --head_sharding=sampled, above 0; "
    "not given: 0.1.",
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
  head = lookup(MARGINS | {NO_HEAD: None}, settings.head, "head")
  usual = dict(zip(_MARGIN_FLAGS, head.margins if head else (), strict=False))
  _refuse_others(settings, (*usual, *(head.numbers if head else ())))
  sub_centres = head.sub_centres if head else None
  numbers: dict[str, Any] = {**usual, "sub_centres": sub_centres}
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
  filled = dataclasses.replace(filled, head_sample_rate=_sample_rate(filled))
  if filled.norm_low >= filled.norm_high:
    raise errors.UsageError(
      f"--norm_low={filled.norm_low} must be below --norm_high={filled.norm_high}; "
      "lower the one or raise the other."
    )
  return filled


def _refuse_others(settings: HeadSettings, own: Sequence[str]) -> None:
  """Raises UsageError for a number that was given and is none of the head's own.

  What is not a margin has one usual value, whatever the head, and in the config.json of
  every run; so that value may be given, and changes nothing.
  """
  usual = HeadSettings()
  for flag in (*_MARGIN_FLAGS, *_OTHER_FLAGS):
    value = getattr(settings, flag)
    if flag in own or value is None or value == getattr(usual, flag):
      continue
    raise errors.UsageError(
      f"--{flag}={value} is none of --head={settings.head}'s, which has "
      f"{', '.join(f'--{name}' for name in own) or 'no margin'}; leave it out."
    )


def _sample_rate(settings: HeadSettings) -> float | None:
  """Returns the share of identities in a step; none where it is all of them."""
  given = settings.head_sample_rate
  if settings.head_sharding == "sampled":
    if given == 0.0:
      raise errors.UsageError(
        "--head_sample_rate=0.0 leaves nothing to tell the batch's identities from; "
        f"give a share above 0, such as {_USUAL_SAMPLE_RATE}."
      )
    return _USUAL_SAMPLE_RATE if given is None else given
  if given is not None:
    raise errors.UsageError(
      f"--head_sample_rate={given} is of --head_sharding=sampled, not "
      f"{settings.head_sharding}; leave it out, or say --head_sharding=sampled."
    )
  return None


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
