"""What can be wrong with a folder of shards, and how it is said."""

import dataclasses

BUILD_AGAIN = "build the set again"
REBUILD = "rebuild this shard with --only_shards={}"


@dataclasses.dataclass(frozen=True)
class Problem:
  """One thing that is wrong.

  Attributes:
    kind: 'manifest', 'pairs', 'shard', 'index' or 'record'.
    reason: What is wrong.
    fix: What to do.
    file: The file's name below the folder.
    shard: The shard's place in its split, as --only_shards counts.
    record: The record's place in the shard.
    byte: Byte of the shard at which the record starts.
  """

  kind: str
  reason: str
  fix: str
  file: str | None = None
  shard: int | None = None
  record: int | None = None
  byte: int | None = None

  def __str__(self) -> str:
    if self.record is None:
      return f"{self.reason}; {self.fix}"
    place = f"{self.file}, record {self.record} at byte {self.byte}"
    return f"{place}: {self.reason}; {self.fix}"
