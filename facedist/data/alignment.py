"""Makes a training image of a source image: decode, align or crop, encode.

Coordinates are (x, y) in pixels, y downwards; the centre of the first pixel is (0, 0).
"""

import dataclasses
import enum

import cv2
import numpy as np

from facedist import errors
from facedist.data import decoding

TEMPLATE_SIZE = 112
TEMPLATE = np.array(
  [
    [38.2946, 51.6963],  # eye on the left of the image
    [73.5318, 51.5014],  # eye on its right
    [56.0252, 71.7366],  # tip of the nose
    [41.5493, 92.3655],  # corner of the mouth, left
    [70.7299, 92.2041],  # corner of the mouth, right
  ]
)
"""Five landmarks in an aligned image of 112 x 112 pixels (arXiv:1801.07698)."""
_MAX_MISFIT = 11.0  # pixels, root mean square; 0.4% of VGGFace2's sample have more
_MAX_SIDES = 8  # a box larger than 8 image sides is a mistake and takes much memory


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
"""The text of each method in the builder's log."""


@dataclasses.dataclass(frozen=True)
class FaceSettings:
  """How faces are cut out and encoded.

  Attributes:
    size: Height and width of the training image in pixels.
    quality: JPEG quality, 1 to 100.
    margin: Fraction of a face box's longer side that is added to it.
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
    return Cut(place, warp_to_template(landmarks, size=size))
  return Cut(place, geometry[: 4 if place == Place.BOX else 0])


def make_face(source: bytes, cut: Cut, *, settings: FaceSettings) -> tuple[bytes, str]:
  """Makes the training image.

  A JPEG of the target size without landmarks or a box counts as aligned: its bytes are
  kept, because encoding it again would only lose quality. An image with an EXIF
  orientation is turned first and never kept: `cut` refers to the upright image, as
  detectors that read with OpenCV see it.

  Args:
    source: The source image's file, of any format that `decoding.decode` reads.
    cut: How to cut out the face, for the same size.
    settings: Size, quality and margin.

  Returns:
    The JPEG and the name of the method by which it was made.

  Raises:
    errors.DataError: The source cannot be decoded or has no face in that place.
  """
  size = settings.size
  if cut.place == Place.UNKNOWN and decoding.is_finished(source, size=size):
    return source, KEPT
  image = decoding.decode(source)
  method = METHODS[cut.place]
  if cut.place == Place.LANDMARKS:
    face = align(image, cut.numbers, size=size)
  elif cut.place == Place.BOX:
    face = crop_box(image, cut.numbers, size=size, margin=settings.margin)
  else:
    face = crop_centre(image, size=size)
    if image.shape[:2] == (size, size):  # a PNG, say, which counts as aligned too
      method = SIZE_KEPT
  return encode(face, quality=settings.quality), method


def encode(face: np.ndarray, *, quality: int) -> bytes:
  """Returns uint8[height, width, 3] BGR pixels as a JPEG of this quality, 1 to 100."""
  _, encoded = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, quality])
  return encoded.tobytes()


def template(size: int) -> np.ndarray:
  """Returns the landmarks' places in an image of `size` x `size`: float64[5, 2]."""
  return TEMPLATE * (size / TEMPLATE_SIZE)


def warp_to_template(landmarks: np.ndarray, *, size: int) -> np.ndarray:
  """Returns the similarity, float64[2, 3], that moves landmarks to the template.

  Args:
    landmarks: float[5, 2]; eyes, nose, corners of the mouth, in the template's order.
    size: Height and width of the aligned image in pixels.

  Raises:
    errors.DataError: The landmarks all coincide.
  """
  return similarity_transform(landmarks, template(size))


def similarity_transform(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """Finds the rotation, scale and shift that move `points` closest to `targets`.

  In the plane, with points z and targets w as complex numbers about their means, the
  least-squares w = a z has a = sum(conj(z) w) / sum(|z|^2); this is Umeyama's solution
  (doi:10.1109/34.88573, eq. 40-42) without a singular value decomposition. For a few
  points, Python's complex numbers are ten times as fast as arrays.

  Args:
    points: float[n, 2], pixels of the source.
    targets: float[n, 2], pixels of the target.

  Returns:
    float64[2, 3], as `cv2.warpAffine` takes it.

  Raises:
    errors.DataError: The points all coincide.
  """
  source = [complex(x, y) for x, y in points.tolist()]
  target = [complex(x, y) for x, y in targets.tolist()]
  source_mean, target_mean = sum(source) / len(source), sum(target) / len(target)
  product, spread = 0j, 0.0
  for z, w in zip(source, target, strict=True):
    centred = z - source_mean
    product += centred.conjugate() * w
    spread += centred.real * centred.real + centred.imag * centred.imag
  if not spread > 0:
    raise errors.DataError("the landmarks are all in one place")
  a = product / spread
  b = target_mean - a * source_mean
  return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def is_plausible(landmarks: np.ndarray) -> bool:
  """Says whether five points, float[5, 2] in pixels, can be those of a face.

  They cannot if one is exactly at 0,0, which means that it was not found; if all are
  within 2 pixels, as fractions of the image's size are; or if they fit the template
  badly.
  """
  if not landmarks.any(axis=1).all() or np.ptp(landmarks, axis=0).max() < 2:
    return False
  warp = warp_to_template(landmarks, size=TEMPLATE_SIZE)
  fitted = landmarks @ warp[:, :2].T + warp[:, 2]
  return float(np.sqrt(((fitted - TEMPLATE) ** 2).sum(1).mean())) <= _MAX_MISFIT


def align(image: np.ndarray, warp: np.ndarray, *, size: int) -> np.ndarray:
  """Warps a face onto the template; black where the source image ends.

  Args:
    image: uint8[height, width, 3].
    warp: float64[2, 3] from `warp_to_template` for the same size.
    size: Height and width of the result in pixels.

  Returns:
    uint8[size, size, 3].

  Raises:
    errors.DataError: The middle of the face lies outside the image.
  """
  (a, _, x), (b, _, y) = warp.tolist()
  middle = (complex(size / 2, size / 2) - complex(x, y)) / complex(a, b)
  if not (0 <= middle.real < image.shape[1] and 0 <= middle.imag < image.shape[0]):
    raise errors.DataError("the face lies outside the image")
  return cv2.warpAffine(image, warp, (size, size), flags=cv2.INTER_LINEAR)


def crop_box(
  image: np.ndarray, box: np.ndarray, *, size: int, margin: float
) -> np.ndarray:
  """Cuts the square about a face box and resizes it; black where the image ends.

  Args:
    image: uint8[height, width, 3].
    box: float[4]; left, top, width, height in pixels.
    size: Height and width of the result in pixels.
    margin: Fraction of the box's longer side that is added to it.

  Returns:
    uint8[size, size, 3].

  Raises:
    errors.DataError: The box is empty, outside the image or far larger than it.
  """
  x, y, width, height = (float(value) for value in box)
  if not (width > 0 and height > 0):
    raise errors.DataError("the face box is empty")
  side = max(1, round(max(width, height) * (1 + margin)))
  if side > _MAX_SIDES * max(image.shape[:2]):
    raise errors.DataError("the face box is far larger than the image")
  left, top = round(x + (width - side) / 2), round(y + (height - side) / 2)
  return _crop_square(image, (left, top), side=side, size=size)


def crop_centre(image: np.ndarray, *, size: int) -> np.ndarray:
  """Cuts the largest centred square and resizes it: uint8[size, size, 3]."""
  height, width = image.shape[:2]
  side = min(height, width)
  corner = ((width - side) // 2, (height - side) // 2)
  return _crop_square(image, corner, side=side, size=size)


def _crop_square(
  image: np.ndarray, corner: tuple[int, int], *, side: int, size: int
) -> np.ndarray:
  """Cuts a square that may reach over the image's edges, and resizes it."""
  (left, top), (height, width) = corner, image.shape[:2]
  rows = slice(max(top, 0), max(min(top + side, height), 0))
  columns = slice(max(left, 0), max(min(left + side, width), 0))
  inside = image[rows, columns]
  if inside.size == 0:
    raise errors.DataError("the face box lies outside the image")
  square = np.zeros((side, side, 3), np.uint8)
  y, x = rows.start - top, columns.start - left
  square[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
  interpolation = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
  return cv2.resize(square, (size, size), interpolation=interpolation)
