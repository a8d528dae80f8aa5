"""Draws the parts of a face into a sketch: head, eyes, brows, nose, mouth, marks."""

import numpy as np

from tfrecords_tools.face_colors import Color, mixed, scaled
from tfrecords_tools.face_identity import Identity
from tfrecords_tools.face_nuisance import Expression
from tfrecords_tools.face_shapes import (
  arc,
  closed_curve,
  ellipse,
  stroke,
)
from tfrecords_tools.face_sketch import Depth, Line, Sketch

_EYE_T = np.linspace(-1, 1, 13)
_LIPS_LIFT = 0.04
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


def landmarks(identity: Identity, expression: Expression) -> list[Line]:
  """Returns eyes, tip of the nose and corners of the mouth; the image's left first."""
  eyes, nose = identity.eyes, identity.nose
  on_eyes = np.array([(-eyes.x, eyes.y), (eyes.x, eyes.y)])
  return [
    (on_eyes, Depth.FACE, 0.0),
    (np.array([(0.0, nose.y)]), Depth.FACE, nose.lift),
    (mouth_corners(identity, expression), Depth.FACE, _LIPS_LIFT),
  ]
