"""Records by number: from ids to JPEGs and labels, and on to a batch of pixels."""

import os
from collections.abc import Iterator

import numpy as np
import simplejpeg

from facedist import errors, storage
from facedist.data import damage, manifest, memory, records, shard_index


class ShardReader:
  """Reads any record of a split by its number, from any thread.

  A record's number is its place in the concatenation of the split's shards.
  """

  def __init__(self, folder: str, split: str, *, verify_crc: bool = True):
    """Opens the split's shards and loads their indexes.

    Args:
      folder: A local folder with a manifest; `staging.stage` brings one from a bucket.
      split: 'train', 'val' or 'images'.
      verify_crc: Whether to check the CRC of each record read.

    Raises:
      errors.DataError: A file is missing or not the one that the manifest describes.
    """
    self.folder = folder
    self.manifest = manifest.load(folder)
    self._shards = self.manifest.split(split, folder).shards
    self._verify_crc = verify_crc
    opened = [_open(folder, shard) for shard in self._shards]
    self._files = np.array([file for file, _ in opened], np.int64)
    self._tokens = [token for _, token in opened]
    rows = [
      _load_index(folder, shard, size=os.fstat(file).st_size)
      for shard, (file, _) in zip(self._shards, opened, strict=True)
    ]
    self._rows = np.concatenate([np.zeros(0, shard_index.INDEX_DTYPE), *rows])
    counts = [shard.records for shard in self._shards]
    self._first_ids = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    self.memory = memory.BatchMemory()

  def __del__(self) -> None:
    for file in getattr(self, "_files", ()):
      os.close(int(file))

  @property
  def num_records(self) -> int:
    """Number of records of the split."""
    return len(self._rows)

  @property
  def image_size(self) -> int:
    """Height and width of every image in pixels."""
    return self.manifest.image_size

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
    rows = self._rows[ids]
    return [bytes(jpeg) for jpeg in self._jpegs(ids, rows)], rows["label"].astype(
      np.int32
    )

  def read_batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes images.

    Args:
      ids: int64[batch], in [0, num_records).

    Returns:
      uint8[batch, image_size, image_size, 3] RGB, from `self.memory`, so that
      TensorFlow takes it over without a copy; and int32[batch] labels.

    Raises:
      damage.BadRecordError: A record is damaged, no JPEG, or not of the set's size.
      errors.DataError: A shard was replaced since it was opened.
    """
    rows = self._rows[ids]
    shape = (self.image_size, self.image_size, 3)
    images = self.memory.empty((len(ids), *shape))
    for record, image, jpeg in zip(ids, images, self._jpegs(ids, rows), strict=True):
      try:
        decoded = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=image)
      except ValueError as error:
        raise self._bad_image(record, jpeg, str(error)) from error
      if decoded.shape != shape:
        raise self._bad_image(record, jpeg, "other size")
    return images, rows["label"].astype(np.int32)

  def _jpegs(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[memoryview]:
    """Yields the encoded images of rows of the index, checked if so asked."""
    shards = np.searchsorted(self._first_ids, ids, side="right") - 1
    files = self._files[shards].tolist()
    # Behind the record's header, payload and CRC come in one read.
    offsets = (rows["offset"] + records.HEADER_BYTES).tolist()
    lengths = (rows["length"] - records.HEADER_BYTES).tolist()
    firsts = rows["image_offset"] - records.HEADER_BYTES
    lasts = (firsts + rows["image_length"]).tolist()
    # The disk fetches all records of the batch at once; costs 0.5 µs where cached.
    for place in zip(files, offsets, lengths, strict=True):
      os.posix_fadvise(*place, os.POSIX_FADV_WILLNEED)
    # Then one by one: a record stays in the cache from here to the decoder, and other
    # threads wait for the interpreter's lock a moment only.
    for number, (file, offset, length, first, last) in enumerate(
      zip(files, offsets, lengths, firsts.tolist(), lasts, strict=True)
    ):
      content = os.pread(file, length, offset)
      if len(content) != length:
        raise self._bad_record(ids[number], "the shard ends inside the record")
      if self._verify_crc and not _is_intact(content):
        header = os.pread(file, records.HEADER_BYTES, offset - records.HEADER_BYTES)
        reason = damage.why_not_intact(header, length - records.FOOTER_BYTES)
        raise self._bad_record(ids[number], reason)
      yield memoryview(content)[first:last]

  def _bad_image(
    self, record: int, jpeg: memoryview, reason: str
  ) -> damage.BadRecordError:
    """Returns the error of an image that does not decode or has another size."""
    try:
      height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError:
      return self._bad_record(record, f"not a JPEG ({reason})")
    if height == width == self.image_size:
      return self._bad_record(record, f"broken JPEG ({reason})")
    return self._bad_record(
      record,
      f"the image has {width}x{height} pixels, but the manifest says "
      f"{self.image_size}x{self.image_size}",
    )

  def _bad_record(self, record: int, reason: str) -> damage.BadRecordError:
    """Returns the error that names a record by shard, number and byte.

    Raises:
      errors.DataError: The shard was replaced since it was opened.
    """
    shard = int(np.searchsorted(self._first_ids, record, side="right")) - 1
    path = self._shards[shard].path(self.folder)
    damage.check_unchanged(path, self._tokens[shard])
    return damage.bad_record(
      path,
      record=int(record),
      number=int(record - self._first_ids[shard]),
      offset=int(self._rows[record]["offset"]),
      shard=shard,
      reason=reason,
    )


def _is_intact(content: bytes) -> bool:
  """Says whether `content` is a payload and its CRC."""
  payload, crc = content[: -records.FOOTER_BYTES], content[-records.FOOTER_BYTES :]
  return records.masked_crc(payload) == int.from_bytes(crc, "little")


def _load_index(folder: str, shard: manifest.Shard, *, size: int) -> np.ndarray:
  """Reads a shard's index; DataError unless it and the shard are the manifest's."""
  path = shard.index_path(folder)
  rows = shard_index.load(path)
  damage.check_index(path, rows, shard, checksum=storage.crc32c(path), size=size)
  damage.check_size(shard.path(folder), size, shard)
  return rows


def _open(folder: str, shard: manifest.Shard) -> tuple[int, damage.Token]:
  """Opens a shard; DataError if it is missing."""
  path = shard.path(folder)
  try:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} does not exist; copy the folder again.") from error
  return file, damage.token(os.fstat(file))
