"""What went wrong with a bucket, in one line that says what to do."""

import http
import re

_SECRETS = re.compile(
  r"(?i)(bearer\s+|ya29\.|(?:access_token|id_token|refresh_token|client_secret"
  r"|private_key|authorization|assertion|upload_id)[\"']?\s*[=:]\s*(?:bearer\s+)?[\"']?)"
  r"[^\s\"',&]+"
)
_MOST_CHARACTERS = 300
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
    path: The gs:// path that was asked for.
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
  return line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + "…"


def _is_unpaid(message: str) -> bool:
  """Says whether the bucket wants to know who pays."""
  said = message.lower()
  return "requester pays" in said or "userprojectmissing" in said
