"""One source image to one training image: decode, align or crop, encode."""

import dataclasses
import enum

import cv2
import numpy as np
import simplejpeg

from facedist import errors
from tfrecords_tools import alignment


class Place(enum.IntEnum):
  """What is known of where the face lies in a source image."""

  UNKNOWN = 0
  LANDMARKS = 1
  BOX = 2


METHODS: dict[int, str] = {
  Place.UNKNOWN: "centre_crop",
  Place.LANDMARKS: "landmarks",
  Place.BOX: "bounding_box",
}
KEPT = "source_bytes_kept"


@dataclasses.dataclass(frozen=True)
class FaceSettings:
  """How faces are cut out and encoded.

  Attributes:
    size: Height and width of the training image in pixels.
    quality: JPEG quality, 1 to 100.
    margin: Share of a face box's longer side that is added to it.
  """

  size: int
  quality: int
  margin: float


def make_face(
  source: bytes, geometry: np.ndarray, *, place: int, settings: FaceSettings
) -> tuple[bytes, str]:
  """Makes the training image.

  A JPEG that already has the target size and of whose face nothing is known counts as
  aligned: its bytes are kept, since encoding it again would only lose quality.

  Args:
    source: The source image's file: JPEG (colour, grey, CMYK), PNG.
    geometry: float[10] landmarks x1, y1, ..., y5 or left, top, width, height and
      padding, by `place`, in pixels of the image as stored: a rotation that its EXIF
      data ask for is not applied.
    place: The `Place` that says what `geometry` holds.
    settings: Size, quality and margin.

  Returns:
    The JPEG and the name of the method by which it was made.

  Raises:
    errors.DataError: The source cannot be decoded or the geometry makes no sense.
  """
  if place == Place.UNKNOWN and _is_finished(source, settings.size):
    return source, KEPT
  image = _decode(source)
  if place == Place.LANDMARKS:
    face = alignment.align(image, geometry.reshape(5, 2), size=settings.size)
  elif place == Place.BOX:
    face = alignment.crop_box(
      image, geometry[:4], size=settings.size, margin=settings.margin
    )
  else:
    face = alignment.crop_centre(image, size=settings.size)
  _, encoded = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
  return encoded.tobytes(), METHODS[place]


def _decode(source: bytes) -> np.ndarray:
  """Returns uint8[height, width, 3], BGR; DataError if that is not possible."""
  if not source:
    raise errors.DataError("the file is empty")
  flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    image = cv2.imdecode(np.frombuffer(source, np.uint8), flags)
  except cv2.error as error:  # such as more pixels than OpenCV's limit
    raise errors.DataError(f"OpenCV cannot decode it ({error.err})") from error
  if image is None:
    raise errors.DataError("it is cut off or not an image")
  return image


def _is_finished(source: bytes, size: int) -> bool:
  """Says whether `source` is a sound colour JPEG of exactly the target size.

  The decoder is that of the shards' readers, which is stricter than OpenCV's.
  """
  if not source.startswith(b"\xff\xd8"):
    return False
  try:
    height, width, colour_space, _ = simplejpeg.decode_jpeg_header(source)
    if (height, width, colour_space) != (size, size, "YCbCr"):
      return False
    simplejpeg.decode_jpeg(source)
  except ValueError:
    return False
  return True
