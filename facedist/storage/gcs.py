"""Writing objects: safe to repeat, resumed after a cut, compared by checksum.

A request whose answer was lost may have taken effect, and it may still take effect
after its repetition. So each upload names the generation that it replaces (none, for a
new object), and carries a token: if the precondition fails because the object is
already this very upload, that is a success.

The client of buckets: the one module that imports google.cloud.

`call` is how every request is made: under the retry policy, with the library's own
retries off, and with each failure that will not pass turned into one line.

One object of a bucket: its path, its handle, its metadata.

Objects in a bucket: the operations of `disk`, made of requests that may repeat.

The bytes of an object: resumed after a cut, never of two generations mixed.
"""

import functools
import http
import io
import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any, TypeVar

from facedist import errors
from facedist.storage import checksums, retry

Result = TypeVar("Result")
Timeout = tuple[float, float]

_CONNECTIONS = 64  # kept open for the threads of one process
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
# Below these levels they print whole URLs, and the URL of an upload's session is a
# credential: whoever has it may write.
_QUIET = {
  "urllib3": logging.ERROR,
  "requests": logging.WARNING,
  "google": logging.WARNING,
}
_CLIENTS: dict[tuple[int, str | None], Any] = {}  # by process and endpoint


class StatusError(Exception):
  """A request that failed with one of the statuses its caller expects.

  Attributes:
    status: The HTTP status.
  """

  def __init__(self, status: int) -> None:
    super().__init__(status)
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
  _google_cloud_storage()  # before anything else imports a package of Google's
  limits = retry.current()
  try:
    return retry.keep_trying(
      lambda left: request(limits.timeout_seconds(left)),
      what=path,
      is_transient=lambda error: _status(error) not in expect and is_transient(error),
      describe=describe_error,
      deadline_seconds=limits.deadline_seconds,
    )
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
      raise StatusError(status) from error
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
    # A body that arrived damaged is refused by its checksum.
    damaged = _status(error) == http.HTTPStatus.BAD_REQUEST and "CRC32C" in str(error)
    return damaged or _status(error) in _TRANSIENT_STATUS
  passing = (
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
  return isinstance(error, passing)


def describe_error(error: Exception) -> str:
  """Returns an exception of the library in a few words, without any credential."""
  status = _status(error)
  if status is not None:
    return retry.in_brief(status, _message(error))
  inner = error
  while inner.args and isinstance(inner.args[0], Exception):
    inner = inner.args[0]
  text = str(inner.args[0] if inner.args else inner)
  # After the last colon stands the reason, before it perhaps a whole URL.
  reason = text.rsplit(": ", 1)[-1].rstrip("')")
  return retry.redact(f"{type(error).__name__}: {reason}")


def put(
  url: str, body: bytes, *, headers: dict[str, str], timeout: Timeout
) -> tuple[int, str]:
  """Sends a piece of a resumable upload.

  Returns:
    The status, and the Range header of what the server has, empty if it has none.
  """
  from google.api_core import exceptions

  answer = client()._http.request(
    "PUT", url, data=body, headers=headers, timeout=timeout
  )
  if not answer.ok:
    raise exceptions.from_http_response(answer)
  return int(answer.status_code), str(answer.headers.get("Range", ""))


def bucket_handle(name: str) -> Any:
  """Returns the library's handle of a bucket; nothing is fetched."""
  limits = retry.current()
  return client().bucket(name, user_project=limits.user_project)


def client() -> Any:
  """Returns this process's client, made on first use; a fork makes its own."""
  key = (os.getpid(), retry.current().endpoint)
  found = _CLIENTS.get(key)
  # Of threads that come first together, all take the client of one of them.
  return found if found is not None else _CLIENTS.setdefault(key, _make(key[1]))


def close() -> None:
  """Closes this process's connections to buckets; the next use opens new ones."""
  for key in [key for key in _CLIENTS if key[0] == os.getpid()]:
    _CLIENTS.pop(key).close()


def _make(endpoint: str | None) -> Any:
  """Returns a client with the library's default credentials.

  A server reached without encryption is a test server, or somebody listens: it is
  shown no credentials.
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


def _google_cloud_storage() -> Any:
  """Returns the module google.cloud.storage.

  Imported when a gs:// path is first used, so that other commands do not wait for it.
  Its packages warn every user that support for Python 3.11 will end. The filter stays
  in place, because `catch_warnings` restores filters for all threads, and this
  function may run in several at once.
  """
  # Else it asks for the bucket's metadata, for traces that nobody reads, in threads
  # of its own, and with a permission that reading objects does not need.
  os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
  warnings.filterwarnings("ignore", module=r"google\.")
  from google.cloud import storage

  return storage


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
  return bucket_handle(bucket).blob(name)


def metadata(path: str) -> Any:
  """Returns the handle of an object with its size, generation and checksum."""

  def fetch(timeout: Timeout) -> Any:
    found = blob(path)
    found.reload(timeout=timeout, retry=None)
    return found

  return send_request(path, fetch)


def stored_crc32c(path: str) -> int:
  """Returns an object's CRC-32C as its bucket keeps it; the object is not read.

  Raises:
    errors.DataError: There is no such object.
  """
  return checksums.from_text(metadata(path).crc32c)


PAST_THE_END = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
REPLACED = http.HTTPStatus.PRECONDITION_FAILED


class Sink:
  """Takes the bytes of an answer, one request after another.

  Attributes:
    stream: Where the bytes go.
    received: How many came.
    checksum: Their CRC-32C.
    until: When the request must be done, by time.monotonic; a body that trickles
      would else never time out.
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


def fetch(path: str, sink: Sink, start: int, end: int, generation: str | None) -> None:
  """Brings the bytes [start, end) of an object to the sink; less where it ends.

  After a cut it goes on with the byte that is missing, or, where no generation says
  that the object is still the same, from the start.

  Raises:
    client.StatusError: The object begins after `start` or was replaced.
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

  send_request(path, attempt, expect=(PAST_THE_END, REPLACED))


_PIECE_BYTES = 64 << 20  # fetched by one request, within one deadline
_GONE = http.HTTPStatus.NOT_FOUND


def exists(path: str) -> bool:
  """Says whether there is an object of that name."""
  try:
    send_request(
      path, lambda timeout: _generation_number(path, timeout), expect=(_GONE,)
    )
  except StatusError:
    return False
  return True


def status(path: str) -> tuple[int, str]:
  """Returns the object's bytes, and a token that changes when it is replaced."""
  found = metadata(path)
  return int(found.size), str(found.generation)


def read_bytes(path: str) -> bytes:
  """Returns the whole object, its checksum compared."""
  deadline = time.monotonic() + retry.current().deadline_seconds

  def fetch(timeout: Timeout) -> bytes:
    sink = Sink(io.BytesIO(), until=deadline)
    blob(path).download_to_file(
      sink, raw_download=True, checksum="crc32c", timeout=timeout, retry=None
    )
    return bytes(sink.stream.getvalue())

  return send_request(path, fetch)


def read_range(path: str, start: int, length: int, generation: str | None) -> bytes:
  """Returns up to `length` bytes from `start`; less where the object ends."""
  sink = Sink(io.BytesIO())
  try:
    fetch(path, sink, start, start + length, generation)
  except StatusError as error:
    if error.status == REPLACED:
      raise _replaced(path) from error
  return sink.stream.getvalue()


def download(path: str, partial: str) -> None:
  """Brings the object to the local name: resumed after a cut, checksum compared."""
  found = metadata(path)
  with open(partial, "wb") as stream:
    sink = Sink(stream)
    for start in range(0, found.size, _PIECE_BYTES):
      end = min(found.size, start + _PIECE_BYTES)
      try:
        fetch(path, sink, start, end, str(found.generation))
      except StatusError as error:
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
      number = send_request(
        path, lambda timeout: _generation_number(path, timeout), expect=(_GONE,)
      )
      send_request(
        path,
        functools.partial(_delete, path, number),
        expect=(_GONE, REPLACED),
      )
    except StatusError as error:
      if error.status == REPLACED:
        continue
    return


def _delete(path: str, generation: int, timeout: Timeout) -> None:
  blob(path).delete(if_generation_match=generation, timeout=timeout, retry=None)


def _generation_number(path: str, timeout: Timeout) -> int:
  found = blob(path)
  found.reload(timeout=timeout, retry=None)
  return int(found.generation)


def _pages(
  folder: str, prefix: str, *, delimiter: str | None
) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
  """Yields the pages of a listing: (name, size) of objects, and folders' prefixes."""
  bucket, _ = split(folder)
  token = None

  def fetch(timeout: Timeout) -> Any:
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
    found, prefixes, token = send_request(folder, fetch)
    yield found, prefixes
    if token is None:
      return


def _prefix(folder: str) -> str:
  _, name = split(folder)
  return name.rstrip("/") + "/" if name else ""


def _replaced(path: str) -> errors.DataError:
  return errors.DataError(f"{path} was replaced since it was first read; start anew.")


_TOKEN = "facedist-upload"
_PIECE_BYTES = 16 << 20  # of a resumable upload; a multiple of 256 KiB
_MOST_RIVALS = 10  # writers that replaced the object while we tried to
_MOST_SESSIONS = 3
_REPLACED = http.HTTPStatus.PRECONDITION_FAILED
# The session is gone, or what arrived is not what the checksum says.
_START_ANEW = (
  http.HTTPStatus.NOT_FOUND,
  http.HTTPStatus.GONE,
  http.HTTPStatus.BAD_REQUEST,
)

# Sends the content to a handle, if the object's generation is the one given.
Send = Callable[[Any, int], None]


def write_bytes(
  path: str, content: bytes, *, if_absent: bool, if_generation: str | None = None
) -> bool:
  """Writes an object in one request; returns whether it did, see `_put`."""

  def send(target: Any, generation: int) -> None:
    send_request(
      path,
      lambda timeout: target().upload_from_string(
        content,
        content_type="application/octet-stream",
        if_generation_match=generation,
        checksum=None,  # the handle holds it, and the server compares
        timeout=timeout,
        retry=None,
      ),
      expect=(_REPLACED,),
    )

  return _put(
    path,
    checksums.crc32c_of(content),
    send,
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
  """Writes an object from a local file; returns whether it did, see `_put`."""
  num_bytes = os.path.getsize(local)
  if num_bytes <= _PIECE_BYTES:
    with open(local, "rb") as stream:
      return write_bytes(path, stream.read(), if_absent=if_absent)

  def send(target: Any, generation: int) -> None:
    with open(local, "rb") as stream:
      _send_in_pieces(path, target, generation, stream=stream, num_bytes=num_bytes)

  return _put(path, checksums.crc32c(local), send, if_absent=if_absent)


def _put(
  path: str,
  checksum: int,
  send: Send,
  *,
  if_absent: bool,
  if_generation: str | None = None,
) -> bool:
  """Sends a content until it is the object's, or until it is known that it is not.

  Returns:
    False if `if_absent` and somebody else's object was there first, or if it is not
    of `if_generation` any more; else True.
  """
  token = uuid.uuid4().hex

  def target() -> Any:
    made = blob(path)
    made.metadata = {_TOKEN: token}
    made.crc32c = checksums.to_text(checksum)
    return made

  for _ in range(_MOST_RIVALS):
    found = None if if_absent else _find(path)
    try:
      generation = 0 if found is None else int(found.generation)
      send(target, int(if_generation or generation))
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
    f"{path} was replaced by others {_MOST_RIVALS} times while it was being written; "
    "let one process write it."
  )


def _find(path: str) -> Any:
  """Returns the object's handle with its metadata; none if there is none."""

  def fetch(timeout: Timeout) -> Any:
    found = blob(path)
    found.reload(timeout=timeout, retry=None)
    return found

  try:
    return send_request(path, fetch, expect=(http.HTTPStatus.NOT_FOUND,))
  except StatusError:
    return None


def _send_in_pieces(
  path: str, target: Any, generation: int, *, stream: IO[bytes], num_bytes: int
) -> None:
  """Sends a large content in a resumable session, or in another if one is lost."""
  for _ in range(_MOST_SESSIONS):
    url = send_request(
      path,
      lambda timeout: target().create_resumable_upload_session(
        content_type="application/octet-stream",
        size=num_bytes,
        if_generation_match=generation,
        checksum=None,
        timeout=timeout,
        retry=None,
      ),
      expect=(_REPLACED,),
    )
    session = _Session(url, stream, num_bytes)
    try:
      while not session.done:
        send_request(path, session.step, expect=(_REPLACED, *_START_ANEW))
      return
    except StatusError as error:
      if error.status == _REPLACED:
        raise
  raise errors.DataError(
    f"{path}: the bucket did not take the content in {_MOST_SESSIONS} uploads; was "
    "the file written to meanwhile?"
  )


class _Session:
  """A resumable upload: what the server has of it, and the next request."""

  def __init__(self, url: str, stream: IO[bytes], num_bytes: int) -> None:
    self._url = url
    self._stream = stream
    self._num_bytes = num_bytes
    self._received = 0
    self._is_known = True  # what was received; not after a failed request
    self.done = False

  def step(self, timeout: Timeout) -> None:
    """Sends the next piece, or asks how much arrived of the last one."""
    piece, position = b"", "*"
    if self._is_known:
      self._stream.seek(self._received)
      piece = self._stream.read(_PIECE_BYTES)
      position = f"{self._received}-{self._received + len(piece) - 1}"
    self._is_known = False
    status, received = put(
      self._url,
      piece,
      headers={"Content-Range": f"bytes {position}/{self._num_bytes}"},
      timeout=timeout,
    )
    self.done = status != http.HTTPStatus.PERMANENT_REDIRECT
    # Without a Range header nothing has arrived yet.
    match = re.fullmatch(r"bytes=0-(\d+)", received)
    self._received = int(match[1]) + 1 if match else 0
    self._is_known = True
