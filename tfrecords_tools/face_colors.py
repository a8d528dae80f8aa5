"""Colours of drawn faces: palettes, and what is done to colours. RGB, 0 to 255."""

from collections.abc import Sequence

import numpy as np

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
