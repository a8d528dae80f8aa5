"""Objects in a bucket: read, listed, written and removed with safe retries.

This is the only module that imports google.cloud. `send_request` makes every request:
under the retry policy of `retry`, with the library's own retries off, and with each
final failure turned into one line.

A request whose answer was lost may have taken effect, and it may still take effect
after its repetition. Therefore each write names the generation that it replaces (none,
for a new object) and carries a token: if the precondition fails because the object
already is this very upload, the write succeeded. A download resumes at the byte that
is missing, and never mixes two generations.
"""

import contextlib
import functools
import http
import io
import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any, TypeVar

from facedist import errors
from facedist.storage import checksums, retry

Result = TypeVar("Result")
Timeout = tuple[float, float]

PREFIX = "gs://"
_MISSING = http.HTTPStatus.NOT_FOUND
_REPLACED = http.HTTPStatus.PRECONDITION_FAILED
_PAST_THE_END = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE

_CONNECTIONS = 64  # kept open for the threads of one process
# Below these levels they print whole URLs, and the URL of an upload's session is a
# credential that allows anybody to write.
_QUIET = {
  "urllib3": logging.ERROR,
  "requests": logging.WARNING,
  "google": logging.WARNING,
}
_CLIENTS: dict[tuple[int, str | None], Any] = {}  # by process and endpoint


def client() -> Any:
  """Returns this process's client, made on first use; a fork makes its own."""
  key = (os.getpid(), retry.current().endpoint)
  found = _CLIENTS.get(key)
  # If several threads make one at once, all use the one that was stored first.
  return found if found is not None else _CLIENTS.setdefault(key, _make(key[1]))


def close() -> None:
  """Closes this process's connections to buckets; the next use opens new ones."""
  for key in [key for key in _CLIENTS if key[0] == os.getpid()]:
    _CLIENTS.pop(key).close()


def _make(endpoint: str | None) -> Any:
  """Returns a client with the library's default credentials.

  It sends no credentials without encryption: such a server is a test server, or
  somebody may listen.
  """
  for name, level in _QUIET.items():
    logging.getLogger(name).setLevel(level)
  storage = _google_cloud_storage()
  from google.auth import credentials
  from requests import adapters

  anonymous = endpoint is not None and endpoint.startswith("http://")
  made = storage.Client(
    project=None,  # the project of a bucket follows from its name
    credentials=credentials.AnonymousCredentials() if anonymous else None,
    client_options={"api_endpoint": endpoint} if endpoint else None,
  )
  adapter = adapters.HTTPAdapter(
    pool_connections=_CONNECTIONS, pool_maxsize=_CONNECTIONS
  )
  for scheme in ("https://", "http://"):
    made._http.mount(scheme, adapter)
  return made


@functools.cache
def _google_cloud_storage() -> Any:
  """Returns the module google.cloud.storage.

  Imported when a gs:// path is first used, so that other commands do not wait for it.
  Its packages warn every user that support for Python 3.11 will end. The filter stays
  in place, because `catch_warnings` restores filters for all threads, and this
  function may run in several at once.
  """
  # Otherwise the library requests the bucket's metadata, for traces that nobody reads,
  # in its own threads, and with a permission that reading objects does not need.
  os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
  warnings.filterwarnings("ignore", module=r"google\.")
  from google.cloud import storage

  return storage


_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class StatusError(Exception):
  """A request that failed with one of the statuses its caller expects.

  Attributes:
    status: The HTTP status.
  """

  def __init__(self, status: int, message: str) -> None:
    super().__init__(message)
    self.status = status


def send_request(
  path: str,
  request: Callable[[Timeout], Result],
  *,
  expect: Collection[int] = (),
) -> Result:
  """Makes a request to a bucket until it succeeds or the deadline has passed.

  Args:
    path: The gs:// path, for messages.
    request: Makes one attempt, given its timeouts; must be safe to repeat.
    expect: Statuses that the caller handles.

  Raises:
    StatusError: The answer had one of the statuses in `expect`.
    errors.AccessError: Not allowed, no credentials, or no such bucket, even where
      `expect` has that status.
    errors.DataError: Any other answer that is final, such as no such object.
    errors.UnreachableError: No attempt succeeded before the deadline.
  """
  with _failures_explained(path, expect):
    return _until_final(path, request, expect)


def _until_final(
  path: str, request: Callable[[Timeout], Result], expect: Collection[int]
) -> Result:
  """Repeats a request until it succeeds, its failure is final or expected, or late."""
  _google_cloud_storage()  # before anything else imports a package of Google's
  settings = retry.current()
  return retry.keep_trying(
    lambda left: request(settings.timeout_seconds(left)),
    what=path,
    is_transient=lambda error: _status(error) not in expect and is_transient(error),
    describe=describe_error,
    deadline_seconds=settings.deadline_seconds,
  )


@contextlib.contextmanager
def _failures_explained(path: str, expect: Collection[int]) -> Iterator[None]:
  """Turns the library's exceptions into those that `send_request` lists."""
  try:
    yield
  except (errors.FacedistError, OSError):
    raise
  except Exception as error:
    if _is_about_credentials(error):
      line = retry.no_credentials(path, describe_error(error))
      raise errors.AccessError(line) from error
    status = _status(error)
    if status is None:
      raise
    message = _message(error)
    is_shut = retry.is_about_bucket(status, message)
    if status in expect and not is_shut:
      raise StatusError(status, retry.in_brief(status, message)) from error
    line = retry.explain(path, status=status, message=message)
    raise (errors.AccessError if is_shut else errors.DataError)(line) from error


def is_transient(error: Exception) -> bool:
  """Says whether the same request may succeed a moment later."""
  import requests
  import urllib3
  from google.auth import exceptions as auth
  from google.cloud.storage import exceptions as media

  if isinstance(error, auth.TransportError):
    return True
  if isinstance(error, auth.RefreshError):
    return bool(error.retryable)
  if _status(error) is not None:
    return _status(error) in _TRANSIENT_STATUS
  transient = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    media.DataCorruption,
  )
  return isinstance(error, transient)


def describe_error(error: Exception) -> str:
  """Returns an exception of the library in a few words, without any credential."""
  status = _status(error)
  if status is not None:
    return retry.in_brief(status, _message(error))
  inner = error
  while inner.args and isinstance(inner.args[0], Exception):
    inner = inner.args[0]
  text = str(inner.args[0] if inner.args else inner)
  # The reason follows the last colon; a whole URL may precede it.
  reason = text.rsplit(": ", 1)[-1].rstrip("')")
  return retry.redact(f"{type(error).__name__}: {reason}")


def _status(error: Exception) -> int | None:
  """Returns the HTTP status of a failed answer; none where there was no answer."""
  from google.api_core import exceptions
  from google.cloud.storage import exceptions as media

  if isinstance(error, exceptions.GoogleAPICallError) and error.code is not None:
    return int(error.code)
  if isinstance(error, media.InvalidResponse):
    return int(error.response.status_code)
  return None


def _message(error: Exception) -> str:
  """Returns what the server said in its failed answer."""
  response = getattr(error, "response", None)
  try:
    return str(response.json()["error"]["message"]) if response is not None else ""
  except (ValueError, KeyError, TypeError):
    return str(response.text) if response is not None else ""


def _is_about_credentials(error: Exception) -> bool:
  from google.auth import exceptions

  return isinstance(error, exceptions.GoogleAuthError)


def split(path: str) -> tuple[str, str]:
  """Splits `gs://bucket/name` into bucket and name."""
  bucket, _, name = path[len(PREFIX) :].partition("/")
  if not bucket:
    raise errors.UsageError(f"{path} names no bucket; write gs://BUCKET/NAME.")
  return bucket, name


def bucket_handle(name: str) -> Any:
  """Returns the library's handle of a bucket; sends no request."""
  return client().bucket(name, user_project=retry.current().user_project)


def blob(path: str) -> Any:
  """Returns the library's handle of one object; sends no request.

  Call it in a request, so that missing credentials are an error about this path.
  """
  bucket, name = split(path)
  if not name:
    raise errors.UsageError(f"{path} names no object; write gs://BUCKET/NAME.")
  return bucket_handle(bucket).blob(name)


def metadata(path: str) -> Any:
  """Returns the handle of an object with its size, generation and checksum."""
  return send_request(path, functools.partial(_load_metadata, path))


def _find(path: str) -> Any:
  """Returns the object's handle with its metadata; none if there is no object."""
  load = functools.partial(_load_metadata, path)
  try:
    return send_request(path, load, expect=(_MISSING,))
  except StatusError:
    return None


def _load_metadata(path: str, timeout: Timeout) -> Any:
  found = blob(path)
  found.reload(timeout=timeout, retry=None)
  return found


def exists(path: str) -> bool:
  """Says whether there is an object of that name."""
  return _find(path) is not None


def status(path: str) -> tuple[int, str]:
  """Returns the object's bytes, and a token that changes when it is replaced."""
  found = metadata(path)
  return int(found.size), str(found.generation)


def stored_crc32c(path: str) -> int:
  """Returns an object's CRC-32C as its bucket keeps it; the object is not read.

  Raises:
    errors.DataError: There is no such object.
  """
  return checksums.from_text(metadata(path).crc32c)


_DOWNLOAD_PIECE_BYTES = 64 << 20  # fetched by one request, within one deadline


class Sink:
  """Collects the bytes of one or more answers.

  Attributes:
    stream: Where the bytes go.
    received: How many came.
    checksum: Their CRC-32C.
    until: When the request must be done, by time.monotonic; a body that arrives very
      slowly would otherwise never time out.
  """

  def __init__(self, stream: Any, *, until: float = float("inf")) -> None:
    self.stream = stream
    self.received = 0
    self.checksum = 0
    self.until = until

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


def read_bytes(path: str) -> bytes:
  """Returns the whole object, its checksum compared."""
  deadline = time.monotonic() + retry.current().deadline_seconds

  def attempt(timeout: Timeout) -> bytes:
    sink = Sink(io.BytesIO(), until=deadline)
    blob(path).download_to_file(
      sink, raw_download=True, checksum="crc32c", timeout=timeout, retry=None
    )
    return bytes(sink.stream.getvalue())

  return send_request(path, attempt)


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the object ends."""
  sink = Sink(io.BytesIO())
  try:
    fetch(path, sink, start, start + length, generation)
  except StatusError as error:
    if error.status == _REPLACED:
      raise _replaced(path) from error
  return sink.stream.getvalue()


def download(path: str, partial: str) -> None:
  """Copies the object to the local name: resumed after a cut, checksum compared."""
  found = metadata(path)
  with open(partial, "wb") as stream:
    sink = Sink(stream)
    for start in range(0, found.size, _DOWNLOAD_PIECE_BYTES):
      end = min(found.size, start + _DOWNLOAD_PIECE_BYTES)
      try:
        fetch(path, sink, start, end, str(found.generation))
      except StatusError as error:
        raise _replaced(path) from error
  if checksums.to_text(sink.checksum) != found.crc32c:
    raise errors.DataError(
      f"{path}: the bytes that arrived do not match its CRC-32C; try again."
    )


def fetch(path: str, sink: Sink, start: int, end: int, generation: str | None) -> None:
  """Reads the bytes [start, end) of an object into the sink; less where it ends.

  After a cut it continues at the byte that is missing, or from the start if no
  generation says that the object is still the same.

  Raises:
    StatusError: The object ends before `start` or was replaced.
  """
  before = sink.received
  deadline = time.monotonic() + retry.current().deadline_seconds

  def attempt(timeout: Timeout) -> None:
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

  send_request(path, attempt, expect=(_PAST_THE_END, _REPLACED))


def _replaced(path: str) -> errors.DataError:
  return errors.DataError(f"{path} was replaced since it was first read; start anew.")


def list_names(folder: str) -> list[str]:
  """Returns the sorted names of one level, without the placeholders of consoles."""
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


def _pages(
  folder: str, prefix: str, *, delimiter: str | None
) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
  """Yields the pages of a listing: (name, size) of objects, and folders' prefixes."""
  bucket, _ = split(folder)
  token = None

  def load_page(timeout: Timeout) -> Any:
    listing = client().list_blobs(
      bucket_handle(bucket),
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
    found, prefixes, token = send_request(folder, load_page)
    yield found, prefixes
    if token is None:
      return


def _prefix(folder: str) -> str:
  _, name = split(folder)
  return name.rstrip("/") + "/" if name else ""


_TOKEN = "facedist-upload"
_UPLOAD_PIECE_BYTES = 16 << 20  # of a large upload; a multiple of 256 KiB
_MAX_RIVALS = 10  # writers that replaced the object while we tried to
_MAX_UPLOADS = 3
# The session is gone, lost what it had, or holds what the checksum does not match.
_START_ANEW = (
  _MISSING,
  http.HTTPStatus.GONE,
  http.HTTPStatus.BAD_REQUEST,
  http.HTTPStatus.PERMANENT_REDIRECT,
)


def write_bytes(
  path: str, content: bytes, *, if_absent: bool, if_generation: str | None = None
) -> bool:
  """Writes an object; returns whether it did, see `_write`."""
  checksum = checksums.crc32c_of(content)
  return _write(
    path,
    io.BytesIO(content),
    checksum,
    if_absent=if_absent,
    if_generation=if_generation,
  )


def replace_object(path: str, content: bytes, *, generation: str | None) -> bool:
  """Writes a whole object of a bucket, unless another process was faster.

  Args:
    path: A gs:// path.
    content: All of it.
    generation: Of the object that is replaced; none where there was none.

  Returns:
    Whether it was written; False if there is another generation by now.

  Raises:
    errors.AccessError: There is no such bucket, or we may not write to it.
  """
  return write_bytes(
    path, content, if_absent=generation is None, if_generation=generation
  )


def upload(local: str, path: str, *, if_absent: bool) -> bool:
  """Writes an object from a local file; returns whether it did, see `_write`."""
  checksum = checksums.crc32c(local)
  with open(local, "rb") as stream:
    return _write(path, stream, checksum, if_absent=if_absent)


def _write(
  path: str,
  stream: IO[bytes],
  checksum: int,
  *,
  if_absent: bool,
  if_generation: str | None = None,
) -> bool:
  """Sends a content until it is the object's, or until it is known that it is not.

  Returns:
    False if `if_absent` and another writer's object was there first, or if the object
    no longer has the generation `if_generation`; else True.
  """
  token = uuid.uuid4().hex
  for _ in range(_MAX_RIVALS):
    generation = int(if_generation or 0)
    if not if_absent and not generation and (found := _find(path)) is not None:
      generation = int(found.generation)
    try:
      _send(path, stream, checksum=checksum, token=token, generation=generation)
      return True
    except StatusError as error:
      if error.status != _REPLACED:
        raise
    found = _find(path)
    if found is not None and (found.metadata or {}).get(_TOKEN) == token:
      return True
    if if_generation or (if_absent and found is not None):
      return False
  raise errors.DataError(
    f"{path} was replaced by others {_MAX_RIVALS} times while it was being written; "
    "let one process write it."
  )


def _send(
  path: str, stream: IO[bytes], *, checksum: int, token: str, generation: int
) -> None:
  """Sends a content if the object's generation is the one given, else StatusError.

  The library sends a large content in pieces and repeats a piece whose answer was lost,
  which the bucket ignores if it has the piece. An upload that cannot continue is begun
  anew.
  """
  num_bytes = stream.seek(0, os.SEEK_END)
  expect = (_REPLACED, *_START_ANEW)

  def retry_each(request: Callable[[], Result]) -> Callable[[], Result]:
    return lambda: _until_final(path, lambda _: request(), expect)

  for _ in range(_MAX_UPLOADS):
    settings = retry.current()
    try:
      with _failures_explained(path, expect):
        target = blob(path)
        target.metadata = {_TOKEN: token}
        target.crc32c = checksums.to_text(checksum)  # the bucket compares it
        target.chunk_size = _UPLOAD_PIECE_BYTES
        target.upload_from_file(
          stream,
          rewind=True,
          size=num_bytes,
          content_type="application/octet-stream",
          if_generation_match=generation,
          checksum=None,
          timeout=settings.timeout_seconds(settings.deadline_seconds),
          retry=retry_each,
        )
      return
    except StatusError as error:
      if error.status == _REPLACED:
        raise
      reason = str(error)
    except ValueError as error:  # the bucket holds less of a piece than was sent
      reason = retry.redact(str(error))
  raise errors.DataError(
    f"{path}: the bucket did not accept the content in {_MAX_UPLOADS} uploads (last: "
    f"{reason}); was the file written to meanwhile?"
  )


def remove(path: str) -> None:
  """Removes an object; one that is not there is no error.

  The request names the generation: if it arrives late, after its repetition succeeded,
  it cannot remove what was written since.
  """
  while (found := _find(path)) is not None:
    delete = functools.partial(_delete, path, int(found.generation))
    try:
      send_request(path, delete, expect=(_MISSING, _REPLACED))
      return
    except StatusError as error:
      if error.status == _MISSING:
        return


def _delete(path: str, generation: int, timeout: Timeout) -> None:
  blob(path).delete(if_generation_match=generation, timeout=timeout, retry=None)
