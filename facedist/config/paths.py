"""Normalises the paths that people write on a command line."""

import os
import re

from facedist import errors

_SUPPORTED = "local paths and gs://BUCKET/NAME are supported"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=[/\\])")
_SCHEME_WITHOUT_SLASH = re.compile(
  r"(gs|gcs|s3|s3a|hdfs|az|file|https?):", re.IGNORECASE
)
_NAMED = re.compile(r"(\w[\w.+-]*)=(.*)", re.ASCII | re.DOTALL)
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|[{(][^})]*[})]?)")


def normalise(flag: str, text: str) -> str:
  """Returns the path that a flag's text means: local, or gs://BUCKET/NAME.

  Surrounding blanks are removed, ~ is the home folder, file:///x is /x, and GS:// is
  gs://.

  Args:
    flag: The flag's name, for messages.
    text: The flag's value.

  Raises:
    errors.UsageError: It is empty, of a scheme that is not supported, or holds a shell
      variable that was not expanded or a character that no path can have.
  """
  given, path = f"--{flag}={text}", text.strip()
  if not path:
    raise errors.UsageError(f"{given} names no path; give one or leave the flag out.")
  _check_characters(given, path)
  if variable := _VARIABLE.search(path):
    raise errors.UsageError(
      f"{given} holds {variable[0]}, which the shell did not expand (single quotes and "
      "flag files do not); write the path itself."
    )
  if path.lower().startswith("gs://"):
    return _in_bucket(given, path)
  if path.lower().startswith("file:/"):
    path = _of_file_url(given, path)
  scheme = _URL.match(path) or _SCHEME_WITHOUT_SLASH.match(path)
  if scheme or "://" in path:
    name = f"{scheme[1]}:" if scheme else "a URL"
    raise errors.UsageError(f"{given} is not a path ({name}); {_SUPPORTED}.")
  if path.startswith("~"):
    path = os.path.expanduser(path)
    if path.startswith("~"):
      raise errors.UsageError(
        f"{given} names the home of a user who is not known here; write the path "
        "itself, or ./~NAME for a file of that name."
      )
  return path


def normalise_list(flag: str, text: str) -> str:
  """Returns the paths of a flag that takes several, with commas between them.

  Each may have a name and = before it, see `split_name`.

  Raises:
    errors.UsageError: `normalise` refuses one of them.
  """
  normal = []
  for part in split_list(text) or [text]:
    name, path = split_name(part)
    normal.append(("" if name is None else f"{name}=") + normalise(flag, path))
  return ",".join(normal)


def split_list(text: str) -> list[str]:
  """Returns the paths between the commas; a path that exists as a whole stays one."""
  if "," in text and os.path.exists(text.strip()):
    return [text.strip()]
  return [part.strip() for part in text.split(",") if part.strip()]


def split_name(text: str) -> tuple[str | None, str]:
  """Returns the name and the path of NAME=PATH; None and the text if it is a path.

  A name has no slash, so ./a=b and gs://b/a=c are paths. So is a=b if it exists.
  """
  found = _NAMED.fullmatch(text)
  if found is None or os.path.exists(text):
    return None, text
  return found[1], found[2]


def _check_characters(given: str, path: str) -> None:
  """Raises UsageError for a path that cannot be opened or named in one line."""
  if any(character in path for character in "\0\n\r"):
    raise errors.UsageError(
      f"{given!r} holds a line break or a NUL character; no path here may have one."
    )
  try:
    path.encode()
  except UnicodeEncodeError:
    raise errors.UsageError(
      f"{given!a} is not UTF-8; rename the folder or link to it."
    ) from None


def _in_bucket(given: str, path: str) -> str:
  """Returns gs://BUCKET/NAME of a path whose scheme is gs:// in any case."""
  rest = path[len("gs://") :]
  if not rest.partition("/")[0]:
    raise errors.UsageError(f"{given} names no bucket; write gs://BUCKET/NAME.")
  return f"gs://{rest}"


def _of_file_url(given: str, path: str) -> str:
  """Returns /x of file:///x, file://localhost/x or file:/x."""
  rest = path[len("file:") :]
  if rest.startswith("//"):
    host, slash, rest = rest[2:].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
      raise errors.UsageError(
        f"{given} names a host, {host!r}; write file:///PATH or the path itself."
      )
    rest = f"/{rest.lstrip('/')}"
  if "%" in rest:
    raise errors.UsageError(
      f"{given} has a % in a URL, which has two meanings; write the path itself."
    )
  return rest
