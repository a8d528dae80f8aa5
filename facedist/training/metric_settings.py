"""How images are compared with each other: fields of a run's configuration."""

import dataclasses

from facedist.config import setting

SAMPLERS = ("records", "identities")


@dataclasses.dataclass(frozen=True)
class MetricSettings:
  """What a batch is made of; docs/losses.md tells when to use which."""

  sampler: str = setting(
    "records",
    heading="Metric learning",
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
