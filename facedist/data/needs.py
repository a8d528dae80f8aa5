"""Which shards the coming steps need, in the order in which they need them."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from facedist.data.order import Order

_STRETCH_SAMPLES = 512  # fewer would cost more of the processor


@dataclasses.dataclass(frozen=True)
class Stretch:
  """Some neighbouring steps of one worker.

  Attributes:
    first_step: The first of them.
    end_step: The step after the last.
    samples: Samples that the worker reads in them.
    shards: Numbers of the shards that these lie in, in the order of first need.
  """

  first_step: int
  end_step: int
  samples: int
  shards: tuple[int, ...]

  def moved(self, first: int) -> "Stretch":
    """Returns it with shards numbered from `first` on instead of 0."""
    shards = tuple(first + shard for shard in self.shards)
    return dataclasses.replace(self, shards=shards)


def stretches(
  order: Order,
  first_ids: np.ndarray,
  *,
  start_step: int,
  worker: int,
  num_workers: int,
) -> Iterator[Stretch]:
  """Yields what a worker needs from `start_step` on, without end.

  Args:
    order: Which records make up which step.
    first_ids: int64[shards + 1], the first record of each shard, then their number.
    start_step: The first step.
    worker: The worker's number, from 0.
    num_workers: Workers that share each global batch evenly.
  """
  share = max(1, order.global_batch // num_workers)  # the data set refuses less
  length = max(1, _STRETCH_SAMPLES // share)
  places = worker * share + np.arange(share)
  while True:
    steps = np.arange(start_step, start_step + length)
    positions = steps[:, None] * order.global_batch + places
    records = order.samples_at(positions.ravel()).records
    shards = np.searchsorted(first_ids, records, side="right") - 1
    found, first_seen = np.unique(shards, return_index=True)
    in_order = tuple(found[np.argsort(first_seen)].tolist())
    yield Stretch(start_step, start_step + length, len(records), in_order)
    start_step += length


def one_by_one(first_ids: np.ndarray) -> Iterator[Stretch]:
  """Yields each shard by itself, in order; a step is a record.

  Args:
    first_ids: int64[shards + 1], the first record of each shard, then their number.
  """
  for shard, (first, end) in enumerate(itertools.pairwise(first_ids.tolist())):
    yield Stretch(first, end, end - first, (shard,))


def fetched(
  coming: Iterable[Stretch], sizes: Sequence[int], *, room: int
) -> tuple[int, int]:
  """Counts what is fetched where the shards used last are kept while there is room.

  Args:
    coming: The stretches to go through.
    sizes: Bytes of each shard.
    room: Bytes of the shards that are kept.

  Returns:
    Bytes fetched, and samples read.
  """
  kept: collections.OrderedDict[int, None] = collections.OrderedDict()
  total = used = samples = 0
  for stretch in coming:
    samples += stretch.samples
    for shard in stretch.shards:
      if shard in kept:
        kept.move_to_end(shard)
        continue
      total += sizes[shard]
      used += sizes[shard]
      kept[shard] = None
      while used > room and len(kept) > 1:
        used -= sizes[kept.popitem(last=False)[0]]
  return total, samples
