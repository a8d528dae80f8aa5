"""What differs between two images of one drawn face, and says nothing of who it is."""

import dataclasses

import numpy as np

from tfrecords_tools.face_colors import Color

COVERS = ("none", "glasses", "sunglasses", "hat", "hand", "bar")
_COVER_SHARES = (0.70, 0.09, 0.04, 0.07, 0.06, 0.04)


@dataclasses.dataclass(frozen=True)
class Pose:
  """Rotations in radians: yaw to the image's right, pitch down, roll clockwise."""

  yaw: float
  pitch: float
  roll: float


@dataclasses.dataclass(frozen=True)
class Expression:
  """How the face is moved.

  Attributes:
    smile: -1 (sad) to 1.
    open_mouth: 0 to 1.
    eyelids: Factor of the eyes' opening.
    brows: Lift of the brows in head units.
    gaze: Shift of the irises, in eye widths.
  """

  smile: float
  open_mouth: float
  eyelids: float
  brows: float
  gaze: float


@dataclasses.dataclass(frozen=True)
class Light:
  """One lamp and its surroundings.

  Attributes:
    direction: Unit vector to the lamp: x right, y down, z to the viewer.
    ambient: Share of the light that comes from everywhere, 0 to 1.
    gains: Factors of red, green and blue.
    gamma: Exponent of the tone curve.
    contrast: Factor about middle grey.
  """

  direction: np.ndarray
  ambient: float
  gains: np.ndarray
  gamma: float
  contrast: float


@dataclasses.dataclass(frozen=True)
class Frame:
  """The image's size in pixels, the head's place and half height in pixels."""

  height: int
  width: int
  center_x: float
  center_y: float
  scale: float


@dataclasses.dataclass(frozen=True)
class Camera:
  """What the camera and the file do to the picture.

  Attributes:
    blur: Standard deviation in pixels.
    motion: Length of the motion blur in pixels; below 2 is none.
    motion_angle: Its direction in radians.
    noise: Standard deviation in grey levels.
    shrink: Factor by which the picture once was smaller, 0 to 1.
    quality: JPEG quality, 1 to 100.
  """

  blur: float
  motion: float
  motion_angle: float
  noise: float
  shrink: float
  quality: int


@dataclasses.dataclass(frozen=True)
class Nuisance:
  """Everything about one image but the person.

  Attributes:
    cover: One of COVERS.
    cover_place: Where a hand or bar is: -1 (the image's left) to 1.
    cover_color: Its colour.
    cloth: Colour of the clothes.
    scene: Seed of the background and of the noise.
  """

  frame: Frame
  pose: Pose
  expression: Expression
  light: Light
  camera: Camera
  cover: str
  cover_place: float
  cover_color: Color
  cloth: Color
  scene: int


def sample(rng: np.random.Generator, frame: Frame) -> Nuisance:
  """Draws the circumstances of one image; the same state gives the same ones."""
  return Nuisance(
    frame=frame,
    pose=Pose(
      yaw=float(np.clip(rng.normal(0, 0.24), -0.55, 0.55)),
      pitch=float(np.clip(rng.normal(0, 0.14), -0.3, 0.3)),
      roll=float(np.clip(rng.normal(0, 0.17), -0.5, 0.5)),
    ),
    expression=Expression(
      smile=rng.uniform(-0.5, 1.0),
      open_mouth=max(0.0, rng.uniform(-1.0, 1.0)),
      eyelids=rng.uniform(0.55, 1.1) if rng.random() < 0.95 else 0.08,
      brows=rng.uniform(-0.02, 0.06),
      gaze=rng.uniform(-0.35, 0.35),
    ),
    light=_light(rng),
    camera=_camera(rng),
    cover=str(rng.choice(COVERS, p=_COVER_SHARES)),
    cover_place=rng.uniform(-1, 1),
    cover_color=_any_color(rng),
    cloth=_any_color(rng),
    scene=int(rng.integers(1 << 32)),
  )


def loose_frame(rng: np.random.Generator, image_size: int) -> Frame:
  """Returns a frame as VGGFace2's loose crops have: sizes vary, the face fills it."""
  height = int(image_size * np.exp(rng.uniform(-0.35, 0.35)))
  width = int(height * rng.uniform(0.82, 1.0))
  return Frame(
    height,
    width,
    center_x=width * rng.uniform(0.44, 0.56),
    center_y=height * rng.uniform(0.47, 0.56),
    scale=height * rng.uniform(0.34, 0.43),
  )


def square_frame(rng: np.random.Generator, image_size: int) -> Frame:
  """Returns a frame as LFW's images have: one size, a smaller face in the middle."""
  return Frame(
    image_size,
    image_size,
    center_x=image_size * rng.uniform(0.45, 0.55),
    center_y=image_size * rng.uniform(0.46, 0.55),
    scale=image_size * rng.uniform(0.28, 0.36),
  )


def _light(rng: np.random.Generator) -> Light:
  direction = np.array([rng.normal(0, 0.75), rng.normal(-0.35, 0.45), 1.0])
  warmth, tint, level = rng.normal(0, 0.13), rng.normal(0, 0.05), rng.normal(0, 0.14)
  gains = np.exp(level + np.array([warmth, tint, -warmth]))
  return Light(
    direction=direction / np.linalg.norm(direction),
    ambient=rng.uniform(0.25, 0.7),
    gains=gains,
    gamma=float(np.exp(rng.normal(0, 0.25))),
    contrast=float(np.exp(rng.normal(0, 0.15))),
  )


def _camera(rng: np.random.Generator) -> Camera:
  return Camera(
    blur=max(0.0, rng.uniform(-1.5, 1.5)),
    motion=rng.uniform(2, 6) if rng.random() < 0.12 else 0.0,
    motion_angle=rng.uniform(0, np.pi),
    noise=max(0.0, rng.uniform(-6, 12)),
    shrink=rng.uniform(0.3, 0.7) if rng.random() < 0.2 else 1.0,
    quality=int(rng.integers(40, 96)),
  )


def _any_color(rng: np.random.Generator) -> Color:
  grey = rng.uniform(30, 225)
  r, g, b = np.clip(grey + rng.normal(0, 32, 3), 10, 245)
  return (float(r), float(g), float(b))
