"""Shuffles blocks of neighbouring records, for shards that are read from a bucket.

A request for one image costs as much as one for hundreds, so an epoch is shuffled in
blocks of neighbouring records, and then mixed within windows of a few blocks:

    places of an epoch   0 … N-1, those of the stream of batches (`EpochSampler`), in
                         `streams` segments: stream 0's samples, stream 1's, …
    -> mixed             within each window: the places of one segment among
                         `shuffle_block · window_blocks` aligned ones
    -> blocks            place p lies in block p // shuffle_block; a keyed permutation
                         of the blocks, another one in each epoch
    -> records           block j holds the records offset + j·shuffle_block, …, modulo
                         N; the offset is another one in each epoch too

A global batch has the same number of samples of each stream, in the streams' order. So
a worker with a whole number of streams reads all samples of their segments, and no
other worker reads from the windows that it fetched.

Each record occurs exactly once an epoch, for any sizes, because the first line and each
arrow are bijections of [0, N):

- Position q of the stream of batches is in epoch q // N and, with `stream_batch` =
  batch / streams, in stream q mod batch // stream_batch. An epoch's segment of a
  stream is as long as the stream has positions in the epoch, so the segments fill
  [0, N). A position's place is the start of its segment plus the number of positions
  before it of that stream and epoch. `_before` counts positions without a loop.
- Windows are the aligned pieces of each segment; the first and last may be shorter.
- Of N records, N mod shuffle_block fill no block. They keep the last places, and the
  offset decides which records these are; the whole blocks before them are permuted.
- Adding an offset modulo N is a bijection.

Reading an epoch takes about N / shuffle_block requests, and one more wherever a segment
or a shard ends inside a block, or record 0 follows the last record.
"""

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np

from facedist import errors
from facedist.data import hashing
from facedist.data.samplers import epoch_sampler
from facedist.data.samplers.epoch_sampler import Batch, EpochSampler

# Uses of keys, so that no two have the same keys.
_BLOCKS, _WINDOWS, _OFFSETS = 1, 2, 3


def make_block_sampler(
  num_records: int,
  global_batch: int,
  seed: int,
  *,
  shuffle_block: int,
  streams: int,
  window_blocks: int,
) -> EpochSampler:
  """Returns a sampler of single records, or one of blocks of more than one."""
  if shuffle_block == 1:
    return EpochSampler(num_records, global_batch, seed)
  return BlockSampler(
    num_records, global_batch, seed, shuffle_block, streams, window_blocks
  )


def check_streams(global_batch: int, streams: int) -> None:
  """Raises UsageError if a batch does not divide over the streams."""
  if global_batch % streams:
    nearest = max(1, round(global_batch / streams)) * streams
    raise errors.UsageError(
      f"--global_batch={global_batch} does not divide over --streams={streams}; try "
      f"--global_batch={nearest}."
    )


@dataclasses.dataclass(frozen=True)
class Window:
  """Places of an epoch whose records are mixed, and which a reader fetches together.

  Attributes:
    key: Number of the window among all of all epochs.
    first_step: Step of its first requested sample.
    num_samples: Its requested samples: all, except in the first window of a stream.
    runs: int64[n, 2] of neighbouring records: the first, and one past the last.
  """

  key: int
  first_step: int
  num_samples: int
  runs: np.ndarray

  @property
  def num_records(self) -> int:
    """Records of the window."""
    return int((self.runs[:, 1] - self.runs[:, 0]).sum())


@dataclasses.dataclass(frozen=True)
class BlockSampler(EpochSampler):
  """Shuffles blocks, assigns them to streams, and mixes each stream within windows.

  Attributes:
    shuffle_block: Neighbouring records that are fetched together, at least 1.
    streams: Streams that share the global batch evenly.
    window_blocks: Blocks within which a stream's records are mixed, at least 1.
  """

  shuffle_block: int
  streams: int
  window_blocks: int

  def __post_init__(self) -> None:
    super().__post_init__()
    check_streams(self.global_batch, self.streams)

  def samples_at(self, positions: np.ndarray) -> Batch:
    """Returns the samples at rising positions of the stream, int64[n], at least 0."""
    epochs, places, first, count = self._windows_of(positions)
    mixed = epoch_sampler.permute_groups(
      places - first,
      groups=epochs * self.num_records + first,
      sizes=count,
      seed=self._derived_seed(_WINDOWS),
    )
    return Batch(self._records_at(epochs, first + mixed), epochs)

  def keys_at(self, positions: np.ndarray) -> np.ndarray:
    """Returns int64[n], the key of the window of each of these positions."""
    epochs, _, first, _ = self._windows_of(positions)
    return epochs * self.num_records + first

  def windows(self, first_step: int, first: int, last: int) -> Iterator[Window]:
    """Yields the windows of streams [first, last) from a step on, in order of need.

    Args:
      first_step: Step of the first requested sample; a window that begins in an
        earlier step is yielded whole.
      first: First stream.
      last: One past the last stream.
    """
    streams = (self._windows_of_stream(n, first_step) for n in range(first, last))
    yield from heapq.merge(*streams, key=lambda window: window.first_step)

  def _windows_of_stream(self, stream: int, step: int) -> Iterator[Window]:
    """Yields the windows of one stream, from the one of the step's first sample on."""
    stream_batch = self.global_batch // self.streams
    sample = step * stream_batch  # of the stream; they continue over epochs
    while True:
      steps, place_in_step = divmod(sample, stream_batch)
      position = steps * self.global_batch + stream * stream_batch + place_in_step
      epoch, place, first, count = (
        int(part[0]) for part in self._windows_of(np.array([position], np.int64))
      )
      key = epoch * self.num_records + first
      left = first + count - place
      yield Window(key, steps, left, self._runs(epoch, first, first + count))
      sample += left

  def _windows_of(
    self, positions: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns epoch, place, and first place and length of the window, of positions."""
    stream_batch = self.global_batch // self.streams
    epochs = positions // self.num_records
    streams = positions % self.global_batch // stream_batch
    start, end = epochs * self.num_records, (epochs + 1) * self.num_records
    first, last = (
      self._before(end, bound) - self._before(start, bound)
      for bound in (streams, streams + 1)
    )
    within = self._before(positions, streams + 1) - self._before(positions, streams)
    within -= self._before(start, streams + 1) - self._before(start, streams)
    places = first + within
    size = self.shuffle_block * self.window_blocks
    window = places // size * size
    first = np.maximum(first, window)
    return epochs, places, first, np.minimum(last, window + size) - first

  def _before(self, position: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Returns how many samples of lower streams lie at lower positions."""
    stream_batch = self.global_batch // self.streams
    batches, rest = np.divmod(position, self.global_batch)
    return batches * stream * stream_batch + np.minimum(rest, stream * stream_batch)

  def _records_at(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns int64[n], the records at places after the mixing within windows."""
    blocks, within = np.divmod(places, self.shuffle_block)
    whole_blocks = self.num_records // self.shuffle_block
    whole = blocks < whole_blocks
    if whole.any():
      blocks[whole] = epoch_sampler.permute(
        blocks[whole],
        epochs=epochs[whole],
        num_records=whole_blocks,
        seed=self._derived_seed(_BLOCKS),
      )
    offsets = hashing.combine(self._derived_seed(_OFFSETS), epochs)
    offsets %= np.uint64(self.num_records)
    records = offsets.astype(np.int64) + blocks * self.shuffle_block + within
    return records % self.num_records

  def _runs(self, epoch: int, first: int, last: int) -> np.ndarray:
    """Returns int64[n, 2], the neighbouring records of places [first, last)."""
    block = self.shuffle_block
    edges = np.arange(first // block * block, last + block, block).clip(first, last)
    starts = edges[:-1][np.diff(edges) > 0]
    lengths = np.diff(edges)[np.diff(edges) > 0]
    records = self._records_at(np.full(len(starts), epoch), starts)
    runs = []
    for record, length in zip(records.tolist(), lengths.tolist(), strict=True):
      inside = min(length, self.num_records - record)
      runs.append((record, record + inside))
      if inside < length:  # the block continues at the first record
        runs.append((0, length - inside))
    return np.array(runs, np.int64)
