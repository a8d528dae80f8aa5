"""The people who are drawn: the images of each person, and how they are drawn.

Each person and each image has a random stream of its own, keyed by seed, data set,
person and image. So any process can draw any image alone.
"""

import dataclasses
import os
import pathlib

import cv2
import numpy as np

from facedist import storage
from tfrecords_tools.synthetic import face_drawing, face_identity, face_layout

TRAINING, UNSEEN, PAIRS = range(3)
"""What a random stream is for: people of one data set, of the other, or pairs."""
_FRAMES = {TRAINING: face_identity.loose_frame, UNSEEN: face_identity.square_frame}


@dataclasses.dataclass(frozen=True)
class Person:
  """One person and the images to draw.

  Attributes:
    stream: TRAINING or UNSEEN.
    number: Of the person within the stream.
    name: Invented; no one else of either stream has it.
    folder: Name of the person's folder below `root`.
    files: Names of the images, without suffix.
    root: Folder of all people's folders, local or gs://.
    image_size: Typical height of an image in pixels.
    seed: Of everything.
  """

  stream: int
  number: int
  name: str
  folder: str
  files: tuple[str, ...]
  root: str
  image_size: int
  seed: int


def training_person(
  number: int, *, images: int, root: str, image_size: int, seed: int
) -> Person:
  """Returns a person as VGGFace2 names them: n000001/0001_01.jpg."""
  return Person(
    stream=TRAINING,
    number=number,
    name=_name(TRAINING, number),
    folder=f"n{number + 1:06d}",
    files=tuple(f"{image:04d}_01" for image in range(1, images + 1)),
    root=root,
    image_size=image_size,
    seed=seed,
  )


def unseen_person(
  number: int, *, images: int, root: str, image_size: int, seed: int
) -> Person:
  """Returns a person as LFW names them: Tavo_Merlund/Tavo_Merlund_0001.jpg."""
  name = _name(UNSEEN, number)
  return Person(
    stream=UNSEEN,
    number=number,
    name=name,
    folder=name,
    files=tuple(f"{name}_{image:04d}" for image in range(1, images + 1)),
    root=root,
    image_size=image_size,
    seed=seed,
  )


def generator(*key: int) -> np.random.Generator:
  """Returns the generator of a key; keys of different lengths are different keys."""
  return np.random.default_rng([len(key), *key])


def identity_of(person: Person) -> face_identity.Identity:
  """Returns what the person looks like."""
  return face_identity.sample_identity(
    generator(person.seed, person.stream, person.number)
  )


def draw_image(
  person: Person, identity: face_identity.Identity, image: int
) -> tuple[face_drawing.Drawing, bytes]:
  """Draws the person's image of that number, from 0.

  Returns:
    The drawing before it is compressed, and its JPEG.
  """
  rng = generator(person.seed, person.stream, person.number, image)
  frame = _FRAMES[person.stream](rng, person.image_size)
  nuisance = face_identity.sample_nuisance(rng, frame)
  drawing = face_drawing.draw(identity, nuisance)
  pixels = cv2.cvtColor(drawing.image, cv2.COLOR_RGB2BGR)
  options = [cv2.IMWRITE_JPEG_QUALITY, nuisance.camera.quality]
  _, jpeg = cv2.imencode(".jpg", pixels, options)
  return drawing, jpeg.tobytes()


def draw_person(person: Person) -> face_layout.Faces:
  """Draws and writes all images of a person; returns where the faces lie."""
  folder = storage.join(person.root, person.folder)
  if not storage.is_bucket(folder):
    os.makedirs(folder, exist_ok=True)
  identity = identity_of(person)
  drawings = []
  for image, name in enumerate(person.files):
    drawing, jpeg = draw_image(person, identity, image)
    _write_image(storage.join(folder, name + ".jpg"), jpeg)
    drawings.append(drawing)
  return face_layout.Faces(
    names=tuple(f"{person.folder}/{name}" for name in person.files),
    landmarks=np.stack([drawing.landmarks for drawing in drawings]),
    boxes=np.array([drawing.box for drawing in drawings]),
  )


def _name(stream: int, number: int) -> str:
  """Returns an invented name; even ones are trained on, odd ones unseen."""
  return face_layout.person_name(2 * number + stream)


def _write_image(path: str, content: bytes) -> None:
  """Writes an image that a start after a crash would draw again."""
  if storage.is_bucket(path):
    storage.write_bytes(path, content)
  else:  # storage waits until the disk has it: too long for thousands of images
    pathlib.Path(path).write_bytes(content)
