"""The sketch of a face: flat patches that lie on curved surfaces, in drawing order."""

import dataclasses
import enum
import itertools
from collections.abc import Sequence

import numpy as np

from tfrecords_tools.face_colors import Color


class Depth(enum.IntEnum):
  """Which surface a point lies on; its z is that of the surface plus a lift."""

  FLAT = 0
  """The plane through the middle of the head."""
  FACE = 1
  """The rounded front of the head."""
  RIM = 2
  """The head's outline, whose jaw stands before the temples."""


FACE_DEPTH = 0.62
"""How far the middle of the face stands before the plane, in head units."""
_RIM_DEPTH = 0.38


Line = tuple[np.ndarray, Depth, float]
"""Points float[n, 2], the surface they lie on, and their lift above it."""


@dataclasses.dataclass
class Sketch:
  """Patches in drawing order, in head units.

  Attributes:
    cheek: Half width of the head, which the curvature of the face follows.
    lines: Of every piece of an outline float[n, 2], its surface and its lift.
    patches: Of every patch, the number of its lines and its colour.
    shades: Of every shade, its line with surface and lift, and a factor. Shades are
      drawn apart, softened and multiplied in as light is.
  """

  cheek: float
  lines: list[Line] = dataclasses.field(default_factory=list)
  patches: list[tuple[int, Color]] = dataclasses.field(default_factory=list)
  shades: list[tuple[Line, float]] = dataclasses.field(default_factory=list)

  def add(
    self, line: np.ndarray, color: Color, *, on: Depth = Depth.FACE, lift: float = 0.0
  ) -> None:
    """Adds a patch that lies on one surface."""
    self.lines.append((line, on, lift))
    self.patches.append((1, color))

  def add_joined(self, lines: Sequence[Line], color: Color) -> None:
    """Adds a patch whose outline runs over several surfaces."""
    self.lines.extend(lines)
    self.patches.append((len(lines), color))

  def patch_sizes(self) -> list[int]:
    """Returns the number of points of each patch."""
    sizes = iter([len(points) for points, _, _ in self.lines])
    return [sum(itertools.islice(sizes, count)) for count, _ in self.patches]

  def are_outer(self) -> list[bool]:
    """Says of each patch whether it may reach beyond the face: not only on it."""
    surfaces = iter([on for _, on, _ in self.lines])
    return [
      set(itertools.islice(surfaces, count)) != {Depth.FACE}
      for count, _ in self.patches
    ]

  def shade(self, line: np.ndarray, factor: float, *, lift: float = 0.0) -> None:
    """Darkens (factor below 1) or lightens a soft region of the face."""
    self.shades.append(((line, Depth.FACE, lift), factor))


def in_space(lines: Sequence[Line], *, cheek: float) -> np.ndarray:
  """Returns float[n, 3]: all points of the lines with their depth, to the viewer."""
  sizes = [len(line) for line, _, _ in lines]
  points = np.concatenate([line for line, _, _ in lines])
  on = np.repeat([depth for _, depth, _ in lines], sizes)
  lift = np.repeat([lift for _, _, lift in lines], sizes)
  x, y = points[:, 0], points[:, 1]
  inside = 1 - (x / (1.08 * cheek)) ** 2 - (y / 1.25) ** 2
  face = FACE_DEPTH * np.sqrt(np.maximum(inside, 0))
  rim = _RIM_DEPTH * np.clip((y - 0.1) / 0.9, 0, 1)
  z = lift + np.where(on == Depth.FACE, face, np.where(on == Depth.RIM, rim, 0))
  return np.column_stack([points, z])
