"""Draws one face: a person under given circumstances becomes pixels and landmarks.

The parts are polygons on curved surfaces, in head units. One rotation of all their
points gives pose and parallax; OpenCV fills them at twice the size; a small map of
light and soft shades is multiplied in; then come the camera's faults.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from tfrecords_tools import face_covers, face_features, face_photo
from tfrecords_tools.face_identity import Identity
from tfrecords_tools.face_nuisance import Frame, Nuisance, Pose
from tfrecords_tools.face_sketch import FACE_DEPTH, Depth, Line, Sketch, in_space

_OVERSAMPLING = 2  # the canvas is this much larger than the image
_MAP_REDUCTION = 2  # the map of light is this much smaller than the image
_FRACTION_BITS = 4  # of the coordinates given to OpenCV
_PERSPECTIVE = 0.12  # how much larger a point one head unit nearer is
_SHADE_SOFTNESS = 0.035  # standard deviation in head units


@dataclasses.dataclass(frozen=True)
class Drawing:
  """One picture and where the face is in it.

  Attributes:
    image: uint8[height, width, 3], RGB.
    landmarks: float32[5, 2] of x, y in pixels, the centre of the first pixel being
      (0, 0): left eye, right eye, tip of the nose, left and right corner of the mouth,
      left as seen in the image.
    box: x, y, width, height of the face in whole pixels.
  """

  image: np.ndarray
  landmarks: np.ndarray
  box: tuple[int, int, int, int]


def draw(identity: Identity, nuisance: Nuisance) -> Drawing:
  """Draws the person; equal arguments give equal pixels."""
  frame = nuisance.frame
  rng = np.random.default_rng(nuisance.scene)
  sketch = _sketch(identity, nuisance)
  rotation = rotation_matrix(nuisance.pose)

  def place(lines: Sequence[Line]) -> np.ndarray:
    return project(in_space(lines, cheek=sketch.cheek), rotation, frame)

  canvas = face_photo.background(
    rng, height=_OVERSAMPLING * frame.height, width=_OVERSAMPLING * frame.width
  )
  pixels = place(sketch.lines)
  _fill(canvas, sketch, pixels)
  shades = place([line for line, _ in sketch.shades])
  factors = _light_map(sketch, nuisance, silhouette=pixels, shades=shades)
  image = face_photo.lit(canvas, factors)
  size = (frame.width, frame.height)
  image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  image = face_photo.toned(image, nuisance.light)
  outline = face_features.head_outline(identity)
  below_hair = outline[outline[:, 1] > -0.75]
  landmarks = place(face_features.landmarks(identity, nuisance.expression))
  return Drawing(
    image=face_photo.photographed(image, nuisance.camera, rng),
    landmarks=landmarks.astype(np.float32),
    box=_box(place([(below_hair, Depth.RIM, 0.0)])),
  )


def rotation_matrix(pose: Pose) -> np.ndarray:
  """Returns float[3, 3], which turns column vectors: yaw, then pitch, then roll."""
  sin, cos = np.sin, np.cos
  yaw, pitch, roll = pose.yaw, pose.pitch, pose.roll
  turn = np.array([(cos(yaw), 0, sin(yaw)), (0, 1, 0), (-sin(yaw), 0, cos(yaw))])
  nod = np.array([(1, 0, 0), (0, cos(pitch), sin(pitch)), (0, -sin(pitch), cos(pitch))])
  tilt = np.array([(cos(roll), -sin(roll), 0), (sin(roll), cos(roll), 0), (0, 0, 1)])
  return np.asarray(tilt @ nod @ turn)


def project(points: np.ndarray, rotation: np.ndarray, frame: Frame) -> np.ndarray:
  """Returns float[n, 2]: where points in head units, float[n, 3], lie in pixels."""
  turned = points @ rotation.T
  nearness = frame.scale * (1 + _PERSPECTIVE * (turned[:, 2:] - FACE_DEPTH))
  return np.asarray(turned[:, :2] * nearness + (frame.center_x, frame.center_y))


def _sketch(identity: Identity, nuisance: Nuisance) -> Sketch:
  """Lists all patches from the back to the front."""
  sketch = Sketch(cheek=identity.head.cheek)
  expression = nuisance.expression
  face_features.add_body(sketch, identity, nuisance.cloth)
  face_covers.add_back_hair(sketch, identity)
  face_features.add_head(sketch, identity, expression)
  face_features.add_marks(sketch, identity, expression)
  face_covers.add_beard(sketch, identity, expression)
  face_features.add_mouth(sketch, identity, expression)
  face_features.add_eyes(sketch, identity, expression)
  light_x = float(nuisance.light.direction[0])
  face_features.add_nose(sketch, identity, light_x=light_x)
  face_features.add_brows(sketch, identity, expression)
  face_covers.add_hair(sketch, identity)
  face_covers.add_cover(sketch, identity, nuisance)
  return sketch


def _fill(canvas: np.ndarray, sketch: Sketch, pixels: np.ndarray) -> None:
  """Fills every patch into `canvas`, the later ones over the earlier."""
  polygons = _polygons(pixels, sketch.patch_sizes(), scale=_OVERSAMPLING)
  for polygon, (_, color) in zip(polygons, sketch.patches, strict=True):
    cv2.fillPoly(canvas, [polygon], color, cv2.LINE_AA, _FRACTION_BITS)


def _light_map(
  sketch: Sketch, nuisance: Nuisance, *, silhouette: np.ndarray, shades: np.ndarray
) -> np.ndarray:
  """Returns float32[h, w], small: by how much each region is lit; 1 off the person.

  Args:
    sketch: The patches and shades.
    nuisance: Frame and light.
    silhouette: float[n, 2], pixels of all points of the patches.
    shades: float[n, 2], pixels of all points of the shades.
  """
  frame, scale = nuisance.frame, 1 / _MAP_REDUCTION
  lit = face_photo.round_light(nuisance.light, frame, reduction=_MAP_REDUCTION)
  mask: np.ndarray = np.zeros(lit.shape, np.uint8)
  polygons = _polygons(silhouette, sketch.patch_sizes(), scale=scale)
  for polygon, is_outer in zip(polygons, sketch.are_outer(), strict=True):
    if is_outer:
      cv2.fillPoly(mask, [polygon], (255,), cv2.LINE_AA, _FRACTION_BITS)
  soft: np.ndarray = np.full(lit.shape, 128, np.uint8)
  sizes = [len(points) for (points, _, _), _ in sketch.shades]
  polygons = _polygons(shades, sizes, scale=scale)
  for polygon, (_, factor) in zip(polygons, sketch.shades, strict=True):
    cv2.fillPoly(soft, [polygon], (128 * factor,), cv2.LINE_8, _FRACTION_BITS)
  soft = cv2.GaussianBlur(soft, (0, 0), _SHADE_SOFTNESS * frame.scale * scale)
  relief = lit * soft * np.float32(1 / 128) - 1
  return np.asarray(1 + relief * mask * np.float32(1 / 255), np.float32)


def _polygons(
  pixels: np.ndarray, sizes: Sequence[int], *, scale: float
) -> list[np.ndarray]:
  """Cuts float[n, 2] into one int32[size, 2] a polygon, in OpenCV's fixed point.

  Args:
    pixels: Points in the image.
    sizes: Points of each polygon.
    scale: Size of what is drawn on, in image sizes.
  """
  scaled = (pixels + 0.5) * scale - 0.5  # pixels' corners, not centres, coincide
  fixed = np.rint(scaled * (1 << _FRACTION_BITS)).astype(np.int32)
  ends = itertools.accumulate(sizes)
  return [fixed[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _box(pixels: np.ndarray) -> tuple[int, int, int, int]:
  """Returns x, y, width, height of the smallest box of whole pixels."""
  left, top = np.floor(pixels.min(axis=0)).astype(int)
  right, bottom = np.ceil(pixels.max(axis=0)).astype(int)
  return int(left), int(top), int(right - left), int(bottom - top)
