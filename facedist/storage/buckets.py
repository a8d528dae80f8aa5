"""Objects in a bucket: the operations of `disk`, made of requests that may repeat."""

import functools
import http
import io
import time
from collections.abc import Iterator
from typing import Any

from facedist import errors
from facedist.storage import checksums, client, fetching, objects, settings

_PIECE_BYTES = 64 << 20  # fetched by one request, within one deadline
_GONE = http.HTTPStatus.NOT_FOUND


def exists(path: str) -> bool:
  """Says whether there is an object of that name."""
  try:
    client.call(
      path, lambda timeout: _generation_number(path, timeout), expect=(_GONE,)
    )
  except client.StatusError:
    return False
  return True


def status(path: str) -> tuple[int, str]:
  """Returns the object's bytes, and a token that changes when it is replaced."""
  found = objects.metadata(path)
  return int(found.size), str(found.generation)


def read_bytes(path: str) -> bytes:
  """Returns the whole object, its checksum compared."""
  deadline = time.monotonic() + settings.current().deadline_seconds

  def fetch(timeout: client.Timeout) -> bytes:
    sink = fetching.Sink(io.BytesIO(), until=deadline)
    objects.blob(path).download_to_file(
      sink, raw_download=True, checksum="crc32c", timeout=timeout, retry=None
    )
    return bytes(sink.stream.getvalue())

  return client.call(path, fetch)


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the object ends."""
  sink = fetching.Sink(io.BytesIO())
  try:
    fetching.fetch(path, sink, start, start + length, generation)
  except client.StatusError as error:
    if error.status == fetching.REPLACED:
      raise _replaced(path) from error
  return sink.stream.getvalue()


def download(path: str, partial: str) -> None:
  """Brings the object to the local name: resumed after a cut, checksum compared."""
  found = objects.metadata(path)
  with open(partial, "wb") as stream:
    sink = fetching.Sink(stream)
    for start in range(0, found.size, _PIECE_BYTES):
      end = min(found.size, start + _PIECE_BYTES)
      try:
        fetching.fetch(path, sink, start, end, str(found.generation))
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
        expect=(_GONE, fetching.REPLACED),
      )
    except client.StatusError as error:
      if error.status == fetching.REPLACED:
        continue
    return


def _delete(path: str, generation: int, timeout: client.Timeout) -> None:
  objects.blob(path).delete(if_generation_match=generation, timeout=timeout, retry=None)


def _generation_number(path: str, timeout: client.Timeout) -> int:
  found = objects.blob(path)
  found.reload(timeout=timeout, retry=None)
  return int(found.generation)


def _pages(
  folder: str, prefix: str, *, delimiter: str | None
) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
  """Yields the pages of a listing: (name, size) of objects, and folders' prefixes."""
  bucket, _ = objects.split(folder)
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
  _, name = objects.split(folder)
  return name.rstrip("/") + "/" if name else ""


def _replaced(path: str) -> errors.DataError:
  return errors.DataError(f"{path} was replaced since it was first read; start anew.")
