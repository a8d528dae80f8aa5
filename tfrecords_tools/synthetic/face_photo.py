"""Light, background and camera of a drawn face: what is done to pixels."""

import cv2
import numpy as np

from tfrecords_tools.synthetic.face_identity import Camera, Frame, Light

_LIGHT_ONE = 128  # 8-bit light factor that changes nothing


def background(rng: np.random.Generator, *, height: int, width: int) -> np.ndarray:
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


def round_light(light: Light, frame: Frame, *, reduction: int) -> np.ndarray:
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


def lit(canvas: np.ndarray, factors: np.ndarray) -> np.ndarray:
  """Returns the canvas, uint8[H, W, 3], times the factors, float32[h, w], enlarged."""
  small: np.ndarray = np.clip(factors * _LIGHT_ONE, 0, 255).astype(np.uint8)
  size = (canvas.shape[1], canvas.shape[0])
  large = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
  return cv2.multiply(canvas, cv2.merge([large] * 3), scale=1 / _LIGHT_ONE)


def toned(image: np.ndarray, light: Light) -> np.ndarray:
  """Returns the image under the light's colour and the camera's tone curve."""
  levels = np.arange(256)[:, None] / 255
  curves = np.minimum(levels * light.gains, 1) ** light.gamma
  curves = (curves - 0.5) * light.contrast + 0.5
  table: np.ndarray = np.clip(curves * 255, 0, 255).astype(np.uint8)
  return cv2.LUT(image, table[None])


def photographed(
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
