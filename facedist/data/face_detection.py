"""Finds the face in a photo with its five landmarks, so that it can be aligned.

Two detectors are known: MTCNN (arXiv:1604.02878), of the package `mtcnn`, and OpenCV's
YuNet (doi:10.1007/s11633-023-1423-y), whose model file the user brings. They are loaded
when a `FaceFinder` is made, not before.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np

from facedist import errors, storage
from facedist.config import setting
from facedist.data import alignment

LARGEST, CENTRAL = "largest", "central"
NO_FACE = "no face was found"
_SIDES = (224, 1280, 112)
"""Longer sides, in pixels, to which an image is shrunk for each look. The first one
finds most faces, many times as fast as the second; the last is for blurred ones."""
_SMALL_FACE = 48  # pixels; a smaller one in the first look is looked at again
_MTCNN_MIN_FACE = 20  # pixels; with more, the pyramid of mtcnn 1.0 fails as "no face"
_YUNET_COLUMNS = 15  # box, five points, score


class NoFaceError(errors.DataError):
  """An image in which no face was found, or none that can be aligned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorSettings:
  """Which detector finds faces, and which of several faces is taken."""

  yunet: str | None = setting(
    None,
    heading="Finding faces",
    help="Model file of OpenCV's YuNet, such as face_detection_yunet_2023mar.onnx, "
    "which then finds the faces; the package mtcnn does if not given.",
    path=True,
  )
  face: str = setting(
    LARGEST,
    help="Which of several faces: the one with the largest box, or the one whose box "
    "is closest to the middle of the image.",
    choices=(LARGEST, CENTRAL),
  )


@dataclasses.dataclass(frozen=True)
class DetectedFace:
  """A face that a detector found; coordinates as in `alignment`.

  Attributes:
    box: float32[4]; left, top, width and height in pixels.
    landmarks: float32[5, 2] in pixels; the eye on the image's left, the other eye, tip
      of the nose, the mouth's corner on the left, the other one.
    score: The detector's confidence, in [0, 1].
  """

  box: np.ndarray
  landmarks: np.ndarray
  score: float


Detect = Callable[[np.ndarray], Sequence[DetectedFace]]
"""Finds all faces of an image, uint8[height, width, 3] BGR; in any thread."""


class FaceFinder:
  """Finds the one face of an image that is wanted.

  Args:
    detect: Finds all faces.
    name: The detector's name and version, for outputs.
    choice: LARGEST or CENTRAL.
  """

  def __init__(self, detect: Detect, *, name: str, choice: str = LARGEST) -> None:
    self._detect, self._choice = detect, choice
    self.name = name

  @property
  def facts(self) -> dict[str, str]:
    """What an output says of its images' alignment."""
    return {"template": "arcface", "detector": self.name, "face": self._choice}

  def find(self, image: np.ndarray) -> tuple[DetectedFace, int]:
    """Returns the face that is wanted, and how many were found.

    A large image is shrunk, because detectors take time in proportion to its pixels.
    If no face is found, or only a small one, it is looked at again in more detail.

    Args:
      image: uint8[height, width, 3] BGR, upright, as `decoding.decode` returns it.

    Raises:
      NoFaceError: There is none.
    """
    best, count = None, 0
    longest = max(image.shape[:2])
    scales = dict.fromkeys(min(1.0, side / longest) for side in _SIDES)
    for look, scale in enumerate(scales):
      faces = _detected(image, self._detect, scale)
      if faces:
        best, count = self._chosen(faces, image), len(faces)
      if best and (look or max(best.box[2:]) * scale >= _SMALL_FACE):
        break
    if best is None:
      raise NoFaceError(NO_FACE)
    return best, count

  def aligned(self, image: np.ndarray, *, size: int) -> tuple[np.ndarray, int]:
    """Returns the face on the template, uint8[size, size, 3], and how many were found.

    Args:
      image: As for `find`.
      size: Height and width of the result in pixels.

    Raises:
      NoFaceError: There is none, or it lies outside the image.
    """
    face, count = self.find(image)
    return align(image, face, size=size), count

  def _chosen(self, faces: Sequence[DetectedFace], image: np.ndarray) -> DetectedFace:
    """Returns the largest or the most central face; of two alike the surer one."""
    middle = np.array(image.shape[1::-1]) / 2

    def rank(face: DetectedFace) -> tuple[float, float]:
      if self._choice == LARGEST:
        return float(face.box[2] * face.box[3]), face.score
      distance = np.linalg.norm(face.box[:2] + face.box[2:] / 2 - middle)
      return -float(distance), face.score

    return max(faces, key=rank)


def align(image: np.ndarray, face: DetectedFace, *, size: int) -> np.ndarray:
  """Warps a face onto the template: uint8[size, size, 3].

  Raises:
    NoFaceError: The landmarks cannot be a face's: they coincide or lie outside.
  """
  try:
    warp = alignment.warp_to_template(face.landmarks, size=size)
    return alignment.align(image, warp, size=size)
  except errors.DataError as error:
    raise NoFaceError(f"{NO_FACE} that can be aligned: {error}") from error


def load(settings: DetectorSettings) -> FaceFinder:
  """Loads the detector of the flags; MTCNN takes some seconds.

  Raises:
    errors.UsageError: The package mtcnn is needed, but not installed.
    errors.DataError: --yunet is no model that OpenCV can load.
  """
  name = detector_name(settings)
  if settings.yunet is None:
    return FaceFinder(Mtcnn(), name=name, choice=settings.face)
  content = np.frombuffer(storage.read_bytes(settings.yunet), np.uint8)
  try:
    model = cv2.FaceDetectorYN.create(
      "onnx", content, np.empty(0, np.uint8), (320, 320)
    )
  except cv2.error as error:
    raise errors.DataError(
      f"--yunet={settings.yunet} is no network that OpenCV can load; give the "
      "file face_detection_yunet_2023mar.onnx of OpenCV's model zoo."
    ) from error
  return FaceFinder(YuNet(model), name=name, choice=settings.face)


def detector_name(settings: DetectorSettings) -> str:
  """Returns the detector's name with its version, or its file's CRC-32C.

  Raises:
    errors.UsageError: The package mtcnn is needed, but not installed.
  """
  if settings.yunet is not None:
    checksum = storage.crc32c_of(storage.read_bytes(settings.yunet))
    return f"{os.path.basename(settings.yunet)} {checksum:08x}"
  if not importlib.util.find_spec("mtcnn"):
    raise errors.UsageError(
      "faces are found with the package mtcnn, which is not installed: pip install "
      "'facedist[align]', or give --yunet=FILE, the model of OpenCV's YuNet."
    )
  return f"mtcnn {importlib.metadata.version('mtcnn')}"


class Mtcnn:
  """MTCNN of the package `mtcnn`, on the CPU.

  One image at a time: in a batch, mtcnn 1.0 shifts the faces of images that follow one
  without a face (its padding is undone for the wrong image), and is no faster.
  """

  def __init__(self) -> None:
    import mtcnn
    import tensorflow as tf

    with _without_unraisable():
      self._model = mtcnn.MTCNN()
    for stage, size in zip(self._model.stages, (None, 24, 48), strict=True):
      # Most of its time passes in Keras between the layers; a graph takes half of it.
      pixels = tf.TensorSpec([None, size, size, 3], tf.float32)
      graph = tf.function(stage.model.call, input_signature=[pixels])
      stage.model.call = lambda images, *_, graph=graph, **__: graph(images)

  def __call__(self, image: np.ndarray) -> list[DetectedFace]:
    """Finds all faces; see `Detect`."""
    # Its JSON output would round the landmarks to pixels.
    rows = self._model.detect_faces(
      cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
      min_face_size=_MTCNN_MIN_FACE,
      output_type="numpy",
    )
    return [
      DetectedFace(
        box=row[1:5].astype(np.float32),
        landmarks=row[6:16].reshape(2, 5).T.astype(np.float32),
        score=float(row[5]),
      )
      for row in rows
    ]


@contextlib.contextmanager
def _without_unraisable() -> Iterator[None]:
  """Keeps quiet about errors in finalisers: lz4 closes a closed file on Python 3.13."""
  before = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: None
  try:
    yield
  finally:
    sys.unraisablehook = before


class YuNet:
  """YuNet in OpenCV.

  Args:
    model: Has `setInputSize` and `detect`, as `cv2.FaceDetectorYN` does.
  """

  def __init__(self, model: cv2.FaceDetectorYN) -> None:
    self._model = model
    self._lock = threading.Lock()  # the model holds the size of the image

  def __call__(self, image: np.ndarray) -> list[DetectedFace]:
    """Finds all faces; see `Detect`."""
    with self._lock:
      self._model.setInputSize((image.shape[1], image.shape[0]))
      _, rows = self._model.detect(image)
    if rows is None:
      return []
    # A person's right eye, which YuNet names first, is on the image's left.
    return [
      DetectedFace(row[:4], row[4:14].reshape(5, 2), float(row[14]))
      for row in rows.reshape(-1, _YUNET_COLUMNS).astype(np.float32)
    ]


def _detected(image: np.ndarray, detect: Detect, scale: float) -> list[DetectedFace]:
  """Finds faces in a shrunk copy of an image; their coordinates are the image's."""
  if scale == 1:
    return list(detect(image))
  height, width = image.shape[:2]
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  factor = np.array([width / size[0], height / size[1]], np.float32)
  return [
    DetectedFace(  # the centre of the first pixel is (0, 0)
      box=np.concatenate([(face.box[:2] + 0.5) * factor - 0.5, face.box[2:] * factor]),
      landmarks=(face.landmarks + 0.5) * factor - 0.5,
      score=face.score,
    )
    for face in detect(shrunk)
  ]
