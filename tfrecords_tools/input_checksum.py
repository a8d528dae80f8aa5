"""One number for a build's input, made in one pass over it."""

import google_crc32c

from tfrecords_tools import source

_ZEROS = bytes(1 << 20)


class InputChecksum:
  """CRC-32C of all paths, then all places, then all geometry, in one pass over them."""

  def __init__(self) -> None:
    self._paths = self._places = self._geometry = self._num_images = 0

  def add(self, group: source.Group) -> None:
    """Adds the images that come next."""
    text = "\n".join(group.paths).encode()
    text = b"\n" + text if self._num_images else text
    extend = google_crc32c.extend
    self._paths = extend(self._paths, text)
    self._places = extend(self._places, group.rows["place"].tobytes())
    self._geometry = extend(self._geometry, group.rows["geometry"].tobytes())
    self._num_images += len(group.paths)

  @property
  def value(self) -> int:
    """The CRC-32C of the three, one after another."""
    geometry = source.ROW_DTYPE["geometry"].itemsize * self._num_images
    checksum = _crc_of_both(self._paths, self._places, self._num_images)
    return _crc_of_both(checksum, self._geometry, geometry)


def _crc_of_both(first: int, second: int, second_bytes: int) -> int:
  """Returns the CRC of two contents, one after the other, from the CRC of each.

  A CRC is affine: crc(AB) = crc(A0) ^ crc(0) ^ crc(B), with as many zeros as B is long.
  """
  zeros = 0
  while second_bytes:
    part = _ZEROS[: min(second_bytes, len(_ZEROS))]
    first, zeros = (google_crc32c.extend(crc, part) for crc in (first, zeros))
    second_bytes -= len(part)
  return first ^ zeros ^ second
