import cv2
import numpy as np
import pytest

from facedist import errors
from facedist.evaluation import sphere

FIRST, SECOND = (31, 119, 180), (255, 127, 14)  # of Matplotlib's tab10


def plot_of(size: int, classes: dict[str, list[list[float]]]) -> sphere.Plot:
  plot = sphere.Plot(embedding_size=size, num_images=4, flag="--plot=a.png")
  for name, embeddings in classes.items():
    for embedding in embeddings:
      plot.add(identity=name, embedding=np.array(embedding, np.float32))
  return plot


def pixels_of(content: bytes) -> np.ndarray:
  """Decodes a picture to int[height, width, 3] RGB."""
  return cv2.imdecode(np.frombuffer(content, np.uint8), 1)[..., ::-1].astype(int)


def is_tinted(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
  """Says of each pixel whether it is the colour at 50 to 100 % over the paper."""
  paper, wanted = np.array([244, 244, 241]), np.array(colour)
  share = (pixels - paper) @ (wanted - paper) / ((wanted - paper) @ (wanted - paper))
  blend = paper + share[..., None] * (wanted - paper)
  return (share > 0.45) & (np.abs(pixels - blend).max(axis=-1) < 6)


def test_opposite_classes_lie_on_the_two_sides_of_the_sphere_one_on_each():
  cap = np.array([[0.3, 0, 1], [-0.3, 0, 1], [0, 0.3, 1], [0, -0.3, 1]])
  drawn = plot_of(3, {"a": (5 * cap).tolist(), "b": (-cap).tolist()})
  pixels = pixels_of(drawn.png("a run"))
  middle = pixels.shape[1] // 2
  sides = [
    [is_tinted(side, colour).any() for side in (pixels[:, :middle], pixels[:, middle:])]
    for colour in (FIRST, SECOND)
  ]
  assert sides in ([[True, False], [False, True]], [[False, True], [True, False]])


def test_embeddings_of_two_floats_lie_on_the_circle_where_they_point_to():
  drawn = plot_of(2, {"a": [[3, 0]], "b": [[0, 0.2]]})
  pixels = pixels_of(drawn.png("a run"))
  (rows, columns), (tops, middles) = (
    np.nonzero(is_tinted(pixels, colour)) for colour in (FIRST, SECOND)
  )
  height, width = pixels.shape[:2]
  assert columns.min() > 0.8 * width  # to the right
  assert abs(rows.mean() / height - 0.5) < 0.1
  assert tops.max() < 0.3 * height  # above
  assert abs(middles.mean() / width - 0.5) < 0.1


def test_the_same_embeddings_give_the_same_bytes():
  pictures = {plot_of(3, {"a": [[1, 2, 3]]}).png("a run") for _ in range(2)}
  assert len(pictures) == 1


def test_the_view_keeps_every_class_away_from_the_rim():
  means = np.concatenate([np.eye(3), -np.eye(3)])
  view = sphere.best_view(means)
  # no direction has all axes nearer than a corner of the cube, 1/sqrt(3) = 0.577
  np.testing.assert_allclose(np.abs(view), 0.577, atol=0.06)
  np.testing.assert_allclose(np.linalg.norm(view), 1)


@pytest.mark.parametrize(("size", "count"), [(2, 0), (3, 0), (3, 40)])
def test_none_or_many_classes_are_drawn(
  size: int, count: int
):  # names of 40 do not fit
  rng = np.random.default_rng(0)
  classes = {str(n): rng.normal(size=(1, 3)).tolist() for n in range(count)}
  assert pixels_of(plot_of(size, classes).png("a run")).shape[-1] == 3


def test_very_many_embeddings_are_thinned_evenly():
  plot = sphere.Plot(embedding_size=2, num_images=50_000, flag="--plot=a.png")
  for number in range(50_000):
    plot.add(identity=str(number % 2), embedding=np.array([1.0, number]))
  assert plot.num_points == 16_667  # every third


@pytest.mark.parametrize("size", [1, 4, 512])
def test_embeddings_that_lie_on_neither_are_refused_with_the_fix(size: int):
  with pytest.raises(
    errors.UsageError, match=rf"--plot=a\.png draws .* have {size}; .*_size=3"
  ):
    plot_of(size, {})
