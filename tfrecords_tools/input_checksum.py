"""One number for a build's input, made in one pass over it."""

import google_crc32c

from tfrecords_tools import checksums, source


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
    combine = checksums.combine
    checksum = combine(self._paths, self._places, length=self._num_images)
    return combine(checksum, self._geometry, length=geometry)
