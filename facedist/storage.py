"""Paths, local and gs://: the one place that reads, writes and lists files.

Every write is atomic: the final name holds the whole content or does not exist.
Bucket access goes through google-cloud-storage, whose checksums, resumable transfers
and retries TensorFlow's own gs:// file system lacks.
"""

import contextlib
import functools
import os
import pathlib
import posixpath
import shutil
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import google_crc32c

from facedist import errors

BUCKET_PREFIX = "gs://"
_CHUNK_BYTES = 8 << 20


def is_bucket(path: str) -> bool:
  """Says whether `path` lies in a bucket."""
  return path.startswith(BUCKET_PREFIX)


def join(folder: str, *names: str) -> str:
  """Joins path parts; forward slashes in a bucket, the system's own elsewhere."""
  if is_bucket(folder):
    return posixpath.join(folder, *names)
  return os.path.join(folder, *names)


def exists(path: str) -> bool:
  """Says whether a file (in a bucket: an object) of that name is there."""
  if is_bucket(path):
    return bool(_blob(path).exists())
  return os.path.exists(path)


def read_bytes(path: str) -> bytes:
  """Returns the whole file.

  Raises:
    errors.DataError: There is no such file.
  """
  with _missing_is_a_data_error(path):
    if is_bucket(path):
      return bytes(_blob(path).download_as_bytes())
    return pathlib.Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
  """Writes the whole file at once; a reader sees the old content or the new.

  Raises:
    errors.DataError: There is no such bucket.
  """
  if is_bucket(path):
    with _missing_is_a_data_error(path):
      _blob(path).upload_from_string(
        content, content_type="application/octet-stream", checksum="crc32c"
      )
    return
  with partial_file(path) as partial:
    pathlib.Path(partial).write_bytes(content)


@contextlib.contextmanager
def partial_file(path: str) -> Iterator[str]:
  """Yields a name beside the local `path`; moves it there if the body succeeds.

  The content is on the disk before it has its name, so a crash of the machine
  leaves no half-written file under the final name. A leftover of an earlier
  process that was killed keeps its own name and is never read.
  """
  folder = os.path.dirname(path)
  if folder:
    os.makedirs(folder, exist_ok=True)
  partial = f"{path}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
  try:
    yield partial
    with open(partial, "rb") as stream:
      os.fsync(stream.fileno())
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise


def list_names(folder: str) -> list[str]:
  """Returns the sorted names of the files and folders in `folder`.

  None if there is no such folder, which a bucket cannot tell from an empty one.

  Raises:
    errors.DataError: There is no such bucket.
  """
  if is_bucket(folder):
    bucket, prefix = _split(folder)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    with _missing_is_a_data_error(folder):
      listing = _client().list_blobs(bucket, prefix=prefix, delimiter="/")
      paths = {blob.name for blob in listing} | set(listing.prefixes)
    # Consoles make an empty object named like the folder itself; it is no file.
    return sorted(path[len(prefix) :].rstrip("/") for path in paths - {prefix})
  if not os.path.isdir(folder):
    return []
  return sorted(os.listdir(folder))


def remove(path: str) -> None:
  """Removes a file; one that is not there is no error."""
  if is_bucket(path):
    blob = _blob(path)
    if blob.exists():
      blob.delete()
    return
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


def upload(local: str, path: str) -> None:
  """Puts the local file at `path`, in a bucket or on a disk.

  Raises:
    errors.DataError: There is no such bucket.
  """
  if is_bucket(path):
    with _missing_is_a_data_error(path):
      _blob(path).upload_from_filename(local, checksum="crc32c")
    return
  with partial_file(path) as partial:
    shutil.copyfile(local, partial)


def download(path: str, local: str) -> None:
  """Brings the file at `path` to the local name, whole or not at all.

  Raises:
    errors.DataError: There is no such file.
  """
  with _missing_is_a_data_error(path), partial_file(local) as partial:
    if is_bucket(path):
      _blob(path).download_to_filename(partial, checksum="crc32c")
    else:
      shutil.copyfile(path, partial)


def crc32c(path: str) -> int:
  """Returns the CRC-32C of a local file, read a chunk at a time."""
  checksum = 0
  with _missing_is_a_data_error(path), open(path, "rb") as stream:
    while chunk := stream.read(_CHUNK_BYTES):
      checksum = google_crc32c.extend(checksum, chunk)
  return checksum


def crc32c_of(content: bytes) -> int:
  """Returns the CRC-32C of `content`."""
  return int(google_crc32c.value(content))


def close() -> None:
  """Closes this process's connections to buckets; the next use opens new ones."""
  if _client_of_process.cache_info().currsize:
    _client().close()
    _client_of_process.cache_clear()


@contextlib.contextmanager
def _missing_is_a_data_error(path: str) -> Iterator[None]:
  """Turns 'not found' from a disk or a bucket into a DataError that names it."""
  not_found: tuple[type[Exception], ...] = (FileNotFoundError,)
  if is_bucket(path):
    not_found += (_google_cloud()[1].NotFound,)
  try:
    yield
  except not_found as error:
    raise errors.DataError(f"{path} does not exist; check its spelling.") from error


def _split(path: str) -> tuple[str, str]:
  """Splits `gs://bucket/name` into bucket and name."""
  bucket, _, name = path[len(BUCKET_PREFIX) :].partition("/")
  if not bucket:
    raise errors.UsageError(f"{path} names no bucket; write gs://BUCKET/NAME.")
  return bucket, name


def _blob(path: str) -> Any:
  """Returns the client library's handle of one object; nothing is fetched."""
  bucket, name = _split(path)
  return _client().bucket(bucket).blob(name)


def _client() -> Any:
  """Returns this process's client, made on first use; a fork makes its own."""
  return _client_of_process(os.getpid())


@functools.cache
def _client_of_process(process: int) -> Any:
  """Returns a client with the library's own credentials.

  With STORAGE_EMULATOR_HOST set, the library itself talks to that host.
  """
  storage, _ = _google_cloud()
  from google.auth import credentials, exceptions

  if os.environ.get("STORAGE_EMULATOR_HOST"):
    return storage.Client(
      project="emulator", credentials=credentials.AnonymousCredentials()
    )
  try:
    return storage.Client()
  except exceptions.DefaultCredentialsError as error:
    raise errors.DataError(
      "no Google Cloud credentials were found for a gs:// path; run "
      "`gcloud auth application-default login` or attach a service account."
    ) from error


def _google_cloud() -> tuple[Any, Any]:
  """Returns the modules google.cloud.storage and google.api_core.exceptions.

  Imported when a gs:// path is first used, so that others do not wait for it, and
  without its warnings, which tell every user that Python 3.11 will end one day.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from google.api_core import exceptions
    from google.cloud import storage
  return storage, exceptions
