"""Drawn faces as pictures: pose, exact landmarks, identity apart from nuisance."""

import dataclasses
import itertools

import numpy as np
import pytest

from tfrecords_tools.synthetic import face_drawing, face_identity
from tfrecords_tools.synthetic.face_identity import (
  COVERS,
  Camera,
  Expression,
  Frame,
  Identity,
  Light,
  Nuisance,
  Pose,
)

GREEN, MAGENTA = (0.0, 255.0, 0.0), (255.0, 0.0, 255.0)
POSES = (
  Pose(0.0, 0.0, 0.0),
  Pose(0.3, 0.0, 0.0),
  Pose(-0.3, 0.15, 0.0),
  Pose(0.2, -0.15, 0.4),
  Pose(-0.1, 0.1, -0.4),
)


def person(seed: int) -> Identity:
  """A person whose irises are green and whose lips are magenta, and nothing else is."""
  sampled = face_identity.sample_identity(np.random.default_rng(seed))
  return dataclasses.replace(
    sampled,
    eyes=dataclasses.replace(sampled.eyes, iris_color=GREEN, opening=0.8),
    mouth=dataclasses.replace(sampled.mouth, color=MAGENTA),
    hair=dataclasses.replace(sampled.hair, style="bald", beard="none"),
  )


def plain(pose: Pose) -> Nuisance:
  """Circumstances that change nothing but the pose."""
  return Nuisance(
    frame=Frame(240, 240, center_x=120, center_y=120, scale=90),
    pose=pose,
    expression=Expression(smile=0, open_mouth=0, eyelids=1, brows=0, gaze=0),
    light=Light(
      np.array((0.0, 0, 1)), ambient=1, gains=np.ones(3), gamma=1, contrast=1
    ),
    camera=Camera(blur=0, motion=0, motion_angle=0, noise=0, shrink=1, quality=95),
    cover="none",
    cover_place=0,
    cover_color=(128, 128, 128),
    cloth=(128, 128, 128),
    scene=0,
  )


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("seed", range(3))
def test_landmarks_are_where_the_parts_are_drawn(pose: Pose, seed: int):
  drawing = face_drawing.draw(person(seed), plain(pose))
  red, green, blue = np.moveaxis(drawing.image.astype(int), 2, 0)
  rows, columns = np.nonzero((green > red + 60) & (green > blue + 60))
  points = np.stack([columns, rows], axis=1)
  for eye in drawing.landmarks[:2]:
    near = points[np.linalg.norm(points - eye, axis=1) < 15]
    middle = (near.min(axis=0) + near.max(axis=0)) / 2
    np.testing.assert_allclose(eye, middle, atol=3)
  rows, columns = np.nonzero((red > green + 60) & (blue > green + 60))
  points = np.stack([columns, rows], axis=1)
  left, right = drawing.landmarks[3:]
  along = points @ (right - left)
  np.testing.assert_allclose(left, points[along.argmin()], atol=3)
  np.testing.assert_allclose(right, points[along.argmax()], atol=3)


def test_rolling_the_head_rolls_the_landmarks_about_its_centre():
  straight = face_drawing.draw(person(0), plain(Pose(0, 0, 0))).landmarks
  rolled = face_drawing.draw(person(0), plain(Pose(0, 0, 0.3))).landmarks
  cos, sin = np.cos(0.3), np.sin(0.3)
  x, y = (straight - 120).T
  expected = np.stack([cos * x - sin * y, sin * x + cos * y], axis=1) + 120
  np.testing.assert_allclose(rolled, expected, atol=1e-3)


def test_yaw_moves_the_nose_farther_than_the_eyes_and_pitch_moves_it_down():
  straight = face_drawing.draw(person(0), plain(Pose(0, 0, 0))).landmarks
  turned = face_drawing.draw(person(0), plain(Pose(0.3, 0, 0))).landmarks
  moved = turned[:, 0] - straight[:, 0]
  assert moved[2] > moved[:2].mean() > 5
  nodding = face_drawing.draw(person(0), plain(Pose(0, 0.2, 0))).landmarks
  assert nodding[2, 1] > straight[2, 1] + 5


def test_landmarks_do_not_depend_on_light_camera_or_covers():
  nuisance = face_identity.sample_nuisance(
    np.random.default_rng(3), Frame(120, 100, center_x=50, center_y=60, scale=45)
  )
  dark = dataclasses.replace(nuisance.light, ambient=0.1, gamma=2.0)
  drawings = [
    face_drawing.draw(person(1), dataclasses.replace(nuisance, **change))
    for change in (*({"cover": cover} for cover in COVERS), {"light": dark})
  ]
  assert drawings[0].image.shape == (120, 100, 3)
  for one, other in itertools.pairwise(drawings):
    np.testing.assert_array_equal(one.landmarks, other.landmarks)
    assert (one.image != other.image).any()


@pytest.mark.parametrize("style", face_identity.HAIR_STYLES)
@pytest.mark.parametrize("beard", face_identity.BEARDS)
def test_every_hair_and_beard_can_be_drawn(style: str, beard: str):
  bald = person(2)
  hair = dataclasses.replace(bald.hair, style=style, beard=beard)
  bare = face_drawing.draw(bald, plain(POSES[1])).image
  image = face_drawing.draw(dataclasses.replace(bald, hair=hair), plain(POSES[1])).image
  assert (style, beard) == ("bald", "none") or (image != bare).any()


def test_the_same_draw_gives_the_same_pixels_and_another_gives_others():
  frame = Frame(96, 96, center_x=48, center_y=48, scale=36)
  images = [
    face_drawing.draw(
      face_identity.sample_identity(np.random.default_rng(5)),
      face_identity.sample_nuisance(np.random.default_rng(seed), frame),
    ).image
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).mean() > 0.5


def test_the_lamps_side_of_the_face_is_brighter():
  nuisance = plain(Pose(0, 0, 0))
  direction = np.array((0.8, 0.0, 0.6))
  light = dataclasses.replace(nuisance.light, direction=direction, ambient=0.2)
  drawing = face_drawing.draw(person(0), dataclasses.replace(nuisance, light=light))
  cheeks = drawing.image[120:150].mean(axis=(0, 2))
  assert cheeks[145:165].mean() > 1.3 * cheeks[75:95].mean()
