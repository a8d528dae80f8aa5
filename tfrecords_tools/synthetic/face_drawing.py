"""Draws one face: from an identity and the image's circumstances to pixels.

The parts of a face (head, eyes, hair, glasses and so on) are added to a sketch: they
are polygons on curved surfaces, in head units. One rotation of all their points gives
pose and parallax. OpenCV fills them at twice the size, a small map of light and soft
shades is multiplied in, and the camera's faults come last.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from tfrecords_tools.synthetic.face_identity import (
  Camera,
  Expression,
  Frame,
  Identity,
  Light,
  Nuisance,
  Pose,
)
from tfrecords_tools.synthetic.sketch import (
  FACE_DEPTH,
  Color,
  Depth,
  Line,
  Sketch,
  arc,
  closed_curve,
  ellipse,
  in_space,
  mixed,
  open_curve,
  scaled,
  stroke,
)

_EYE_T = np.linspace(-1, 1, 13)
_LIPS_LIFT = 0.04
_LIGHT_ONE = 128  # 8-bit light factor that changes nothing
_HALF_HEAD = (0.0, -1.0), (0.30, -0.94), (0.55, -0.72)


def head_outline(identity: Identity, *, drop: float = 0.0) -> np.ndarray:
  """Returns float[n, 2]: the head's outline, which lies on the rim.

  Args:
    identity: Whose head.
    drop: How far an open mouth lowers the chin, in head units.
  """
  head = identity.head
  right = np.array([
    *_HALF_HEAD,
    (head.temple, -0.34),
    (head.cheek, 0.08),
    ((head.cheek + head.jaw) / 2 + 0.03, 0.42),
    (head.jaw, 0.68 + drop / 2),
    (head.chin, 0.96 + drop),
    (0.0, 1.0 + drop),
  ])  # fmt: skip
  left = right[-2:0:-1] * (-1, 1)
  return closed_curve(np.concatenate([right, left]))


def chin_drop(expression: Expression) -> float:
  """Returns how far an open mouth lowers the chin, in head units."""
  return 0.1 * expression.open_mouth


def add_body(sketch: Sketch, identity: Identity, cloth: Color) -> None:
  """Adds neck and shoulders, which do not turn with the head."""
  neck = identity.head.jaw * 0.86
  skin = scaled(identity.skin, 0.86)
  sides = np.array([(-neck, 0.4), (neck, 0.4), (neck, 1.6), (-neck, 1.6)])
  sketch.add(sides, skin, on=Depth.FLAT, lift=-0.1)
  shoulders = np.array([
    (-2.2, 2.6), (-1.75, 1.62), (-0.9, 1.36), (-neck * 0.9, 1.18), (0, 1.5),
    (neck * 0.9, 1.18), (0.9, 1.36), (1.75, 1.62), (2.2, 2.6),
  ])  # fmt: skip
  sketch.add(shoulders, cloth, on=Depth.FLAT, lift=-0.1)


def add_head(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds ears and the skin of the head, and the shades that give it relief."""
  head, skin = identity.head, identity.skin
  for side in (-1, 1):
    x, y = side * (head.cheek - 0.01), identity.eyes.y + 0.17
    sketch.add(
      ellipse(x, y, rx=head.ear * 0.72, ry=0.19),
      scaled(skin, 0.9),
      on=Depth.FLAT,
      lift=-0.1,
    )
    inner = ellipse(x + side * 0.03, y, rx=head.ear * 0.4, ry=0.11)
    sketch.add(inner, scaled(skin, 0.7), on=Depth.FLAT, lift=-0.1)
  outline = head_outline(identity, drop=chin_drop(expression))
  sketch.add(outline, skin, on=Depth.RIM)
  eyes, marks = identity.eyes, identity.marks
  for side in (-1, 1):
    socket = ellipse(side * eyes.x * 0.96, eyes.y - 0.03, rx=0.2, ry=0.13)
    sketch.shade(socket, 0.86)
    ring = ellipse(side * eyes.x, eyes.y + 0.12, rx=0.13, ry=0.05)
    sketch.shade(ring, 1 - 0.3 * marks.shadows)
    cheek = ellipse(side * 0.40, identity.nose.y - 0.02, rx=0.16, ry=0.12)
    sketch.shade(cheek, 1.07)
  sketch.shade(ellipse(0, identity.mouth.y + 0.17, rx=0.16, ry=0.04), 0.84)
  sketch.shade(ellipse(0, 1.12, rx=0.6, ry=0.16), 0.62)


def add_eyes(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds white, iris, pupil, lids and lashes of both eyes."""
  eyes = identity.eyes
  opening = eyes.opening * expression.eyelids * eyes.width
  for side in (-1.0, 1.0):
    tilt = -side * eyes.slant * _EYE_T * eyes.width  # the outer corner rises
    x = side * eyes.x + _EYE_T * eyes.width
    middle = eyes.y + tilt
    upper = middle - opening * 0.75 * (1 - np.abs(_EYE_T) ** 2.2)
    lower = middle + opening * 0.45 * (1 - _EYE_T**2)
    lids = np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]])
    sketch.add(lids, (236, 232, 228))
    center = side * eyes.x + expression.gaze * eyes.width * 0.5
    for radius, color in (
      (eyes.iris, scaled(eyes.iris_color, 0.55)),
      (eyes.iris * 0.84, eyes.iris_color),
      (eyes.iris * 0.42, (12, 10, 10)),
    ):
      disc = ellipse(center, eyes.y - 0.012, rx=radius, ry=radius)
      disc[:, 1] = np.clip(
        disc[:, 1], np.interp(disc[:, 0], x, upper), np.interp(disc[:, 0], x, lower)
      )
      sketch.add(disc, color)
    if opening > 0.03:
      glint = ellipse(center + 0.018, eyes.y - 0.035, rx=0.013, ry=0.013, steps=8)
      sketch.add(glint, (250, 250, 250))
    lash = np.stack([x, upper - 0.004], 1)
    sketch.add(stroke(lash, 0.022 * (1 - 0.5 * _EYE_T**2)), (38, 26, 24))
    crease = np.stack([x, upper - 0.02 - 0.035 * eyes.crease], 1)[1:-1]
    sketch.add(stroke(crease, 0.011), scaled(identity.skin, 0.66))
    sketch.add(stroke(np.stack([x, lower], 1), 0.007), scaled(identity.skin, 0.6))


def add_brows(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds both brows, thick inside and thin outside."""
  brows, eyes = identity.brows, identity.eyes
  y = eyes.y - brows.height - expression.brows
  for side in (-1, 1):
    inner = (side * (eyes.x - brows.length * 0.95), y + brows.slant * brows.length)
    outer = (side * (eyes.x + brows.length), y - brows.slant * brows.length * 0.4)
    line = arc(inner, outer, rise=brows.arch)
    widths = 2 * brows.thickness * np.linspace(1.0, 0.35, len(line))
    sketch.add(stroke(line, widths), brows.color, lift=0.03)


def add_nose(sketch: Sketch, identity: Identity, *, light_x: float) -> None:
  """Adds wings, nostrils and the shades of the bridge.

  Args:
    sketch: Receives the patches.
    identity: Whose nose.
    light_x: Where the lamp is, -1 to 1; the bridge is dark on the other side.
  """
  nose, eyes, skin = identity.nose, identity.eyes, identity.skin
  dark = scaled(skin, 0.62)
  for side in (-1.0, 1.0):
    facing = side * light_x
    bridge = np.array([
      (side * nose.bridge, eyes.y), (side * (nose.bridge + 0.07), eyes.y + 0.1),
      (side * (nose.wings + 0.03), nose.y + 0.02), (side * nose.wings * 0.5, nose.y),
    ])  # fmt: skip
    sketch.shade(bridge, 0.9 + 0.12 * facing - 0.25 * max(0.0, -facing))
    wing = np.array([
      (side * nose.wings * 0.82, nose.y - 0.09), (side * nose.wings, nose.y - 0.02),
      (side * nose.wings * 0.92, nose.y + 0.045),
      (side * nose.wings * 0.6, nose.y + 0.05),
    ])  # fmt: skip
    sketch.add(stroke(wing, 0.018), dark, lift=nose.lift * 0.45)
    nostril = ellipse(
      side * nose.wings * 0.5, nose.y + 0.05, rx=nose.wings * 0.24, ry=0.02
    )
    sketch.add(nostril, scaled(skin, 0.3), lift=nose.lift * 0.6)
  tip = arc(
    (-nose.wings * 0.35, nose.y + 0.055), (nose.wings * 0.35, nose.y + 0.055),
    rise=-0.02 - 0.03 * nose.tip,
  )  # fmt: skip
  sketch.add(stroke(tip, 0.014), dark, lift=nose.lift * 0.7)
  sketch.shade(
    ellipse(0, (eyes.y + nose.y) / 2, rx=nose.bridge, ry=0.2), 1.12, lift=nose.lift / 2
  )
  sketch.shade(ellipse(0, nose.y, rx=0.06, ry=0.05), 1.16, lift=nose.lift)
  sketch.shade(ellipse(0, nose.y + 0.1, rx=nose.wings, ry=0.03), 0.8)


def mouth_corners(identity: Identity, expression: Expression) -> np.ndarray:
  """Returns float[2, 2]: both corners of the mouth, the image's left one first."""
  mouth = identity.mouth
  x = mouth.width * (1 + 0.22 * expression.smile - 0.12 * expression.open_mouth)
  y = mouth.y + mouth.droop - 0.075 * expression.smile + 0.03 * expression.open_mouth
  return np.array([(-x, y), (x, y)])


def add_mouth(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds lips, and teeth and dark between them where the mouth is open."""
  mouth = identity.mouth
  (left, y), (right, _) = mouth_corners(identity, expression)
  gap = 0.17 * expression.open_mouth
  x = np.array([left, left * 0.5, left * 0.18, 0, right * 0.18, right * 0.5, right])
  share = np.array([0, 0.62, 0.95, 1, 0.95, 0.62, 0])  # how far from the corners
  top = y + (mouth.y - 0.01 - gap * 0.15 - y) * share
  bottom = y + (mouth.y + 0.01 + gap * 0.85 - y) * share
  peak = np.array([0, 0.75, 1.0, 0.72, 1.0, 0.75, 0]) * mouth.upper
  upper = np.concatenate([np.stack([x, top - peak], 1), np.stack([x, top], 1)[::-1]])
  lower = np.concatenate([
    np.stack([x, bottom], 1), np.stack([x, bottom + mouth.lower * share**0.8], 1)[::-1],
  ])  # fmt: skip
  inside = np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])
  sketch.add(inside, (58, 20, 22), lift=_LIPS_LIFT)
  if gap > 0.03:
    teeth = np.stack([x, np.minimum(top + 0.05, bottom)], 1)[1:-1]
    edge = np.stack([x, top], 1)[1:-1]
    sketch.add(np.concatenate([edge, teeth[::-1]]), (232, 226, 214), lift=_LIPS_LIFT)
  sketch.add(upper, scaled(mouth.color, 0.86), lift=_LIPS_LIFT)
  sketch.add(lower, mouth.color, lift=_LIPS_LIFT)
  line = np.stack([x, (top + bottom) / 2 if gap < 0.03 else top], 1)
  sketch.add(stroke(line, 0.014), scaled(mouth.color, 0.45), lift=_LIPS_LIFT)


def add_marks(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds what the skin carries: birthmark, freckles, moles, scar, blush, wrinkles."""
  marks, skin = identity.marks, identity.skin
  if marks.birthmark is not None:
    x, y, rx, ry = marks.birthmark
    sketch.add(ellipse(x, y, rx=rx, ry=ry), mixed(skin, (140, 50, 50), 0.4))
  for x, y, radius in marks.freckles:
    sketch.add(
      ellipse(x, y, rx=radius, ry=radius, steps=6), mixed(skin, (120, 66, 34), 0.5)
    )
  for side in (-1, 1):
    sketch.add(
      ellipse(side * 0.42, identity.nose.y + 0.04, rx=0.13, ry=0.1),
      mixed(skin, (214, 84, 84), 0.22 * marks.blush),
    )
    fold = arc(
      (side * (identity.nose.wings + 0.03), identity.nose.y),
      (side * (identity.mouth.width + 0.08), identity.mouth.y - 0.02),
      rise=0.03 + 0.02 * expression.smile,
    )
    depth = 0.1 + 0.3 * marks.wrinkles
    sketch.add(stroke(fold, 0.014), scaled(skin, 1 - depth), lift=0.02)
  for row in range(3):
    y = identity.eyes.y - identity.brows.height - 0.12 - 0.07 * row
    line = arc((-0.3, y), (0.3, y), rise=0.02)
    color = scaled(skin, 1 - 0.28 * marks.wrinkles)
    sketch.add(stroke(line, 0.011), color)
  if marks.scar is not None:
    scar = np.linspace(marks.scar[0], marks.scar[1], 4)
    sketch.add(stroke(scar, 0.028), mixed(skin, (240, 190, 180), 0.7))
  for x, y, radius in marks.moles:
    sketch.add(
      ellipse(x, y, rx=radius, ry=radius, steps=10), mixed(skin, (40, 22, 16), 0.8)
    )


def landmarks_of(identity: Identity, expression: Expression) -> list[Line]:
  """Returns eyes, tip of the nose and corners of the mouth; the image's left first."""
  eyes, nose = identity.eyes, identity.nose
  on_eyes = np.array([(-eyes.x, eyes.y), (eyes.x, eyes.y)])
  return [
    (on_eyes, Depth.FACE, 0.0),
    (np.array([(0.0, nose.y)]), Depth.FACE, nose.lift),
    (mouth_corners(identity, expression), Depth.FACE, _LIPS_LIFT),
  ]


def add_back_hair(sketch: Sketch, identity: Identity) -> None:
  """Adds the hair behind the head, before the head itself is drawn."""
  hair, head = identity.hair, identity.head
  width = max(head.temple, head.cheek) + hair.volume
  color = scaled(hair.color, 0.8)
  if hair.style == "long":
    right = np.array([
      (0.0, -1.08 - hair.volume), (width * 0.8, -0.8), (width + 0.06, -0.1),
      (width + 0.1, 0.7), (width * 0.95, 1.3),
    ])  # fmt: skip
    loop = np.concatenate([right, right[:0:-1] * (-1, 1)])
    sketch.add(closed_curve(loop), color, on=Depth.FLAT, lift=-0.25)
  elif hair.style == "curly":
    angles = np.linspace(0.9 * np.pi, 2.1 * np.pi, 13)
    for angle in angles:
      x, y = (width + 0.02) * np.cos(angle), 0.02 + (1.0 + hair.volume) * np.sin(angle)
      radius = 0.17 + 0.4 * hair.volume
      sketch.add(
        ellipse(x, y, rx=radius, ry=radius), hair.color, on=Depth.FLAT, lift=-0.15
      )


def add_hair(sketch: Sketch, identity: Identity) -> None:
  """Adds the hair in front: from the crown down to the hairline."""
  hair = identity.hair
  if hair.style == "bald":
    return
  temple = identity.head.temple
  line = hair.hairline
  side_y = {"cropped": -0.25, "receding": -0.2, "long": 0.25, "curly": -0.05}.get(
    hair.style, 0.0
  )
  top = np.array([
    (-temple - 0.04, side_y), (-temple - 0.05 - hair.volume * 0.5, -0.45),
    (-0.48 - hair.volume * 0.3, -0.86 - hair.volume * 0.6), (0.0, -1.02 - hair.volume),
    (0.48 + hair.volume * 0.3, -0.86 - hair.volume * 0.6),
    (temple + 0.05 + hair.volume * 0.5, -0.45), (temple + 0.04, side_y),
  ])  # fmt: skip
  outer = open_curve(top)
  inner = open_curve(_hairline(hair.style, temple, line, hair.side, side_y))
  lines = [(outer, Depth.FLAT, 0.0), (inner, Depth.FACE, 0.02)]
  sketch.add_joined(lines, hair.color)
  for lock in range(7):
    x = 0.16 * (lock - 3)
    strand = arc((x * 1.35 + hair.side * 0.05, line - 0.1), (x, -0.95), rise=0.0)
    tone = 1.16 if lock % 2 else 0.84
    sketch.add(stroke(strand, 0.022), scaled(hair.color, tone))


def _hairline(
  style: str, temple: float, y: float, side: float, side_y: float
) -> np.ndarray:
  """Returns float[n, 2] along the hairline, from the image's right to its left."""
  edge = temple - 0.05
  middle = [(edge - 0.04, -0.4), (0.34, y - 0.02), (0.0, y), (-0.34, y - 0.02)]
  if style == "fringe":
    low = min(y + 0.26, -0.26)
    middle = [(edge - 0.04, low), (0.3, low + 0.03), (0.0, low - 0.02), (-0.3, low)]
  elif style == "parted":
    middle = [
      (edge - 0.03, -0.35),
      (0.36, y + 0.12),
      (0.1, y - 0.05),
      (-0.28, y - 0.16),
    ]
  elif style == "receding":
    middle = [(edge - 0.02, -0.5), (0.36, -0.93), (0.0, y - 0.12), (-0.36, -0.93)]
  last = (0.03 - edge, middle[0][1])
  line = np.array([(edge, side_y), *middle, last, (-edge, side_y)])
  return line[::-1] * (-1, 1) if side < 0 else line


def add_beard(sketch: Sketch, identity: Identity, expression: Expression) -> None:
  """Adds the beard, which moves with the chin."""
  drop = chin_drop(expression)
  beard, mouth, head = identity.hair.beard, identity.mouth, identity.head
  color = identity.hair.beard_color
  if beard == "none":
    return
  if beard == "stubble":
    color = mixed(identity.skin, color, 0.35)
  if beard in ("stubble", "full"):
    sketch.add_joined(_full_beard(identity, drop=drop), color)
  if beard == "goatee":
    chin = np.array([
      (-mouth.width * 0.8, mouth.y + 0.13), (0, mouth.y + 0.12),
      (mouth.width * 0.8, mouth.y + 0.13), (head.chin, 0.98 + drop), (0, 1.04 + drop),
      (-head.chin, 0.98 + drop),
    ])  # fmt: skip
    sketch.add(closed_curve(chin), color, lift=0.03)
  if beard != "stubble":
    y = (identity.nose.y + mouth.y) / 2 + 0.03
    x, corner_y = 1.02 * mouth.width, mouth.y - 0.01
    line = arc((-x, corner_y), (x, corner_y), rise=mouth.y - y)
    widths = 0.09 * (1 - 0.7 * np.abs(np.linspace(-1, 1, len(line))))
    sketch.add(stroke(line, widths), color, lift=0.06)


def _full_beard(identity: Identity, *, drop: float) -> list[Line]:
  """Returns the outline along the jaw from ear to ear and back above the mouth."""
  outline = head_outline(identity, drop=drop)
  jaw = outline[outline[:, 1] > 0.2]
  jaw = jaw * (1.01, 1.0) + (0.0, 0.02)
  mouth, cheek = identity.mouth, identity.head.cheek
  y = (identity.nose.y + mouth.y) / 2 + 0.02
  right = np.array([
    (cheek * 0.86, 0.32), (mouth.width + 0.12, mouth.y - 0.06), (mouth.width * 0.8, y),
    (0.0, y + 0.01),
  ])  # fmt: skip
  upper = np.concatenate([right[:-1] * (-1, 1), right[::-1]])
  return [(jaw, Depth.RIM, 0.0), (open_curve(upper), Depth.FACE, 0.02)]


def add_cover(sketch: Sketch, identity: Identity, nuisance: Nuisance) -> None:
  """Adds what hides a part of the face in this image."""
  if nuisance.cover in ("glasses", "sunglasses"):
    _add_glasses(sketch, identity, nuisance)
  elif nuisance.cover == "hat":
    _add_hat(sketch, identity, nuisance)
  elif nuisance.cover == "hand":
    _add_hand(sketch, identity, nuisance)
  elif nuisance.cover == "bar":
    x = 0.55 * nuisance.cover_place
    bar = np.array([(x - 0.1, -2.5), (x + 0.1, -2.5), (x + 0.2, 2.5), (x, 2.5)])
    sketch.add(bar, nuisance.cover_color, on=Depth.FLAT, lift=0.9)


def _add_glasses(sketch: Sketch, identity: Identity, nuisance: Nuisance) -> None:
  """Adds rims and bridge; sunglasses hide the eyes."""
  eyes, color = identity.eyes, scaled(nuisance.cover_color, 0.5)
  for side in (-1, 1):
    lens = ellipse(side * eyes.x, eyes.y + 0.03, rx=0.23, ry=0.18, steps=24)
    if nuisance.cover == "sunglasses":
      sketch.add(lens, (28, 26, 30), lift=0.12)
    closed = np.concatenate([lens, lens[:1]])
    sketch.add(stroke(closed, 0.035), color, lift=0.12)
    temple = arc(
      (side * (eyes.x + 0.22), eyes.y),
      (side * identity.head.cheek, eyes.y - 0.02),
      rise=0.0,
    )
    sketch.add(stroke(temple, 0.035), color, lift=0.06)
  bridge = arc((-eyes.x + 0.2, eyes.y), (eyes.x - 0.2, eyes.y), rise=0.04)
  sketch.add(stroke(bridge, 0.035), color, lift=0.12)


def _add_hat(sketch: Sketch, identity: Identity, nuisance: Nuisance) -> None:
  """Adds a cap over hair and forehead."""
  width = identity.head.temple + 0.09 + identity.hair.volume * 0.5
  crown = np.array([
    (-width, -0.42), (-width * 0.92, -1.0), (0.0, -1.32), (width * 0.92, -1.0),
    (width, -0.42), (0.0, -0.5),
  ])  # fmt: skip
  sketch.add(closed_curve(crown), nuisance.cover_color, on=Depth.FLAT, lift=0.05)
  peak = arc((-width * 0.95, -0.45), (width * 0.95, -0.45), rise=0.05)
  sketch.add(stroke(peak, 0.11), scaled(nuisance.cover_color, 0.7), lift=0.12)


def _add_hand(sketch: Sketch, identity: Identity, nuisance: Nuisance) -> None:
  """Adds a hand held to the cheek or over the mouth."""
  mirror = np.array((np.sign(nuisance.cover_place), 1.0))
  x = 0.45 + 0.35 * abs(nuisance.cover_place)
  palm = np.array([(x - 0.1, 0.86), (x + 0.3, 0.84), (x + 0.42, 1.9), (x, 1.9)])
  skin = scaled(identity.skin, 0.95)
  for finger, length in enumerate((0.44, 0.52, 0.5, 0.4)):
    root = (x - 0.06 + 0.12 * finger, 0.95)
    tip = (root[0] - 0.22 + 0.05 * finger, root[1] - length)
    line = arc(root, tip, rise=0.0) * mirror
    widths = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.97, 0.85, 0.45])
    for width, color in ((0.15, scaled(skin, 0.62)), (0.125, skin)):
      sketch.add(stroke(line, width * widths), color, on=Depth.FLAT, lift=0.8)
  sketch.add(closed_curve(palm * mirror), skin, on=Depth.FLAT, lift=0.8)


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

  canvas = _background(
    rng, height=_OVERSAMPLING * frame.height, width=_OVERSAMPLING * frame.width
  )
  pixels = place(sketch.lines)
  _fill(canvas, sketch, pixels)
  shades = place([line for line, _ in sketch.shades])
  factors = _light_map(sketch, nuisance, silhouette=pixels, shades=shades)
  image = _lit(canvas, factors)
  size = (frame.width, frame.height)
  image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  image = _toned(image, nuisance.light)
  outline = head_outline(identity)
  below_hair = outline[outline[:, 1] > -0.75]
  landmarks = place(landmarks_of(identity, nuisance.expression))
  return Drawing(
    image=_photographed(image, nuisance.camera, rng),
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
  add_body(sketch, identity, nuisance.cloth)
  add_back_hair(sketch, identity)
  add_head(sketch, identity, expression)
  add_marks(sketch, identity, expression)
  add_beard(sketch, identity, expression)
  add_mouth(sketch, identity, expression)
  add_eyes(sketch, identity, expression)
  light_x = float(nuisance.light.direction[0])
  add_nose(sketch, identity, light_x=light_x)
  add_brows(sketch, identity, expression)
  add_hair(sketch, identity)
  add_cover(sketch, identity, nuisance)
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
  lit = _round_light(nuisance.light, frame, reduction=_MAP_REDUCTION)
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


def _background(rng: np.random.Generator, *, height: int, width: int) -> np.ndarray:
  """Returns uint8[height, width, 3]: soft colours and a few plain shapes."""
  base = rng.uniform(30, 225) + rng.normal(0, 22, 3)
  cells = base + rng.normal(0, 30, (4, 4, 1)) + rng.normal(0, 12, (4, 4, 3))
  coarse: np.ndarray = np.clip(cells, 0, 255).astype(np.uint8)
  canvas = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
  for _ in range(int(rng.integers(0, 5))):
    corners = rng.uniform(-0.2, 1.2, (4, 2)) * (width, height)
    color = np.clip(base + rng.normal(0, 45) + rng.normal(0, 18, 3), 0, 255)
    cv2.fillConvexPoly(canvas, cv2.convexHull(corners.astype(np.int32)), color.tolist())
  return canvas


def _round_light(light: Light, frame: Frame, *, reduction: int) -> np.ndarray:
  """Returns float32[h, w]: what reaches an egg-shaped head from lamp and surroundings.

  Args:
    light: The lamp, far away, so that Lambert's law knows its direction alone.
    frame: The image and the head's place in it.
    reduction: Image pixels a pixel of the result.
  """
  height, width = frame.height // reduction, frame.width // reduction
  columns = np.arange(width, dtype=np.float32)[None, :]
  rows = np.arange(height, dtype=np.float32)[:, None]
  x = ((columns + 0.5) * reduction - frame.center_x) / (0.95 * frame.scale)
  y = ((rows + 0.5) * reduction - frame.center_y) / (1.2 * frame.scale)
  from_axis = x * x + y * y
  z = np.sqrt(np.maximum(1 - from_axis, 0.05))
  facing = light.direction[0] * x + light.direction[1] * y + light.direction[2] * z
  lambert = np.maximum(facing, 0) / np.sqrt(from_axis + z * z)
  total = light.ambient + (1 - light.ambient) * 1.25 * lambert
  return np.asarray(total, np.float32)


def _lit(canvas: np.ndarray, factors: np.ndarray) -> np.ndarray:
  """Returns the canvas, uint8[H, W, 3], times the factors, float32[h, w], enlarged."""
  small: np.ndarray = np.clip(factors * _LIGHT_ONE, 0, 255).astype(np.uint8)
  size = (canvas.shape[1], canvas.shape[0])
  large = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
  return cv2.multiply(canvas, cv2.merge([large] * 3), scale=1 / _LIGHT_ONE)


def _toned(image: np.ndarray, light: Light) -> np.ndarray:
  """Returns the image under the light's colour and the camera's tone curve."""
  levels = np.arange(256)[:, None] / 255
  curves = np.minimum(levels * light.gains, 1) ** light.gamma
  curves = (curves - 0.5) * light.contrast + 0.5
  table: np.ndarray = np.clip(curves * 255, 0, 255).astype(np.uint8)
  return cv2.LUT(image, table[None])


def _photographed(
  image: np.ndarray, camera: Camera, rng: np.random.Generator
) -> np.ndarray:
  """Returns the image with the camera's low resolution, blur and noise."""
  height, width = image.shape[:2]
  if camera.shrink < 1:
    small = (max(1, int(width * camera.shrink)), max(1, int(height * camera.shrink)))
    image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  if camera.blur > 0.3:
    image = cv2.GaussianBlur(image, (0, 0), camera.blur)
  if camera.motion >= 2:
    image = cv2.filter2D(image, -1, _motion_kernel(camera))
  if camera.noise > 0.5:
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(camera.noise)
    image = cv2.add(image, noise, dtype=cv2.CV_8U)
  return image


def _motion_kernel(camera: Camera) -> np.ndarray:
  """Returns float32[n, n]: a line through the middle, summing to 1."""
  size = int(camera.motion) | 1
  half = camera.motion / 2
  step = half * np.array((np.cos(camera.motion_angle), np.sin(camera.motion_angle)))
  start, end = np.rint(size // 2 - step), np.rint(size // 2 + step)
  kernel: np.ndarray = np.zeros((size, size), np.float32)
  cv2.line(kernel, start.astype(int).tolist(), end.astype(int).tolist(), (1.0,))
  return kernel / kernel.sum()
