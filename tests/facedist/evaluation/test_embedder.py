"""Batches through networks whose embeddings are known by hand."""

import threading

import numpy as np
import pytest

from facedist import errors
from facedist.evaluation import embedder


def edges(images: np.ndarray) -> np.ndarray:
  """Embeds an image as its left and right edge pixels' red values."""
  return images[:, 0, [0, -1], 0].astype(np.float32)


def _images(*edges: tuple[int, int]) -> np.ndarray:
  """uint8[n, 2, 2, 3] images with the given left and right values."""
  return np.array([[[[left] * 3, [right] * 3]] * 2 for left, right in edges], np.uint8)


def _embedder(network, **settings) -> embedder.Embedder:
  return embedder.Embedder(
    network, "fake@step-00000001", **{"batch_size": 4} | settings
  )


def test_the_network_always_gets_the_full_batch():
  shapes = []

  def network(images: np.ndarray) -> np.ndarray:
    shapes.append(images.shape)
    return edges(images)

  batches = [
    (_images((3, 4), (1, 0), (0, 2), (5, 12)), list("abcd")),
    (_images((8, 6)), ["e"]),
  ]
  embeddings = list(_embedder(network, mirror=False).stream(batches))
  assert shapes == [(4, 2, 2, 3)] * 2
  expected = [[0.6, 0.8], [1, 0], [0, 1], [5 / 13, 12 / 13]]
  np.testing.assert_allclose(embeddings[0], expected, rtol=1e-6)
  np.testing.assert_allclose(embeddings[1], [[0.8, 0.6]], rtol=1e-6)
  assert embeddings[0].dtype == np.float32


def test_mirroring_exchanges_left_and_right_only():
  images = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8)
  mirrored = embedder.mirror_images(images)
  np.testing.assert_array_equal(mirrored, images[:, :, ::-1])
  strided = embedder.mirror_images(images[:, :, 1:4])  # a view with gaps in memory
  np.testing.assert_array_equal(strided, images[:, :, 3:0:-1])


def test_raw_embeddings_are_summed_not_their_directions():
  raw = iter([np.array([[4.0, 0.0]] * 4), np.array([[0.0, 3.0]] * 4)])
  embeddings = _embedder(lambda _: next(raw)).embed(_images((0, 0)), ["a"])
  np.testing.assert_allclose(embeddings, [[0.8, 0.6]], rtol=1e-6)


@pytest.mark.parametrize(("mirror", "expected"), [(False, [3, 4]), (True, [7, 7])])
def test_embeddings_leave_as_they_are_where_not_normalised(mirror, expected):
  plain = _embedder(edges, mirror=mirror, normalize=False)
  np.testing.assert_array_equal(plain.embed(_images((3, 4)), ["a"]), [expected])


@pytest.mark.parametrize(
  ("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero")]
)
def test_an_embedding_without_a_direction_is_an_error_that_names_it(value, said):
  def network(images: np.ndarray) -> np.ndarray:
    embeddings = np.ones((len(images), 2), np.float32)
    embeddings[1] = value
    return embeddings

  with pytest.raises(errors.DataError, match=rf"fake@step-00000001.*b\.jpg.*{said}"):
    _embedder(network).embed(_images((1, 1), (1, 1)), ["a.jpg", "b.jpg"])


def test_a_broken_embedding_of_the_padding_is_no_error():
  embeddings = _embedder(edges).embed(_images((1, 0)), ["a"])  # padding embeds as zero
  assert embeddings.shape == (1, 2)


def test_too_many_images_or_floats_are_refused():
  with pytest.raises(ValueError, match=r"\[5\] images"):
    _embedder(edges).embed(_images(*[(1, 1)] * 5), list("abcde"))
  with pytest.raises(ValueError, match="float64"):
    _embedder(edges).embed(_images((1, 1)) / 255.0, ["a"])


def test_batches_are_read_one_ahead_and_no_further():
  read = []

  def batches():
    for number in range(6):
      read.append(number)
      yield number

  stream = embedder.read_ahead(batches())
  assert next(stream) == 0
  assert next(stream) == 1
  assert len(read) <= 3
  assert list(stream) == [2, 3, 4, 5]


def test_an_error_while_reading_ahead_reaches_the_caller():
  def batches():
    yield 1
    raise errors.DataError("record 7 is corrupt.")

  stream = embedder.read_ahead(batches())
  assert next(stream) == 1
  with pytest.raises(errors.DataError, match="record 7"):
    next(stream)


def test_stopping_early_ends_all_threads():
  before = threading.active_count()
  stream = embedder.read_ahead(iter(range(100)))
  next(stream)
  stream.close()
  assert threading.active_count() == before
