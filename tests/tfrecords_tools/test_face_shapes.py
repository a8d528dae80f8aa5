"""Curves of drawn faces, against points known by hand."""

import numpy as np

from tfrecords_tools.synthetic import sketch
from tfrecords_tools.synthetic.sketch import Depth

SQUARE = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])


def test_a_curve_passes_its_corners_and_bulges_between_them_if_it_is_closed():
  closed = sketch.closed_curve(SQUARE)
  assert closed.shape == (24, 2)
  np.testing.assert_allclose(closed[::6], SQUARE, atol=1e-12)
  # Catmull-Rom half way: (-before + 9 start + 9 end - after) / 16.
  np.testing.assert_allclose(closed[3], (0.5, -2 / 16))
  opened = sketch.open_curve(SQUARE)
  assert opened.shape == (19, 2)
  np.testing.assert_allclose(opened[::6], SQUARE, atol=1e-12)


def test_an_arc_rises_most_in_the_middle():
  line = sketch.arc((0.0, 2.0), (4.0, 2.0), rise=0.5)
  np.testing.assert_allclose(line[[0, 4, 8]], [(0, 2), (2, 1.5), (4, 2)])


def test_a_stroke_is_half_its_width_from_the_line_on_either_side():
  line = np.array([(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)])
  outline = sketch.stroke(line, np.array([0.2, 0.4, 0.6]))
  np.testing.assert_allclose(
    outline, [(0, 0.1), (1, 0.2), (2, 0.3), (2, -0.3), (1, -0.2), (0, -0.1)]
  )


def test_an_ellipse_has_its_radii():
  points = sketch.ellipse(1.0, 2.0, rx=3.0, ry=0.5, steps=4)
  np.testing.assert_allclose(points, [(4, 2), (1, 2.5), (-2, 2), (1, 1.5)], atol=1e-12)


def test_a_mixed_colour_lies_between_the_two():
  assert sketch.mixed((0, 100, 200), (100, 0, 200), 0.25) == (25, 75, 200)
  assert sketch.scaled((100, 200, 20), 1.5) == (150, 255, 30)


def test_the_middle_of_the_face_stands_before_its_side_and_the_plane():
  middle, side = np.array([(0.0, 0.0)]), np.array([(0.6, 0.0)])
  lines = [
    (middle, Depth.FACE, 0.0),
    (side, Depth.FACE, 0.0),
    (middle, Depth.FLAT, 0.25),
    (np.array([(0.0, 1.0)]), Depth.RIM, 0.0),
  ]
  z = sketch.in_space(lines, cheek=0.7)[:, 2]
  assert z[0] == sketch.FACE_DEPTH
  assert z[0] > z[1] > z[2] == 0.25
  np.testing.assert_allclose(z[3], 0.38)
