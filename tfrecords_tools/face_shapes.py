"""Curves: what the parts of a drawn face are shaped with."""

import functools

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
