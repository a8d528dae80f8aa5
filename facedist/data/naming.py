"""Names of records for people: the shard and the number in it."""

import numpy as np

from facedist.data.manifest import Split


def name_records(split: Split, ids: np.ndarray, *, most: int = 16) -> str:
  """Returns `train-00003-of-00008.tfrecord: 17, 812; …`, in the order of the shards.

  Args:
    split: That the records are of.
    ids: int64[n], in [0, split.records).
    most: Records that are named; the others are counted.
  """
  firsts = np.cumsum([0, *(shard.records for shard in split.shards)])
  named = np.sort(ids)[:most]
  shards = np.searchsorted(firsts, named, side="right") - 1
  parts = []
  for shard in np.unique(shards):
    numbers = ", ".join(map(str, named[shards == shard] - firsts[shard]))
    parts.append(f"{split.shards[shard].name}: {numbers}")
  more = len(ids) - len(named)
  return "; ".join(parts) + (f" and {more} more" if more else "")
