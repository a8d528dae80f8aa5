"""Draws what grows on a face or covers it: hair, beard, glasses, hat, hand."""

import numpy as np

from tfrecords_tools.face_colors import mixed, scaled
from tfrecords_tools.face_features import chin_drop, head_outline
from tfrecords_tools.face_identity import Identity
from tfrecords_tools.face_nuisance import Expression, Nuisance
from tfrecords_tools.face_shapes import (
  arc,
  closed_curve,
  ellipse,
  open_curve,
  stroke,
)
from tfrecords_tools.face_sketch import Depth, Line, Sketch


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
