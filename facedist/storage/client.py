"""The client of buckets: the one module that imports google.cloud.

`call` is how every request is made: under the retry policy, with the library's own
retries off, and with each failure that will not pass turned into one line.
"""

import http
import logging
import os
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from facedist import errors
from facedist.storage import failures, retrying, settings

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


def call(
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
  limits = settings.current()
  try:
    return retrying.keep_trying(
      lambda left: request(limits.timeout_seconds(left)),
      what=path,
      is_transient=lambda error: _status(error) not in expect and is_transient(error),
      describe=describe,
      deadline_seconds=limits.deadline_seconds,
    )
  except (errors.FacedistError, OSError):
    raise
  except Exception as error:
    if _is_about_credentials(error):
      line = failures.no_credentials(path, describe(error))
      raise errors.AccessError(line) from error
    status = _status(error)
    if status is None:
      raise
    message = _message(error)
    is_shut = failures.is_about_bucket(status, message)
    if status in expect and not is_shut:
      raise StatusError(status) from error
    line = failures.explain(path, status=status, message=message)
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


def describe(error: Exception) -> str:
  """Returns an exception of the library in a few words, without any credential."""
  status = _status(error)
  if status is not None:
    return failures.in_brief(status, _message(error))
  inner = error
  while inner.args and isinstance(inner.args[0], Exception):
    inner = inner.args[0]
  text = str(inner.args[0] if inner.args else inner)
  # After the last colon stands the reason, before it perhaps a whole URL.
  reason = text.rsplit(": ", 1)[-1].rstrip("')")
  return failures.redact(f"{type(error).__name__}: {reason}")


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


def bucket(name: str) -> Any:
  """Returns the library's handle of a bucket; nothing is fetched."""
  limits = settings.current()
  return client().bucket(name, user_project=limits.user_project)


def client() -> Any:
  """Returns this process's client, made on first use; a fork makes its own."""
  key = (os.getpid(), settings.current().endpoint)
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
