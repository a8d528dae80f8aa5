"""Records by number: from ids to JPEGs and labels, and on to a batch of pixels.

What all readers share; `reader` reads from a disk, `stream_reader` from a bucket.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from facedist import errors
from facedist.data import damage, images, indexes, manifest, memory, order, records
from facedist.data.share import Share


class Ahead(Protocol):
  """What brings batches to where they are read."""

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[None]:
    """Brings the records at positions of one step for the body of a `with`."""


class AtHand:
  """Nothing needs to be brought: every record can be read at any time."""

  def batch(
    self, positions: np.ndarray, records: np.ndarray
  ) -> contextlib.AbstractContextManager[None]:
    """Does nothing."""
    return contextlib.nullcontext()


class RecordReader(abc.ABC):
  """Reads any record of a split by its number, from any thread.

  A record's number is its place in the concatenation of the split's shards. Where the
  bytes come from is for subclasses to say.

  Attributes:
    folder: Where the shards are.
    manifest: What it holds.
    memory: Where the pixels of batches go.
  """

  def __init__(
    self,
    folder: str,
    content: manifest.Manifest,
    split: str,
    *,
    index_of: Callable[[str, Sequence[manifest.Shard]], indexes.Index],
    verify_crc: bool,
  ):
    """Takes what the folder holds; `index_of` opens the index of its shards."""
    self.folder = folder
    self.manifest = content
    self.memory = memory.BatchMemory()
    self._shards = content.split(split, folder).shards
    self._numbering = indexes.Numbering(self._shards)
    self._index = index_of(folder, self._shards)
    self._verify_crc = verify_crc

  @property
  def num_records(self) -> int:
    """Number of records of the split."""
    return self._numbering.num_records

  @property
  def image_size(self) -> int:
    """Height and width of every image in pixels."""
    return self.manifest.image_size

  def labels(self) -> np.ndarray:
    """Reads int32[num_records], the labels of all records, from the shards' indexes."""
    return indexes.labels(
      self.folder, self._shards, num_identities=self.manifest.num_identities
    )

  def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Reads encoded images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      The JPEGs, and int32[batch] labels.

    Raises:
      damage.BadRecordError: A record is damaged; names shard, record and byte.
      errors.DataError: A shard was replaced since it was opened.
    """
    rows = self._rows_of(ids)
    labels = self._labels(ids, rows)
    return [bytes(jpeg) for jpeg in self._jpegs(ids, rows)], labels

  def read_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      uint8[batch, image_size, image_size, 3] RGB, upright, from `self.memory`, so
      that TensorFlow takes it over without a copy; and int32[batch] labels.

    Raises:
      damage.BadRecordError: A record is damaged, no JPEG, or not of the set's size.
      errors.DataError: A shard was replaced since it was opened.
    """
    rows = self._rows_of(ids)
    labels = self._labels(ids, rows)
    shape = (self.image_size, self.image_size, 3)
    pixels = self.memory.empty((len(ids), *shape))
    for record, image, jpeg in zip(ids, pixels, self._jpegs(ids, rows), strict=True):
      try:
        images.decode_record(jpeg, image)
      except errors.DataError as error:
        raise self._bad_record(record, str(error)) from error
    return pixels, labels

  def ahead(
    self,
    sample_order: order.Order,
    share: Share,
    *,
    first_step: int,
    end_step: int | None,
  ) -> Ahead:
    """Returns what brings the batches of training; here they are at hand already.

    Args:
      sample_order: Which records make up which step.
      share: This worker's part of each step.
      first_step: The step that training begins with.
      end_step: The step at which it ends, if it does.
    """
    return AtHand()

  def _rows_of(self, ids: np.ndarray) -> np.ndarray:
    """Returns INDEX_DTYPE[n] for int64[n] record numbers."""
    return self._index.rows_of(ids)

  def _labels(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns int32[n]; BadRecordError for one that no identity has."""
    labels = rows["label"].astype(np.int32)
    wrong = np.flatnonzero((labels < 0) | (labels >= self.manifest.num_identities))
    if wrong.size:
      raise self._bad_record(
        ids[wrong[0]],
        f"its label is {labels[wrong[0]]}, and the manifest has "
        f"{self.manifest.num_identities} identities",
      )
    return labels

  @abc.abstractmethod
  def _contents(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """Yields what stands behind each record's header: payload and CRC."""

  def _jpegs(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[memoryview]:
    """Yields the encoded images of rows of the index, checked if so asked."""
    firsts = rows["image_offset"] - records.HEADER_BYTES
    lasts = (firsts + rows["image_length"]).tolist()
    lengths = (rows["length"] - records.HEADER_BYTES).tolist()
    # One by one: a record stays in the cache from here to the decoder, and other
    # threads wait for the interpreter's lock a moment only.
    for number, (content, length, first, last) in enumerate(
      zip(self._contents(ids, rows), lengths, firsts.tolist(), lasts, strict=True)
    ):
      if len(content) != length:
        raise self._bad_record(ids[number], "the shard ends inside the record")
      if self._verify_crc and not _is_intact(content):
        raise self._not_intact(ids[number], rows[number])
      yield memoryview(content)[first:last]

  @abc.abstractmethod
  def _header(self, shard: int, offset: int) -> bytes:
    """Reads the header of the record that starts at a byte of a shard."""

  def _path(self, shard: int) -> str:
    """Returns where a shard comes from."""
    return self._shards[shard].path(self.folder)

  @abc.abstractmethod
  def _check_unchanged(self, shard: int) -> None:
    """Raises DataError if a shard was replaced since it was opened."""

  def _not_intact(self, record: int, row: np.void) -> damage.BadRecordError:
    """Returns the error of a record whose CRC does not match, with the reason."""
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    header = self._header(shard, int(row["offset"]))
    payload_bytes = int(row["length"]) - records.HEADER_BYTES - records.FOOTER_BYTES
    return self._bad_record(record, damage.why_not_intact(header, payload_bytes))

  def _bad_record(self, record: int, reason: str) -> damage.BadRecordError:
    """Returns the error that names a record by shard, number and byte.

    Raises:
      errors.DataError: The shard was replaced since it was opened.
    """
    (shard,) = self._numbering.shards_of(np.array([record])).tolist()
    self._check_unchanged(shard)
    (row,) = self._index.rows_of(np.array([record]))
    return damage.bad_record(
      self._path(shard),
      record=int(record),
      number=int(record - self._numbering.first_ids[shard]),
      offset=int(row["offset"]),
      shard=shard,
      reason=reason,
    )


def _is_intact(content: bytes) -> bool:
  """Says whether `content` is a payload and its CRC."""
  payload, crc = content[: -records.FOOTER_BYTES], content[-records.FOOTER_BYTES :]
  return records.masked_crc(payload) == int.from_bytes(crc, "little")
