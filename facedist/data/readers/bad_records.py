"""Replaces corrupt records by others, the same on all workers without communication.

A corrupt record is replaced by the first valid record of a list of candidates, which is
a pure function of seed, epoch and record. So a sample gets the same replacement on any
worker, for any number of workers, and after a restart. Candidates are near the record,
because their shard is probably open already; further away if all of these are corrupt.
A sampler of identities lists images of the same identity first.
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


class BatchReader(Protocol):
  """A reader of records by number that raises BadRecordError for corrupt ones."""

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


class BadRecordReplacer:
  """Reads batches in which a valid record replaces each corrupt one.

  Safe from many threads. A corrupt record is logged the first time, and not read again.

  Args:
    reader: Where the records are.
    seed: Of the replacements; the same on all workers.
    on_bad_record: 'fail' raises the reader's error, 'skip' replaces the record.
    siblings: (record, epoch) -> the records to try before the neighbours.
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
    self._corrupt: set[int] = set()

  def read_batch(
    self, ids: np.ndarray, epochs: np.ndarray, source: RecordSource | None = None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads and decodes images, or their replacements.

    Args:
      ids: int64[batch], in [0, num_records).
      epochs: int64[batch]; the epoch of each sample.
      source: Where to read them from, by default the reader's shards.

    Returns:
      uint8[batch, size, size, 3] images and int32[batch] labels of the records read;
      int64[batch] their numbers; and float32[batch], 1 where one replaces another.

    Raises:
      errors.DataError: A record is corrupt and `on_bad_record` is 'fail', or no
        replacement was found.
    """
    while True:
      chosen = self._replaced(ids, epochs)
      try:
        images, labels = self._reader.read_batch(chosen, source)
      except BadRecordError as error:
        if not self._skips:
          raise
        self._note(error)
        self._read_each(chosen, source)
      else:
        return images, labels, chosen, (chosen != ids).astype(np.float32)

  def _replaced(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Returns a copy of `ids` with those known to be corrupt replaced."""
    chosen = ids.copy()
    if self._corrupt:
      for place, record in enumerate(ids.tolist()):
        if record in self._corrupt:
          chosen[place] = self._replacement(record, int(epochs[place]))
    return chosen

  def _replacement(self, record: int, epoch: int) -> int:
    """Returns the first candidate that is not known to be corrupt."""
    tried = 0
    for other in itertools.chain(
      self._siblings(record, epoch), self._neighbours(record, epoch)
    ):
      if other not in self._corrupt:
        return other
      tried += 1
    raise errors.DataError(
      f"no replacement was found for corrupt record {record}: {tried} others are "
      "corrupt too; rebuild the shards."
    )

  def _neighbours(self, record: int, epoch: int) -> Iterator[int]:
    """Yields candidates near a record, then from larger and larger neighbourhoods."""
    for attempt in range(_TRIES * _WIDENINGS):
      yield candidate(
        self._seed,
        epoch=epoch,
        record=record,
        attempt=attempt,
        num_records=self._reader.num_records,
      )

  def _read_each(self, ids: np.ndarray, source: RecordSource | None) -> None:
    """Reads records one by one, to find all corrupt ones of a batch at once."""
    for place in range(len(ids)):
      try:
        self._reader.read_batch(ids[place : place + 1], source)
      except BadRecordError as error:
        self._note(error)

  def _note(self, error: BadRecordError) -> None:
    """Remembers a corrupt record, and logs it the first time."""
    if error.record not in self._corrupt:
      self._corrupt.add(error.record)
      logging.warning("%s Another record replaces it.", error)


_NEIGHBOURHOOD = 64  # records, as many as a few hundred kilobytes hold
_TRIES = 8  # in a neighbourhood before a wider one
_WIDENINGS = 8
_WIDER = 8


def candidate(
  seed: int, *, epoch: int, record: int, attempt: int, num_records: int
) -> int:
  """Returns the record to try for a corrupt one, a pure function of its arguments.

  Args:
    seed: Any integer.
    epoch: The epoch of the sample.
    record: The corrupt record, in [0, num_records).
    attempt: How many candidates were corrupt before, from 0.
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
