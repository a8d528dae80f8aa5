"""Decodes images, of source files and of records, to upright pixels.

Cameras write into an image how to turn it upright (the EXIF orientation, EXIF 2.32, tag
0x0112). It is read and applied here for both decoders: OpenCV, which reads files of all
kinds, and simplejpeg, which reads records into a batch. Both use libjpeg-turbo, so a
file and a record of the same bytes give the same pixels.
"""

import cv2
import numpy as np
import simplejpeg

from facedist import errors, storage

UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_ENTRY_BYTES = 12
_SHORT = 3  # the tag's type
_JPEG, _PNG, _RIFF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"
_OTHERS = ((_PNG, "a PNG"), (_RIFF, "a WebP"), (b"GIF8", "a GIF"), (b"BM", "a BMP"))
_EXIF = b"Exif\0\0"
_APP1, _COMMENT = 0xE1, 0xFE


def decode(content: bytes) -> np.ndarray:
  """Decodes an image file of any kind in `image_names.ENDINGS`.

  Transparency is dropped (TIFF's is blended with black), 16 bits become 8, and the
  first of several pictures is used.

  Returns:
    uint8[height, width, 3], BGR as OpenCV has it, upright.

  Raises:
    errors.DataError: It is empty, cut off, no image, or too large for OpenCV.
  """
  if not content:
    raise errors.DataError("the file is empty")
  flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
  except cv2.error as error:  # such as more pixels than OpenCV's limit
    raise errors.DataError(f"OpenCV cannot decode it ({error.err})") from error
  if image is None:
    kind = storage.kind_of(content)
    raise errors.DataError(f"it is {kind or 'cut off or not an image'}")
  return np.ascontiguousarray(turned(image, orientation(content)))


def decode_record(jpeg: bytes | memoryview, image: np.ndarray) -> None:
  """Decodes a record's JPEG into `image`, upright.

  Args:
    jpeg: The encoded image.
    image: uint8[S, S, 3] RGB, which is written to.

  Raises:
    errors.DataError: It is not a JPEG, broken, or not of S x S pixels.
  """
  try:
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=image)
  except ValueError as error:
    raise _bad_record(jpeg, len(image), str(error)) from error
  if pixels.shape != image.shape:
    raise _bad_record(jpeg, len(image), "other size")
  wanted = orientation_of_jpeg(jpeg)
  if wanted != UPRIGHT:
    image[:] = turned(image.copy(), wanted)


def jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
  """Returns a JPEG's height and width in pixels, as stored, from its header.

  Raises:
    errors.DataError: It is no JPEG.
  """
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
  except ValueError as error:
    head = bytes(jpeg[: storage.HEAD_BYTES])
    others = (kind for start, kind in _OTHERS if head.startswith(start))
    kind = next(others, None) or storage.kind_of(head)
    reason = f"it is {kind}" if kind else error
    raise errors.DataError(f"not a JPEG ({reason})") from error
  return height, width


def is_finished(content: bytes, *, size: int) -> bool:
  """Says whether a file can be stored in a record without being encoded again.

  It must be a valid, upright colour JPEG of `size` x `size` pixels. It is checked with
  the decoder of records, which is stricter than OpenCV's.
  """
  if not content.startswith(_JPEG) or orientation_of_jpeg(content) != UPRIGHT:
    return False
  try:
    height, width, colour_space, _ = simplejpeg.decode_jpeg_header(content)
    if (height, width, colour_space) != (size, size, "YCbCr"):
      return False
    simplejpeg.decode_jpeg(content)
  except ValueError:
    return False
  return True


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
  """Turns stored pixels upright; returns a view.

  Args:
    image: [height, width, channels].
    orientation: EXIF's, 1 to 8: the sides where row 0 and column 0 of `image` belong.
  """
  if orientation >= 5:
    image = image.transpose(1, 0, 2)
  if orientation in (2, 3, 6, 7):
    image = image[:, ::-1]
  if orientation in (3, 4, 7, 8):
    image = image[::-1]
  return image


def orientation(content: bytes) -> int:
  """Returns the EXIF orientation in a file, 1 to 8; 1 if it has none.

  A TIFF file's own tag counts as 1 here, because OpenCV always applies it.
  """
  if content.startswith(_JPEG):
    return orientation_of_jpeg(content)
  if content.startswith(_PNG):
    return _orientation_of_png(content)
  if content.startswith(_RIFF) and content[8:12] == b"WEBP":
    return _orientation_of_webp(content)
  return UPRIGHT


def orientation_of_jpeg(jpeg: bytes | memoryview) -> int:
  """Returns `orientation` of a JPEG.

  Only the segments before the picture are read; most records have one. It takes less
  than a hundredth of the time of decoding.
  """
  at, end = 2, len(jpeg) - 4
  while at < end and jpeg[at] == 0xFF:
    marker = jpeg[at + 1]
    if marker == 0xFF:  # markers may have any number of these before them
      at += 1
      continue
    if marker & 0xF0 != 0xE0 and marker != _COMMENT:
      break
    length = jpeg[at + 2] << 8 | jpeg[at + 3]
    if marker == _APP1 and jpeg[at + 4 : at + 10] == _EXIF:
      return _of_exif(bytes(jpeg[at + 10 : at + 2 + length]))
    at += 2 + length
  return UPRIGHT


def _orientation_of_png(png: bytes) -> int:
  """Returns `orientation` of a PNG file: chunks of length, name, content, checksum."""
  at = len(_PNG)
  while at + 12 <= len(png):
    length = int.from_bytes(png[at : at + 4], "big")
    if png[at + 4 : at + 8] == b"eXIf":
      return _of_exif(png[at + 8 : at + 8 + length])
    at += 12 + length
  return UPRIGHT


def _orientation_of_webp(webp: bytes) -> int:
  """Returns `orientation` of a WebP file: chunks of name, length, content, padding."""
  at = 12
  while at + 8 <= len(webp):
    length = int.from_bytes(webp[at + 4 : at + 8], "little")
    if webp[at : at + 4] == b"EXIF":
      return _of_exif(webp[at + 8 : at + 8 + length].removeprefix(_EXIF))
    at += 8 + length + length % 2
  return UPRIGHT


def _of_exif(block: bytes) -> int:
  """Returns the orientation in EXIF data, a TIFF file; 1 if it has none."""
  order = {b"II*\0": "little", b"MM\0*": "big"}.get(block[:4])
  if order is None:
    return UPRIGHT

  def number(at: int, length: int) -> int:
    return int.from_bytes(block[at : at + length], order)  # type: ignore[arg-type]

  directory = number(4, 4)
  count = min(number(directory, 2), len(block) // _ENTRY_BYTES)
  for entry in range(directory + 2, directory + 2 + _ENTRY_BYTES * count, _ENTRY_BYTES):
    if (number(entry, 2), number(entry + 2, 2)) == (_ORIENTATION_TAG, _SHORT):
      value = number(entry + 8, 2)
      return value if 1 <= value <= 8 else UPRIGHT
  return UPRIGHT


def _bad_record(jpeg: bytes | memoryview, size: int, reason: str) -> errors.DataError:
  """Returns the error of a record's image that does not decode to the right size."""
  try:
    height, width = jpeg_size(jpeg)
  except errors.DataError:
    return errors.DataError(f"not a JPEG ({reason})")
  if height == width == size:
    return errors.DataError(f"broken JPEG ({reason})")
  return errors.DataError(
    f"the image has {width}x{height} pixels, but the manifest says {size}x{size}"
  )
