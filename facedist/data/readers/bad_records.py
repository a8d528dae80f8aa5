"""Stand-ins for damaged records, on which all workers agree without a word.

A damaged record is replaced by another one of the same epoch: the first intact one of
a chain of candidates that is a pure function of seed, epoch and record. Since a record
has one place in an epoch, the same sample gets the same stand-in on any worker, of any
number of workers, and in a run that was resumed. Candidates are near, so that they lie
in a shard that is at hand; the neighbourhood widens where all of it is damaged. An
order of identities names others first: the damaged record's siblings.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
from absl import logging

from facedist import errors
from facedist.data import hashing
from facedist.data.readers.batch_memory import BatchMemory
from facedist.data.readers.record_reader import RecordSource
from facedist.data.shards.integrity import BadRecordError

ON_BAD_RECORD = ("fail", "skip")

_NEIGHBOURHOOD = 64  # records, as many as a few hundred kilobytes hold
_TRIES = 8  # in a neighbourhood before a wider one
_WIDENINGS = 8
_WIDER = 8


class BatchReader(Protocol):
  """What a reader must have: records by number, damage told as BadRecordError."""

  memory: BatchMemory

  @property
  def num_records(self) -> int:
    """Number of records of the split."""

  @property
  def image_size(self) -> int:
    """Height and width of every image in pixels."""

  def read_batch(
    self, ids: np.ndarray, source: RecordSource | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8[batch, size, size, 3] images and int32[batch] labels."""


def candidate(
  seed: int, *, epoch: int, record: int, attempt: int, num_records: int
) -> int:
  """Returns the record to try for a damaged one, a pure function of its arguments.

  Args:
    seed: Any integer.
    epoch: The epoch of the sample.
    record: The damaged record, in [0, num_records).
    attempt: How many candidates were damaged before, from 0.
    num_records: Records of the split.

  Returns:
    A record of the same aligned block of 64, and after each eight attempts of one eight
    times as long.
  """
  span = _NEIGHBOURHOOD * _WIDER ** (attempt // _TRIES)
  start = record // span * span
  stop = min(start + span, num_records)
  draw = hashing.combine(seed, *(np.array([part]) for part in (epoch, record, attempt)))
  return start + int(draw[0] % np.uint64(stop - start))


class BadRecordReplacer:
  """Reads batches in which an intact record stands in for each damaged one.

  Safe from many threads. A damaged record is named in the log when it is first met and
  not read again.

  Args:
    reader: Where the records are.
    seed: Of the stand-ins; the same on all workers.
    on_bad_record: 'fail' passes the reader's error on, 'skip' replaces.
    siblings: (record, epoch) -> the records to try before those near by.
  """

  def __init__(
    self,
    reader: BatchReader,
    *,
    seed: int,
    on_bad_record: str,
    siblings: Callable[[int, int], Iterable[int]] = lambda record, epoch: (),
  ) -> None:
    self._reader = reader
    self._seed = seed
    self._siblings = siblings
    self._skips = on_bad_record == "skip"
    self._damaged: set[int] = set()

  def read_batch(
    self, ids: np.ndarray, epochs: np.ndarray, source: RecordSource | None = None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads and decodes images, or those that stand in for them.

    Args:
      ids: int64[batch], in [0, num_records).
      epochs: int64[batch]; the epoch of each sample.
      source: Where to read them from, by default the reader's shards.

    Returns:
      uint8[batch, size, size, 3] images and int32[batch] labels of the records read;
      int64[batch] their numbers; and float32[batch], 1 where one stands in for another.

    Raises:
      errors.DataError: A record is damaged and must not be, or no stand-in was found.
    """
    while True:
      chosen = self._intact(ids, epochs)
      try:
        images, labels = self._reader.read_batch(chosen, source)
      except BadRecordError as error:
        if not self._skips:
          raise
        self._note(error)
        self._read_each(chosen, source)
      else:
        return images, labels, chosen, (chosen != ids).astype(np.float32)

  def _intact(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Returns a copy of `ids` with stand-ins for those that are known as damaged."""
    chosen = ids.copy()
    if self._damaged:
      for place, record in enumerate(ids.tolist()):
        if record in self._damaged:
          chosen[place] = self._stand_in(record, int(epochs[place]))
    return chosen

  def _stand_in(self, record: int, epoch: int) -> int:
    """Returns the first of the chain's records that is not known as damaged."""
    tried = 0
    for other in itertools.chain(
      self._siblings(record, epoch), self._neighbours(record, epoch)
    ):
      if other not in self._damaged:
        return other
      tried += 1
    raise errors.DataError(
      f"no stand-in was found for damaged record {record}: {tried} others are "
      "damaged too; rebuild the shards."
    )

  def _neighbours(self, record: int, epoch: int) -> Iterator[int]:
    """Yields the candidates near a record, then further and further away."""
    for attempt in range(_TRIES * _WIDENINGS):
      yield candidate(
        self._seed,
        epoch=epoch,
        record=record,
        attempt=attempt,
        num_records=self._reader.num_records,
      )

  def _read_each(self, ids: np.ndarray, source: RecordSource | None) -> None:
    """Reads records one by one, to find all the damage of a batch at once."""
    for place in range(len(ids)):
      try:
        self._reader.read_batch(ids[place : place + 1], source)
      except BadRecordError as error:
        self._note(error)

  def _note(self, error: BadRecordError) -> None:
    """Remembers a damaged record, and names it the first time."""
    if error.record not in self._damaged:
      self._damaged.add(error.record)
      logging.warning("%s Another record stands in for it.", error)
