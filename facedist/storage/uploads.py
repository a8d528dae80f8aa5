"""Writing objects: safe to repeat, resumed after a cut, compared by checksum.

A request whose answer was lost may have taken effect, and it may still take effect
after its repetition. So each upload names the generation that it replaces (none, for a
new object), and carries a token: if the precondition fails because the object is
already this very upload, that is a success.
"""

import http
import os
import re
import uuid
from collections.abc import Callable
from typing import IO, Any

from facedist import errors
from facedist.storage import checksums, client, objects

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
    client.call(
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
    made = objects.blob(path)
    made.metadata = {_TOKEN: token}
    made.crc32c = checksums.to_text(checksum)
    return made

  for _ in range(_MOST_RIVALS):
    found = None if if_absent else _find(path)
    try:
      generation = 0 if found is None else int(found.generation)
      send(target, int(if_generation or generation))
      return True
    except client.StatusError as error:
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

  def fetch(timeout: client.Timeout) -> Any:
    found = objects.blob(path)
    found.reload(timeout=timeout, retry=None)
    return found

  try:
    return client.call(path, fetch, expect=(http.HTTPStatus.NOT_FOUND,))
  except client.StatusError:
    return None


def _send_in_pieces(
  path: str, target: Any, generation: int, *, stream: IO[bytes], num_bytes: int
) -> None:
  """Sends a large content in a resumable session, or in another if one is lost."""
  for _ in range(_MOST_SESSIONS):
    url = client.call(
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
        client.call(path, session.step, expect=(_REPLACED, *_START_ANEW))
      return
    except client.StatusError as error:
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

  def step(self, timeout: client.Timeout) -> None:
    """Sends the next piece, or asks how much arrived of the last one."""
    piece, position = b"", "*"
    if self._is_known:
      self._stream.seek(self._received)
      piece = self._stream.read(_PIECE_BYTES)
      position = f"{self._received}-{self._received + len(piece) - 1}"
    self._is_known = False
    status, received = client.put(
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
