"""How images are compared with each other: fields of a run's configuration."""

import dataclasses

from facedist.config import setting
from facedist.models.triplets import TRIPLET_LOSSES

NO_LOSS = "none"
SAMPLERS = ("records", "identities")


@dataclasses.dataclass(frozen=True)
class MetricSettings:
  """Which loss compares them, and what a batch is made of (docs/losses.md)."""

  metric_loss: str = setting(
    NO_LOSS,
    heading="Metric learning",
    help="Loss of triplets of the global batch, added to the head's; with --head=none "
    "it stands alone. Needs tensorflow-addons.",
    choices=(NO_LOSS, *TRIPLET_LOSSES),
  )
  metric_weight: float = setting(
    1.0, help="What the metric loss is multiplied with.", at_least=0.0
  )
  metric_margin: float = setting(
    0.2,
    help="How much farther the negative of a triplet must be than the positive: in "
    "squared distance of unit vectors for triplet_semihard, which is at most 4; in "
    "distance for triplet_hard, at most 2.",
    at_least=0.0,
    at_most=4.0,
  )
  sampler: str = setting(
    "records",
    help="What a batch is made of: records, each once an epoch; or identities, with "
    "the same number of images of each.",
    choices=SAMPLERS,
  )
  identities_per_batch: int | None = setting(
    None,
    help="Identities in a batch with --sampler=identities; divides --global_batch. Not "
    "given: a quarter of it, so four images of each.",
    at_least=2,
  )
