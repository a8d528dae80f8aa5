"""The images in a tar file: their names and places, read by offset without extraction.

`tarfile` reads the headers. An archive may be wrong or hostile, so an image must be a
regular file whose content lies in the archive in one piece: a link, a device, a sparse
file, or an absolute or climbing name under an image's name is an error. Other members
are skipped.

A local archive is read header by header; an archive in a bucket is read from end to
end, in ranges of 8 MiB, by every task that plans with it. For many tasks, copy it to a
shared disk or unpack it in the bucket.
"""

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from facedist import errors, storage
from facedist.data import image_names

_RANGE_BYTES = 8 << 20  # of a bucket's archive, read at a time
_MAX_TAIL_BYTES = 1 << 20  # zeros with which tar fills up its last record
_MAX_SIDECAR_BYTES = 1 << 20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_KINDS = {
  tarfile.LNKTYPE: "a hard link",
  tarfile.SYMTYPE: "a symbolic link",
  tarfile.CHRTYPE: "a device",
  tarfile.BLKTYPE: "a device",
  tarfile.FIFOTYPE: "a pipe",
}


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in an archive: its path, its first byte and its length in bytes.

  `content` is None for an image, and the bytes of a sidecar.
  """

  path: str
  start: int
  length: int
  content: bytes | None = None


def members(
  archive: str, names: image_names.NameFilter, *, sidecars: tuple[str, ...] = ()
) -> Iterator[Member]:
  """Yields the images of a tar file, local or in a bucket, in the archive's order.

  Args:
    archive: The file.
    names: Says which members are taken, and counts the others.
    sidecars: Endings of other files that are yielded too, with their content.

  Raises:
    errors.DataError: It is no uncompressed tar file, is corrupt or cut off, or holds an
      image that is not a regular file.
  """
  found = storage.status(archive)
  size = found.size
  with storage.readable(archive), open_archive(archive, found) as stream:
    _check_is_tar(archive, stream.read(tarfile.BLOCKSIZE))
    stream.seek(0)
    position = 0
    try:
      with tarfile.TarFile(fileobj=stream, errors="backslashreplace") as tar:
        while (info := tar.next()) is not None:
          position = info.offset
          tar.members = []  # type: ignore[attr-defined]  # it would hold every one
          if not 0 <= info.size <= size - info.offset_data:
            raise tarfile.ReadError(f"{info.name!r} is cut off by the archive's end")
          if info.isreg() and info.name.lower().endswith(sidecars):
            yield _sidecar(info, stream, archive=archive)
          elif path := _image_path(info, archive, names=names):
            yield Member(path, info.offset_data, info.size)
        position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
      raise errors.DataError(
        f"{archive}, byte {position}: {error}; it is corrupt or no tar file."
      ) from error
    stream.seek(position)
    # `tarfile` takes a wrong header after the first for the archive's end.
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
      raise errors.DataError(
        f"{archive}, byte {position}: the header is wrong; the archive is corrupt."
      )
    if size - position > _MAX_TAIL_BYTES:
      raise errors.DataError(
        f"{archive}, byte {position}: it continues after its end mark; give archives "
        "that were joined one by one."
      )


def _image_path(
  info: tarfile.TarInfo, archive: str, *, names: image_names.NameFilter
) -> str | None:
  """Returns the path of an image; None for another member."""
  path = _cleaned(info.name)
  if info.isdir() or not names.takes(path):
    return None
  if info.name.startswith("/") or ".." in path.split("/"):
    raise errors.DataError(
      f"{archive}: the name {info.name!r} leads out of the archive; leave that image "
      "out."
    )
  if any(ord(letter) < 32 for letter in info.name):
    raise errors.DataError(f"{archive}: the name {info.name!r} has control characters.")
  if info.issparse() or info.type not in tarfile.REGULAR_TYPES:
    kind = "a sparse file" if info.issparse() else _KINDS.get(info.type, "no file")
    raise errors.DataError(
      f"{archive}: {info.name!r} is {kind}; archives must hold images as regular files."
    )
  return path


def _sidecar(info: tarfile.TarInfo, stream: BinaryIO, *, archive: str) -> Member:
  """Returns a file beside an image, with its content."""
  if info.size > _MAX_SIDECAR_BYTES:
    raise errors.DataError(
      f"{archive}: {info.name!r} has {info.size} bytes, too many for a label."
    )
  stream.seek(info.offset_data)
  content = stream.read(info.size)
  return Member(_cleaned(info.name), info.offset_data, info.size, content)


def _cleaned(name: str) -> str:
  """Returns a member's name without empty parts and dots."""
  return "/".join(part for part in name.split("/") if part not in ("", "."))


def _check_is_tar(archive: str, start: bytes) -> None:
  """Raises DataError for what a tar file is often mistaken for."""
  if start.startswith(_COMPRESSED):
    raise errors.DataError(
      f"{archive} is compressed, so no image can be read by its offset; unpack it to a "
      "plain .tar first, such as with gunzip (JPEGs hardly shrink anyway)."
    )
  if kind := storage.kind_of_text(start):
    raise errors.DataError(f"{archive} is {kind}.")
  if len(start) < tarfile.BLOCKSIZE:
    raise errors.DataError(f"{archive} has {len(start)} bytes, which is no tar file.")


def open_archive(archive: str, found: storage.Status) -> BinaryIO:
  """Opens an archive for reading, local or in a bucket."""
  if storage.is_bucket(archive):
    raw = _BucketFile(archive, found)
    return cast(BinaryIO, io.BufferedReader(raw, buffer_size=_RANGE_BYTES))
  return open(archive, "rb")


class _BucketFile(io.RawIOBase):
  """One generation of a bucket's object as a file to read from any position."""

  def __init__(self, path: str, found: storage.Status) -> None:
    self._path, self._position = path, 0
    self._size, self._generation = found

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
    self._position = start[whence] + offset
    return self._position

  def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
    length = max(0, min(len(buffer), self._size - self._position))
    if length:
      buffer[:length] = storage.read_range(
        self._path, self._position, length, generation=self._generation
      )
      self._position += length
    return length
