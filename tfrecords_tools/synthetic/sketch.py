"""The sketch of a face: flat patches that lie on curved surfaces, in drawing order.

Curves give the patches their shape, palettes their colours (RGB, 0 to 255).
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Sequence

import numpy as np

_CURVE_STEPS = 6  # points a corner of a smooth curve
_ARC_T = np.linspace(0, 1, 9)[:, None]
_ARC_BEND = 4 * _ARC_T[:, 0] * (1 - _ARC_T[:, 0])


def closed_curve(corners: np.ndarray) -> np.ndarray:
  """Returns float[6 n, 2]: a smooth loop through the corners, float[n, 2]."""
  return _catmull_rom(np.concatenate([corners[-1:], corners, corners[:2]]))


def open_curve(corners: np.ndarray) -> np.ndarray:
  """Returns float[6 n - 5, 2]: a smooth line through the corners, float[n, 2]."""
  inner = _catmull_rom(np.concatenate([corners[:1], corners, corners[-1:]]))
  return np.concatenate([inner, corners[-1:]])


def _catmull_rom(corners: np.ndarray) -> np.ndarray:
  """Returns float[6 (n - 3), 2] from the second of n corners to the last but one."""
  windows = np.lib.stride_tricks.sliding_window_view(corners, 4, axis=0)  # [n-3, 2, 4]
  return np.einsum("nck,sk->nsc", windows, _curve_weights()).reshape(-1, 2)


@functools.cache
def _curve_weights() -> np.ndarray:
  """Returns float[6, 4]: four corners' shares in the points between the middle two."""
  t = np.arange(_CURVE_STEPS) / _CURVE_STEPS
  first, second = -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3
  third, fourth = t + 4 * t**2 - 3 * t**3, t**3 - t**2
  return np.stack([first, second, third, fourth], axis=1) / 2


def ellipse(x: float, y: float, *, rx: float, ry: float, steps: int = 16) -> np.ndarray:
  """Returns float[steps, 2] on an upright ellipse."""
  return np.array((x, y)) + _circle(steps) * (rx, ry)


def arc(
  start: tuple[float, float], end: tuple[float, float], *, rise: float
) -> np.ndarray:
  """Returns float[9, 2] from start to end, bent upwards by `rise` in the middle."""
  line = np.array(start) + _ARC_T * np.subtract(end, start)
  line[:, 1] -= rise * _ARC_BEND
  return line


def stroke(line: np.ndarray, widths: np.ndarray | float) -> np.ndarray:
  """Returns the outline, float[2 n, 2], of a line float[n, 2] of that full width."""
  along = np.empty_like(line)
  along[1:-1] = line[2:] - line[:-2]
  along[0], along[-1] = line[1] - line[0], line[-1] - line[-2]
  x, y = along[:, 0], along[:, 1]
  factor = 0.5 * widths / np.maximum(np.sqrt(x * x + y * y), 1e-9)
  outline = np.empty((2, *line.shape))
  outline[0, :, 0], outline[0, :, 1] = -y * factor, x * factor
  outline[1] = (line - outline[0])[::-1]
  outline[0] += line
  return outline.reshape(-1, 2)


@functools.cache
def _circle(steps: int) -> np.ndarray:
  """Returns float[steps, 2] on the unit circle."""
  angles = np.arange(steps) * (2 * np.pi / steps)
  return np.stack([np.cos(angles), np.sin(angles)], axis=1)


Color = tuple[float, float, float]

SKIN_TONES: Sequence[Color] = (
  (252, 219, 198),
  (238, 195, 165),
  (219, 168, 128),
  (189, 130, 90),
  (136, 86, 58),
  (88, 57, 42),
)
HAIR_COLORS: Sequence[Color] = (
  (26, 22, 22),
  (58, 38, 28),
  (101, 67, 40),
  (139, 58, 30),
  (176, 128, 70),
  (222, 190, 130),
  (150, 148, 146),
  (228, 226, 222),
)
IRIS_COLORS: Sequence[Color] = (
  (62, 40, 24),
  (110, 74, 38),
  (96, 110, 62),
  (74, 118, 160),
  (120, 130, 136),
)


def mixed(first: Color, second: Color, share: float) -> Color:
  """Returns `first` with `share` (0 to 1) of `second`."""
  r, g, b = ((1 - share) * a + share * b for a, b in zip(first, second, strict=True))
  return (r, g, b)


def scaled(color: Color, factor: float) -> Color:
  """Returns the colour made darker or brighter, at most 255."""
  r, g, b = (min(255.0, channel * factor) for channel in color)
  return (r, g, b)


def one_of(rng: np.random.Generator, colors: Sequence[Color]) -> Color:
  """Returns one of the colours, each as likely."""
  return colors[int(rng.integers(len(colors)))]


def along(rng: np.random.Generator, colors: Sequence[Color]) -> Color:
  """Returns a colour anywhere on the line through the colours."""
  place = rng.uniform(0, len(colors) - 1)
  first = int(place)
  return mixed(colors[first], colors[first + 1], place - first)


def jittered(rng: np.random.Generator, color: Color, spread: float) -> Color:
  """Returns the colour with each channel times e^x, x normal with std `spread`."""
  r, g, b = np.clip(np.array(color) * np.exp(rng.normal(0, spread, 3)), 8, 252)
  return (float(r), float(g), float(b))


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
