"""How a training run gets its images: fields of its configuration, and so flags."""

import dataclasses

from facedist.config import setting

READ_MODES = ("stage", "stream")


@dataclasses.dataclass(frozen=True)
class InputSettings:
  """Where shards are read, in which order, and what becomes of damaged ones."""

  input_threads: int = setting(
    0,
    heading="Input",
    help="Threads that decode; 0: one a core.",
    at_least=0,
    at_most=1024,
    may_change=True,
  )
  read_mode: str = setting(
    "stage",
    help="stage copies the shards of a bucket to --cache_dir; stream reads them where "
    "they are, each byte once an epoch and by one worker.",
    choices=READ_MODES,
    may_change=True,
  )
  shuffle_block: int = setting(
    1,
    help="Neighbouring records that are shuffled as one and come in one request; 1: "
    "every record goes anywhere. stream needs more, such as 256.",
    at_least=1,
  )
  shuffle_window: int = setting(
    4, help="Blocks among which a stream mixes its records.", at_least=1
  )
  streams: int = setting(
    64,
    help="Streams of blocks that share the global batch; with --shuffle_block. A "
    "multiple of the workers there will ever be.",
    at_least=1,
    at_most=65_536,
  )
  stream_memory_mb: int = setting(
    1024,
    help="MiB of a worker for what it reads ahead with --read_mode=stream.",
    at_least=1,
    may_change=True,
  )
  stream_requests: int = setting(
    16,
    help="Requests of a worker under way at a time with --read_mode=stream.",
    at_least=1,
    at_most=1024,
    may_change=True,
  )
  cache_dir: str = setting(
    "/tmp/facedist-cache",
    help="Folder on a local disk for shards of a bucket, shared by the processes of a "
    "host.",
    may_change=True,
    on_disk=True,
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
