"""How a training run gets its images: fields of its configuration, and so flags."""

import dataclasses

from facedist.config import setting


@dataclasses.dataclass(frozen=True)
class InputSettings:
  """Where shards are read, and what becomes of damaged ones."""

  input_threads: int = setting(
    0,
    heading="Input",
    help="Threads that decode; 0: one a core.",
    at_least=0,
    may_change=True,
  )
  cache_dir: str = setting(
    "/tmp/facedist-cache",
    help="Folder on a local disk for shards of a bucket, shared by the processes of a "
    "host.",
    may_change=True,
  )
  cache_gb: float = setting(
    0.0,
    help="What --cache_dir may take, in GB (1e9 bytes); shards that were not used for "
    "longest go. 0: any.",
    at_least=0.0,
    may_change=True,
  )
  verify_crc: bool = setting(
    True, help="Whether every record's CRC is checked as it is read.", may_change=True
  )
  on_bad_record: str = setting(
    "fail",
    help="What a damaged record does: end the run, or be replaced by another record of "
    "the same epoch, the same one on every worker (skip).",
    choices=("fail", "skip"),
    may_change=True,
  )
  max_bad_records: int = setting(
    100,
    help="Damaged records an epoch that --on_bad_record=skip replaces before it ends "
    "the run.",
    at_least=0,
    may_change=True,
  )
