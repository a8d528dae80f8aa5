"""The parameters of a drawn face: its identity, and what differs between images.

Lengths are in head units: half the height of the head without hair. The origin is the
middle of the head, x to the image's right, y down. Colours are RGB, 0 to 255.
"""

import dataclasses

import numpy as np

from tfrecords_tools.synthetic import sketch
from tfrecords_tools.synthetic.sketch import (
  Color,
  along,
  jittered,
  mixed,
  one_of,
  scaled,
)

HAIR_STYLES = ("bald", "cropped", "receding", "fringe", "parted", "curly", "long")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")


@dataclasses.dataclass(frozen=True)
class HeadShape:
  """Half widths of the outline from top to bottom, and the ears."""

  temple: float
  cheek: float
  jaw: float
  chin: float
  ear: float


@dataclasses.dataclass(frozen=True)
class Eyes:
  """Centres at (±x, y); half width, opening, slant and iris of each eye."""

  x: float
  y: float
  width: float
  opening: float
  slant: float
  iris: float
  iris_color: Color
  crease: float


@dataclasses.dataclass(frozen=True)
class Brows:
  """Height above the eye, half length, thickness, arch, slant; how dark."""

  height: float
  length: float
  thickness: float
  arch: float
  slant: float
  color: Color


@dataclasses.dataclass(frozen=True)
class Nose:
  """Tip at y; half widths of wings and bridge; how far it stands out."""

  y: float
  wings: float
  bridge: float
  lift: float
  tip: float


@dataclasses.dataclass(frozen=True)
class Mouth:
  """Centre at y; half width at rest; thickness of both lips; droop of the corners."""

  y: float
  width: float
  upper: float
  lower: float
  droop: float
  color: Color


@dataclasses.dataclass(frozen=True)
class Hair:
  """One of HAIR_STYLES, one of BEARDS, and their colour and size."""

  style: str
  color: Color
  volume: float
  hairline: float
  side: float
  beard: str
  beard_color: Color


@dataclasses.dataclass(frozen=True)
class Marks:
  """What the skin carries.

  Attributes:
    moles: float32[moles, 3] of x, y and radius.
    freckles: float32[freckles, 3], likewise.
    scar: float32[2, 2], its ends, or none.
    birthmark: float32[4] of x, y and two radii, or none.
    wrinkles: 0 to 1.
    blush: 0 to 1.
    shadows: Dark rings below the eyes, 0 to 1.
  """

  moles: np.ndarray
  freckles: np.ndarray
  scar: np.ndarray | None
  birthmark: np.ndarray | None
  wrinkles: float
  blush: float
  shadows: float


@dataclasses.dataclass(frozen=True)
class Identity:
  """All that is constant over the images of one drawn person."""

  gender: str
  skin: Color
  head: HeadShape
  eyes: Eyes
  brows: Brows
  nose: Nose
  mouth: Mouth
  hair: Hair
  marks: Marks


def sample_identity(rng: np.random.Generator) -> Identity:
  """Draws a person; the same generator state gives the same person."""
  gender = "m" if rng.random() < 0.5 else "f"
  skin = jittered(rng, along(rng, sketch.SKIN_TONES), 0.035)
  hair = _hair(rng, gender)
  eyes = Eyes(
    x=rng.uniform(0.26, 0.37),
    y=rng.uniform(-0.10, 0.08),
    width=rng.uniform(0.105, 0.165),
    opening=rng.uniform(0.4, 0.85),
    slant=rng.uniform(-0.22, 0.28),
    iris=rng.uniform(0.055, 0.08),
    iris_color=jittered(rng, one_of(rng, sketch.IRIS_COLORS), 0.15),
    crease=rng.uniform(0.0, 1.0),
  )
  head = HeadShape(
    temple=rng.uniform(0.60, 0.76),
    cheek=rng.uniform(0.64, 0.80),
    jaw=rng.uniform(0.44, 0.68),
    chin=rng.uniform(0.12, 0.32),
    ear=rng.uniform(0.10, 0.20),
  )
  return Identity(
    gender, skin, head, eyes, _brows(rng, hair), _nose(rng, eyes),
    _mouth(rng, skin), hair, _marks(rng),
  )  # fmt: skip


def _brows(rng: np.random.Generator, hair: Hair) -> Brows:
  return Brows(
    height=rng.uniform(0.15, 0.27),
    length=rng.uniform(0.13, 0.21),
    thickness=rng.uniform(0.016, 0.062),
    arch=rng.uniform(0.0, 0.09),
    slant=rng.uniform(-0.25, 0.25),
    color=scaled(hair.color, rng.uniform(0.45, 0.95)),
  )


def _nose(rng: np.random.Generator, eyes: Eyes) -> Nose:
  return Nose(
    y=eyes.y + rng.uniform(0.33, 0.48),
    wings=rng.uniform(0.09, 0.20),
    bridge=rng.uniform(0.03, 0.08),
    lift=rng.uniform(0.12, 0.26),
    tip=rng.uniform(0.0, 1.0),
  )


def _mouth(rng: np.random.Generator, skin: Color) -> Mouth:
  red = jittered(rng, (176, 70, 74), 0.2)
  return Mouth(
    y=rng.uniform(0.60, 0.72),
    width=rng.uniform(0.19, 0.32),
    upper=rng.uniform(0.02, 0.075),
    lower=rng.uniform(0.035, 0.105),
    droop=rng.uniform(-0.03, 0.04),
    color=mixed(scaled(skin, 0.82), red, rng.uniform(0.2, 0.9)),
  )


def _hair(rng: np.random.Generator, gender: str) -> Hair:
  color = jittered(rng, one_of(rng, sketch.HAIR_COLORS), 0.07)
  styles = HAIR_STYLES[:6] if gender == "m" else HAIR_STYLES[3:]
  bearded = gender == "m" and rng.random() < 0.55
  return Hair(
    style=str(rng.choice(styles)),
    color=color,
    volume=rng.uniform(0.04, 0.22),
    hairline=rng.uniform(-0.74, -0.44),
    side=float(rng.choice((-1.0, 1.0))),
    beard=str(rng.choice(BEARDS[1:])) if bearded else "none",
    beard_color=jittered(rng, scaled(color, rng.uniform(0.6, 1.0)), 0.08),
  )


def _marks(rng: np.random.Generator) -> Marks:
  moles = _dots(rng, int(rng.integers(0, 4)), (0.018, 0.036))
  freckles = _dots(rng, 36 if rng.random() < 0.2 else 0, (0.007, 0.014))
  freckles[:, 1] = 0.22 + 0.35 * (freckles[:, 1] - 0.2)  # across nose and cheeks
  scar = None
  if rng.random() < 0.15:
    start, angle = _dots(rng, 1, (0, 0))[0, :2], rng.uniform(0, np.pi)
    length = rng.uniform(0.14, 0.3)
    scar = np.stack([start, start + length * np.array([np.cos(angle), np.sin(angle)])])
  birthmark = None
  if rng.random() < 0.12:
    birthmark = np.append(_dots(rng, 1, (0.06, 0.14))[0], rng.uniform(0.05, 0.12))
  return Marks(
    moles=moles,
    freckles=freckles,
    scar=scar,
    birthmark=birthmark,
    wrinkles=max(0.0, rng.uniform(-0.8, 1.0)),
    blush=max(0.0, rng.uniform(-1.0, 1.0)),
    shadows=max(0.0, rng.uniform(-0.8, 1.0)),
  )


def _dots(
  rng: np.random.Generator, count: int, radii: tuple[float, float]
) -> np.ndarray:
  """Returns float64[count, 3] of x, y and radius, spread over the face."""
  x = rng.uniform(-0.5, 0.5, count)
  y = rng.uniform(-0.35, 0.85, count) * (1 - 0.4 * np.abs(x))
  return np.stack([x, y, rng.uniform(*radii, count)], axis=1)


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


def sample_nuisance(rng: np.random.Generator, frame: Frame) -> Nuisance:
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
