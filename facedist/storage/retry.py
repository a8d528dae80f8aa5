"""Settings and retries of bucket requests, and one-line explanations of their failures.

Three parts: `StorageSettings` (endpoint, billing project, deadline), `keep_trying` (the
retry policy: jittered back-off within the deadline), and the texts of errors without
any credential in them.
"""

import dataclasses
import http
import math
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from facedist import errors

Result = TypeVar("Result")

_MAX_READ_SECONDS = 30.0  # without a byte; a healthy bucket answers in well under one


@dataclasses.dataclass(frozen=True)
class StorageSettings:
  """What this process and its children use for every gs:// path.

  Attributes:
    endpoint: Where requests go; none means Google's own.
    user_project: The project that pays for requests to a requester-pays bucket.
    deadline_seconds: How long one request is retried before it is an error.
  """

  endpoint: str | None
  user_project: str | None
  deadline_seconds: float

  def timeout_seconds(self, left: float) -> tuple[float, float]:
    """Returns how long to wait for a connection and for the next byte of an answer.

    Args:
      left: Seconds until the deadline. No wait takes more than a quarter of the whole
        deadline, so that a request to a server that stopped answering is retried.
    """
    wait = max(0.05, min(_MAX_READ_SECONDS, self.deadline_seconds / 4, left))
    return min(wait, 10.0), wait


def current() -> StorageSettings:
  """Returns the settings in force, which the environment holds for child processes too.

  Raises:
    errors.UsageError: A variable breaks its rule.
  """
  # STORAGE_EMULATOR_HOST is the libraries' own variable for a test server.
  endpoint = os.environ.get(errors.STORAGE_ENDPOINT) or os.environ.get(
    "STORAGE_EMULATOR_HOST"
  )
  if endpoint and not endpoint.startswith(("http://", "https://")):
    raise errors.UsageError(
      f"--storage_endpoint={endpoint} is no address; write https://HOST or http://HOST."
    )
  default = str(errors.DEFAULT_STORAGE_DEADLINE_SECONDS)
  text = os.environ.get(errors.STORAGE_DEADLINE_SECONDS) or default
  try:
    deadline = float(text)
  except ValueError:
    deadline = math.nan
  if not 0 < deadline < math.inf:
    raise errors.UsageError(
      f"--storage_deadline_seconds={text} must be a number of seconds above 0."
    )
  return StorageSettings(
    endpoint=endpoint.rstrip("/") if endpoint else None,
    user_project=os.environ.get(errors.STORAGE_USER_PROJECT) or None,
    deadline_seconds=deadline,
  )


_FIRST_PAUSE_SECONDS = 0.5  # the longest pause before the second attempt
_MAX_PAUSE_SECONDS = 32.0
_SILENT_ATTEMPTS = 3  # single failures are normal and not logged; repeated ones are


def keep_trying(
  request: Callable[[float], Result],
  *,
  what: str,
  is_transient: Callable[[Exception], bool],
  describe: Callable[[Exception], str],
  deadline_seconds: float,
) -> Result:
  """Returns what `request` returns, called until it does not fail transiently.

  Args:
    request: Takes the seconds that are left until the deadline.
    what: The path, for messages.
    is_transient: Says whether a later attempt may succeed; any other exception is
      raised at once.
    describe: Returns an exception in a few words without secrets.
    deadline_seconds: For all attempts and the pauses between them.

  Raises:
    errors.UnreachableError: The deadline passed and every attempt had failed.
  """
  from google.api_core import exceptions, retry

  deadline = time.monotonic() + deadline_seconds
  attempts = 0

  def count(error: Exception) -> None:
    nonlocal attempts
    attempts += 1
    if attempts > _SILENT_ATTEMPTS:
      left = deadline - time.monotonic()
      logging.warning(
        "%s: %s; attempt %d failed, %.0f s left", what, describe(error), attempts, left
      )

  policy = retry.Retry(
    predicate=is_transient,
    initial=_FIRST_PAUSE_SECONDS,
    maximum=_MAX_PAUSE_SECONDS,
    timeout=deadline_seconds,
    on_error=count,
  )
  try:
    return policy(lambda: request(max(deadline - time.monotonic(), 0.0)))()
  except exceptions.RetryError as error:
    raise errors.UnreachableError(
      f"{what}: no success in {deadline_seconds:g} s and {attempts} attempts "
      f"(last: {describe(error.cause)}); check the network and the bucket's state, "
      "or raise --storage_deadline_seconds."
    ) from error.cause


_SECRETS = re.compile(
  r"(?i)(bearer\s+|ya29\.|(?:access_token|id_token|refresh_token|client_secret"
  r"|private_key|authorization|assertion|upload_id)[\"']?\s*[=:]\s*(?:bearer\s+)?[\"']?)"
  r"[^\s\"',&]+"
)
_MAX_CHARACTERS = 300
_NO_BUCKET = "bucket does not exist"


def is_about_bucket(status: int, message: str) -> bool:
  """Says whether a failed answer is about a bucket or an account, not one object."""
  if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
    return True
  is_missing = status == http.HTTPStatus.NOT_FOUND and _NO_BUCKET in message
  return is_missing or _is_unpaid(message)


def explain(path: str, *, status: int, message: str) -> str:
  """Returns one line about a failed answer that a repetition will not change.

  Args:
    path: The gs:// path of the request.
    status: The HTTP status.
    message: What the server said.
  """
  said = in_brief(status, message)
  if _is_unpaid(message):
    return f"{path}: the bucket's requester pays; give --storage_user_project=PROJECT."
  if status == http.HTTPStatus.NOT_FOUND:
    if _NO_BUCKET in message:
      bucket = "/".join(path.split("/")[:3])
      return f"{path}: there is no bucket {bucket}; create it or check its spelling."
    return f"{path} does not exist; check its spelling."
  if status == http.HTTPStatus.UNAUTHORIZED:
    return no_credentials(path, said)
  if status == http.HTTPStatus.FORBIDDEN:
    return (
      f"{path}: permission denied ({said}); give the account a role on the bucket, "
      "roles/storage.objectViewer to read or roles/storage.objectUser to write."
    )
  return f"{path}: the bucket refused the request ({said})."


def no_credentials(path: str, reason: str) -> str:
  """Returns one line about credentials that are missing or not accepted."""
  return (
    f"{path}: no valid Google Cloud credentials ({reason}); run `gcloud auth "
    "application-default login` or attach a service account."
  )


def in_brief(status: int, message: str) -> str:
  """Returns status and message on one line, without any credential."""
  try:
    phrase = http.HTTPStatus(status).phrase
  except ValueError:
    phrase = "unknown status"
  return redact(f"{status} {message or phrase}")


def redact(text: str) -> str:
  """Returns `text` on one line, shortened, with whatever looks secret cut out."""
  line = _SECRETS.sub(r"\1[removed]", " ".join(text.split()))
  return line if len(line) <= _MAX_CHARACTERS else line[:_MAX_CHARACTERS] + "…"


def _is_unpaid(message: str) -> bool:
  """Says whether the requester must name a project that pays."""
  said = message.lower()
  return "requester pays" in said or "userprojectmissing" in said
