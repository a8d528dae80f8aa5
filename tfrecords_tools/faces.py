"""One source image to one training image: decode, align or crop, encode."""

import dataclasses
import enum

import cv2
import numpy as np

from facedist.data import images
from tfrecords_tools import alignment


class Place(enum.IntEnum):
  """What is known of where the face lies in a source image."""

  UNKNOWN = 0
  LANDMARKS = 1
  BOX = 2


CENTRE_CROP = "centre_crop"
METHODS: dict[int, str] = {
  Place.UNKNOWN: CENTRE_CROP,
  Place.LANDMARKS: "landmarks",
  Place.BOX: "bounding_box",
}
KEPT = "source_bytes_kept"
SIZE_KEPT = "source_size_kept"
IN_WORDS = {
  "landmarks": "aligned by landmarks",
  "bounding_box": "cut by a face box",
  CENTRE_CROP: "cut from the centre",
  KEPT: "kept as they are",
  SIZE_KEPT: "kept at their size",
}
"""What the builder's log says of each method."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
  """How to cut a face out of its source image.

  Attributes:
    place: What is known of where the face lies.
    numbers: float64[2, 3] warp to the template; or float32[4] left, top, width and
      height; or nothing.
  """

  place: int
  numbers: np.ndarray


def plan_cut(geometry: np.ndarray, place: int, *, size: int) -> Cut:
  """Returns how to cut a face.

  Args:
    geometry: float32[10] landmarks x1, y1, ..., y5, or left, top, width, height and
      padding, or padding alone, in pixels.
    place: The `Place` that says which.
    size: Height and width of the training image in pixels.

  Raises:
    errors.DataError: The landmarks all coincide.
  """
  if place == Place.LANDMARKS:
    landmarks = geometry.reshape(5, 2)
    return Cut(place, alignment.warp_to_template(landmarks, size=size))
  return Cut(place, geometry[: 4 if place == Place.BOX else 0])


def make_face(source: bytes, cut: Cut, *, settings: FaceSettings) -> tuple[bytes, str]:
  """Makes the training image.

  A JPEG that already has the target size and of whose face nothing is known counts as
  aligned: its bytes are kept, since encoding it again would only lose quality. An image
  whose EXIF data ask to turn it is turned first, and never kept: `cut` is of the
  upright image, as detectors that read with OpenCV see it.

  Args:
    source: The source image's file, of any kind that `images.decode` takes.
    cut: How to cut out the face, for the same size.
    settings: Size, quality and margin.

  Returns:
    The JPEG and the name of the method by which it was made.

  Raises:
    errors.DataError: The source cannot be decoded or has no face in that place.
  """
  size = settings.size
  if cut.place == Place.UNKNOWN and images.is_finished(source, size=size):
    return source, KEPT
  image = images.decode(source)
  method = METHODS[cut.place]
  if cut.place == Place.LANDMARKS:
    face = alignment.align(image, cut.numbers, size=size)
  elif cut.place == Place.BOX:
    face = alignment.crop_box(image, cut.numbers, size=size, margin=settings.margin)
  else:
    face = alignment.crop_centre(image, size=size)
    if image.shape[:2] == (size, size):  # a PNG, say, which counts as aligned too
      method = SIZE_KEPT
  _, encoded = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
  return encoded.tobytes(), method
