"""The images in a tar file, found by its headers; nothing is ever extracted.

A header is 512 bytes, in USTAR's, GNU's or PAX's way (POSIX.1-2008, pax; GNU tar's
manual, "Basic Tar Format"). An archive may be wrong or hostile. So an image must be a
regular file whose content lies in the archive in one piece: anything else under an
image's name (links, devices, sparse files, names that are absolute or climb) is an
error, and so are damaged headers. What is no image is passed over.

A disk's archive is read header by header; a bucket's from end to end, in ranges of
8 MiB, by every task that plans with it. For many tasks, bring it to a shared disk or
unpack it in the bucket.

The fields of a tar file's headers.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from facedist import errors, storage
from facedist.data import image_names

BLOCK_BYTES = 512


def number(field: bytes) -> int | None:
  """Returns a number in octal digits, or in GNU's way big-endian after a byte 0x80.

  None if it is neither; no digits are 0.
  """
  if field[:1] == b"\x80":
    return int.from_bytes(field[1:], "big")
  text = field.partition(b"\0")[0].strip()
  return int(text or b"0", 8) if all(digit in b"01234567" for digit in text) else None


def is_sum_right(block: bytes) -> bool:
  """Says whether a header's sum is that of its bytes, taken unsigned or signed."""
  without = block[:148] + b" " * 8 + block[156:]
  unsigned = sum(without)
  wanted = number(block[148:156])
  return wanted == unsigned or wanted == unsigned - 256 * sum(
    byte > 127 for byte in without
  )


def pax_records(content: bytes) -> dict[bytes, bytes] | None:
  """Reads records `length key=value`; None if they are none."""
  found = {}
  while content.strip(b"\0"):
    digits, _, rest = content.partition(b" ")
    length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
    record = rest[: max(0, length - len(digits) - 1)]
    key, equals, value = record.removesuffix(b"\n").partition(b"=")
    if not record.endswith(b"\n") or not equals or length > len(content):
      return None
    found[key] = value
    content = content[length:]
  return found


def padded(size: int) -> int:
  """Returns the bytes of whole blocks that a content takes."""
  return -(-size // BLOCK_BYTES) * BLOCK_BYTES


_WINDOW_BYTES = 8 << 20  # of a bucket's archive, read at a time
_MOST_NAME_BYTES = 1 << 16
_MOST_TAIL_BYTES = 1 << 20  # zeros that tar fills up its last record with
_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY = b"5"
_WITHOUT_CONTENT = b"123456"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_KINDS = {
  b"1": "a hard link",
  b"2": "a symbolic link",
  b"3": "a device",
  b"4": "a device",
  b"5": "a directory",
  b"6": "a pipe",
  b"S": "a sparse file",
}

Read = Callable[[int, int], bytes]


@dataclasses.dataclass(frozen=True)
class Member:
  """An image in an archive: its path there, its first byte, its bytes."""

  path: str
  start: int
  length: int


@dataclasses.dataclass
class _Header:
  """A member's header with what records before it said of it."""

  name: bytes
  kind: bytes
  start: int
  size: int
  is_sparse: bool = False


def members(archive: str, names: image_names.NameFilter) -> Iterator[Member]:
  """Yields the images of a tar file, local or in a bucket, in the archive's order.

  Args:
    archive: The file.
    names: Says which members are taken, and counts the others.

  Raises:
    errors.DataError: It is no uncompressed tar file, damaged, or holds an image in
      another way than as a regular file.
  """
  found = storage.status(archive)
  with _reader(archive, found) as read:
    _check_is_tar(archive, read(0, min(found.size, BLOCK_BYTES)))
    walk = _Walk(archive, found.size, read)
    while (header := walk.next()) is not None:
      if path := _image_path(header, archive, names=names):
        yield Member(path, header.start, header.size)


class _Walk:
  """Goes from header to header.

  Attributes:
    position: The byte after the content of the last header.
  """

  def __init__(self, archive: str, size: int, read: Read) -> None:
    self.position = 0
    self._archive, self._size, self._read = archive, size, read
    self._long_name: bytes | None = None
    self._pax: dict[bytes, bytes] = {}

  def next(self) -> _Header | None:
    """Returns the next member's header; none at the archive's end."""
    while (header := self._raw()) is not None:
      if header.kind == _LONG_NAME:
        self._long_name = self._content(header).partition(b"\0")[0]
      elif header.kind == _LONG_LINK:
        self._content(header)
      elif header.kind in (_PAX, _PAX_GLOBAL):
        self._take_pax(header)
      else:
        return self._finished(header)
    return None

  def _raw(self) -> _Header | None:
    """Reads one header and checks its sum."""
    if self.position == self._size:
      return None
    block = self._bytes(self.position, BLOCK_BYTES)
    if not block.strip(b"\0"):
      if self._size - self.position > _MOST_TAIL_BYTES:
        raise self._error(
          "it goes on after its end mark; give archives that were joined one by one"
        )
      return None
    if not is_sum_right(block):
      raise self._error("the header's checksum is wrong; the archive is damaged")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and prefix:
      name = prefix + b"/" + name
    size = number(block[124:136])
    if size is None:
      raise self._error(f"a size of {block[124:136]!r}")
    self.position += BLOCK_BYTES
    return _Header(name, block[156:157], self.position, size)

  def _finished(self, header: _Header) -> _Header:
    """Applies what records before a header said, and goes past its content."""
    if header.kind in _REGULAR and header.name.endswith(b"/"):
      header.kind = _DIRECTORY
    header.name = self._pax.get(b"path", self._long_name or header.name)
    if b"size" in self._pax:
      text = self._pax[b"size"]
      if not text.isdigit() or len(text) > 18:
        raise self._error(f"a size of {text[:20]!r}")
      header.size = int(text)
    header.is_sparse = any(key.startswith(b"GNU.sparse") for key in self._pax)
    self._long_name, self._pax = None, {}
    if header.kind in _WITHOUT_CONTENT:
      header.size = 0
    if header.size > self._size - self.position:
      raise self._error(f"{header.name!r} is cut off by the archive's end")
    self.position = min(self.position + padded(header.size), self._size)
    return header

  def _take_pax(self, header: _Header) -> None:
    """Reads records `length key=value` that hold for the next member, or for all."""
    found = pax_records(self._content(header))
    if found is None:
      raise self._error("an extended header that is none")
    if header.kind == _PAX:
      self._pax = found
    elif any(key in (b"path", b"size") or b"sparse" in key for key in found):
      raise self._error("a global header that renames or resizes every member")

  def _content(self, header: _Header) -> bytes:
    """Returns the content of a header that is about the next one."""
    if header.size > _MOST_NAME_BYTES:
      raise self._error(f"a name of {header.size} bytes")
    content = self._bytes(self.position, header.size)
    self.position = min(self.position + padded(header.size), self._size)
    return content

  def _bytes(self, start: int, length: int) -> bytes:
    """Reads some bytes; DataError if the archive ends before."""
    if start + length > self._size:
      raise self._error("the archive is cut off")
    return self._read(start, length)

  def _error(self, what: str) -> errors.DataError:
    """Returns an error at the present place."""
    return errors.DataError(f"{self._archive}, byte {self.position}: {what}.")


def _image_path(
  header: _Header, archive: str, *, names: image_names.NameFilter
) -> str | None:
  """Returns the path of an image's header; none of what is no image."""
  raw = header.name
  name = raw.decode(errors="backslashreplace")
  path = "/".join(_parts(name))
  if header.kind == _DIRECTORY and not image_names.has_image_ending(path):
    return None
  if raw.endswith(b"/") or not names.takes(path):
    return None
  if name.startswith("/") or ".." in _parts(name):
    raise errors.DataError(
      f"{archive}: the name {name!r} leads out of the archive; leave that image out."
    )
  if any(ord(letter) < 32 for letter in name):
    raise errors.DataError(f"{archive}: the name {name!r} has control characters.")
  if header.is_sparse or header.kind not in _REGULAR:
    kind = "a sparse file" if header.is_sparse else _KINDS.get(header.kind, "no file")
    raise errors.DataError(
      f"{archive}: {name!r} is {kind}; archives must hold images as regular files."
    )
  return path


def _parts(name: str) -> list[str]:
  """Returns the parts of a member's name that say where it lies."""
  return [part for part in name.split("/") if part not in ("", ".")]


def _check_is_tar(archive: str, start: bytes) -> None:
  """Raises DataError for what a tar file is often taken for."""
  compressed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
  if start.startswith(compressed):
    raise errors.DataError(
      f"{archive} is compressed, so that no image can be read by its place; unpack it "
      "to a plain .tar first, such as with gunzip (JPEGs hardly shrink anyway)."
    )
  if kind := storage.kind_of_text(start):
    raise errors.DataError(f"{archive} is {kind}.")
  if len(start) < BLOCK_BYTES:
    raise errors.DataError(f"{archive} has {len(start)} bytes, which is no tar file.")


@contextlib.contextmanager
def _reader(archive: str, found: storage.Status) -> Iterator[Read]:
  """Yields a function that reads (start, length) of an archive."""
  if not storage.is_bucket(archive):
    with storage.readable(archive), open(archive, "rb", buffering=0) as stream:
      yield lambda start, length: os.pread(stream.fileno(), length, start)
    return
  first, window = 0, b""

  def read(start: int, length: int) -> bytes:
    nonlocal first, window
    if not first <= start <= start + length <= first + len(window):
      wanted = min(max(_WINDOW_BYTES, length), found.size - start)
      first = start
      window = storage.read_range(archive, start, wanted, generation=found.generation)
    return window[start - first :][:length]

  yield read
