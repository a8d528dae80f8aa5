"""Objects in a bucket: the operations of `disk`, made of requests that may repeat."""

import functools
import http
import io
import time
from collections.abc import Iterator
from typing import Any

from facedist import errors
from facedist.storage import checksums, client, settings

PREFIX = "gs://"
_PIECE_BYTES = 64 << 20  # fetched by one request, within one deadline
_GONE = http.HTTPStatus.NOT_FOUND
_REPLACED = http.HTTPStatus.PRECONDITION_FAILED
_PAST_THE_END = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


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


def exists(path: str) -> bool:
  """Says whether there is an object of that name."""
  return client.call(
    path, lambda timeout: bool(blob(path).exists(timeout=timeout, retry=None))
  )


def size(path: str) -> int:
  """Returns the object's size in bytes."""
  return int(metadata(path).size)


def generation(path: str) -> str:
  """Returns a token that changes when the object is replaced."""
  return str(metadata(path).generation)


def read_bytes(path: str) -> bytes:
  """Returns the whole object, its checksum compared."""
  return client.call(
    path,
    lambda timeout: bytes(
      blob(path).download_as_bytes(
        raw_download=True, checksum="crc32c", timeout=timeout, retry=None
      )
    ),
  )


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the object ends."""
  sink = _Sink(io.BytesIO())
  try:
    _fetch(path, sink, start, start + length, generation)
  except client.StatusError as error:
    if error.status == _REPLACED:
      raise _replaced(path) from error
  return sink.stream.getvalue()


def download(path: str, partial: str) -> None:
  """Brings the object to the local name: resumed after a cut, checksum compared."""
  found = metadata(path)
  with open(partial, "wb") as stream:
    sink = _Sink(stream)
    for start in range(0, found.size, _PIECE_BYTES):
      end = min(found.size, start + _PIECE_BYTES)
      try:
        _fetch(path, sink, start, end, str(found.generation))
      except client.StatusError as error:
        raise _replaced(path) from error
  if checksums.to_text(sink.checksum) != found.crc32c:
    raise errors.DataError(
      f"{path}: the bytes that arrived do not match its CRC-32C; try again."
    )


def list_names(folder: str) -> list[str]:
  """Returns the sorted names of one level; consoles' placeholders are no files."""
  prefix = _prefix(folder)
  paths = {
    path
    for names, prefixes in _pages(folder, prefix, delimiter="/")
    for path in (*(name for name, _ in names), *prefixes)
  }
  return sorted(path[len(prefix) :].rstrip("/") for path in paths - {prefix})


def walk(folder: str) -> Iterator[tuple[str, int]]:
  """Yields (path below `folder`, size in bytes) in byte-wise order, page by page."""
  prefix = _prefix(folder)
  for found, _ in _pages(folder, prefix, delimiter=None):
    for name, num_bytes in found:
      if not name.endswith("/"):
        yield name[len(prefix) :], num_bytes


def remove(path: str) -> None:
  """Removes an object; one that is not there is no error.

  The generation goes with the request: one that arrives late, after its repetition
  succeeded, cannot remove what was written since.
  """
  while True:
    try:
      number = client.call(
        path, lambda timeout: _generation_number(path, timeout), expect=(_GONE,)
      )
      client.call(
        path,
        functools.partial(_delete, path, number),
        expect=(_GONE, _REPLACED),
      )
    except client.StatusError as error:
      if error.status == _REPLACED:
        continue
    return


def _delete(path: str, generation: int, timeout: client.Timeout) -> None:
  blob(path).delete(if_generation_match=generation, timeout=timeout, retry=None)


def _generation_number(path: str, timeout: client.Timeout) -> int:
  found = blob(path)
  found.reload(timeout=timeout, retry=None)
  return int(found.generation)


class _Sink:
  """Takes the bytes of an answer, one request after another.

  Attributes:
    stream: Where the bytes go.
    received: How many came.
    checksum: Their CRC-32C.
    until: When the request must be done, by time.monotonic; a body that trickles
      would else never time out.
  """

  def __init__(self, stream: Any) -> None:
    self.stream = stream
    self.received = 0
    self.checksum = 0
    self.until = float("inf")

  def write(self, chunk: bytes) -> int:
    """Appends a chunk."""
    if time.monotonic() > self.until:
      raise TimeoutError("the answer comes too slowly")
    self.stream.write(chunk)
    self.received += len(chunk)
    self.checksum = checksums.extend(self.checksum, chunk)
    return len(chunk)

  def clear(self) -> None:
    """Forgets all bytes."""
    self.stream.seek(0)
    self.stream.truncate()
    self.received = self.checksum = 0


def _fetch(
  path: str, sink: _Sink, start: int, end: int, generation: str | None
) -> None:
  """Brings the bytes [start, end) of an object to the sink; less where it ends.

  After a cut it goes on with the byte that is missing, or, where no generation says
  that the object is still the same, from the start.

  Raises:
    client.StatusError: The object begins after `start` or was replaced.
  """
  before = sink.received
  deadline = time.monotonic() + settings.current().deadline_seconds

  def fetch(timeout: client.Timeout) -> None:
    if generation is None:
      sink.clear()
    sink.until = deadline
    blob(path).download_to_file(
      sink,
      start=start + sink.received - before,
      end=end - 1,
      if_generation_match=None if generation is None else int(generation),
      raw_download=True,
      checksum=None,
      timeout=timeout,
      retry=None,
    )

  client.call(path, fetch, expect=(_PAST_THE_END, _REPLACED))


def _pages(
  folder: str, prefix: str, *, delimiter: str | None
) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
  """Yields the pages of a listing: (name, size) of objects, and folders' prefixes."""
  bucket, _ = split(folder)
  token = None

  def fetch(timeout: client.Timeout) -> Any:
    listing = client.client().list_blobs(
      client.bucket(bucket),
      prefix=prefix,
      delimiter=delimiter,
      page_token=token,
      fields="items(name,size),prefixes,nextPageToken",
      timeout=timeout,
      retry=None,
    )
    page = next(listing.pages, ())
    found = [(str(one.name), int(one.size or 0)) for one in page]
    return found, sorted(listing.prefixes), listing.next_page_token

  while True:
    found, prefixes, token = client.call(folder, fetch)
    yield found, prefixes
    if token is None:
      return


def _prefix(folder: str) -> str:
  _, name = split(folder)
  return name.rstrip("/") + "/" if name else ""


def _replaced(path: str) -> errors.DataError:
  return errors.DataError(f"{path} was replaced since it was first read; start anew.")
