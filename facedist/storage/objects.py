"""One object of a bucket: its path, its handle, its metadata."""

from typing import Any

from facedist import errors
from facedist.storage import checksums, client

PREFIX = "gs://"


def split(path: str) -> tuple[str, str]:
  """Splits `gs://bucket/name` into bucket and name."""
  bucket, _, name = path[len(PREFIX) :].partition("/")
  if not bucket:
    raise errors.UsageError(f"{path} names no bucket; write gs://BUCKET/NAME.")
  return bucket, name


def blob(path: str) -> Any:
  """Returns the client library's handle of one object; nothing is fetched.

  Call it in a request, so that missing credentials are an error about this path.
  """
  bucket, name = split(path)
  if not name:
    raise errors.UsageError(f"{path} names no object; write gs://BUCKET/NAME.")
  return client.bucket(bucket).blob(name)


def metadata(path: str) -> Any:
  """Returns the handle of an object with its size, generation and checksum."""

  def fetch(timeout: client.Timeout) -> Any:
    found = blob(path)
    found.reload(timeout=timeout, retry=None)
    return found

  return client.call(path, fetch)


def stored_crc32c(path: str) -> int:
  """Returns an object's CRC-32C as its bucket keeps it; the object is not read.

  Raises:
    errors.DataError: There is no such object.
  """
  return checksums.from_text(metadata(path).crc32c)
