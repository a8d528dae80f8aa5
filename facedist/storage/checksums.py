"""CRC-32C, the checksum that buckets keep of every object."""

import base64

import google_crc32c

from facedist import errors

_CHUNK_BYTES = 8 << 20


def crc32c(path: str) -> int:
  """Returns the CRC-32C of a local file, read a chunk at a time.

  Raises:
    errors.DataError: There is no such file.
  """
  checksum = 0
  try:
    with open(path, "rb") as stream:
      while chunk := stream.read(_CHUNK_BYTES):
        checksum = extend(checksum, chunk)
  except FileNotFoundError as error:
    raise errors.DataError(f"{path} does not exist; check its spelling.") from error
  return checksum


def crc32c_of(content: bytes) -> int:
  """Returns the CRC-32C of `content`."""
  return int(google_crc32c.value(content))


def extend(checksum: int, chunk: bytes) -> int:
  """Returns the CRC-32C of a content with `checksum`, followed by `chunk`."""
  return int(google_crc32c.extend(checksum, chunk))


def to_text(checksum: int) -> str:
  """Returns a checksum as buckets write it: base64 of the big-endian bytes."""
  return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def from_text(text: str) -> int:
  """Returns a checksum that a bucket has written."""
  return int.from_bytes(base64.b64decode(text), "big")
