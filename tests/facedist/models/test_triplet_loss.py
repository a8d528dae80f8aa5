"""Triplet losses against loops in NumPy, and what they do where there is no triplet."""

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.models import triplet_loss
from facedist.models.gather import gather_batch
from facedist.models.triplet_loss import TRIPLET_LOSSES

MARGINS = {"triplet_semihard": 0.2, "triplet_hard": 0.3}


def by_hand(kind: str, embeddings: np.ndarray, labels: np.ndarray) -> float:
  """The definitions of the papers, triplet by triplet, in float64."""
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  distances = np.linalg.norm(unit[:, None] - unit[None], axis=2)
  if kind == "triplet_semihard":
    distances **= 2
  losses = []
  for anchor, row in enumerate(distances):
    negatives = row[labels != labels[anchor]]
    others = np.arange(len(labels)) != anchor
    positives = row[(labels == labels[anchor]) & others]
    if kind == "triplet_hard":
      hardest = max(positives, default=0.0)
      losses.append(max(0.0, hardest - negatives.min() + MARGINS[kind]))
      continue
    for positive in positives:
      farther = negatives[negatives > positive]
      negative = farther.min() if len(farther) else negatives.max()
      losses.append(max(0.0, positive - negative + MARGINS[kind]))
  return float(np.mean(losses))


def loss_and_gradient(
  kind: str, embeddings: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray]:
  inputs = tf.constant(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(inputs)
    loss = triplet_loss.triplet_loss(
      inputs, tf.constant(labels), kind=kind, margin=MARGINS[kind]
    )
  gradient = tape.gradient(loss, inputs)
  assert loss.dtype == tf.float32
  return float(loss), gradient.numpy()


@pytest.mark.parametrize("kind", TRIPLET_LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_and_its_gradient_are_those_of_the_paper(kind: str, seed: int):
  rng = np.random.default_rng(seed)
  labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 5], np.int32)
  rng.shuffle(labels)
  embeddings = rng.normal(size=(len(labels), 4)) + rng.normal(size=(6, 4))[labels]
  loss, gradient = loss_and_gradient(kind, embeddings.astype(np.float32), labels)
  assert loss > 0.01
  np.testing.assert_allclose(loss, by_hand(kind, embeddings, labels), rtol=1e-5)
  slopes = np.zeros_like(embeddings)
  for place in np.ndindex(*embeddings.shape):
    step = np.zeros_like(embeddings)
    step[place] = 1e-6
    both = [by_hand(kind, embeddings + sign * step, labels) for sign in (1, -1)]
    slopes[place] = (both[0] - both[1]) / 2e-6
  np.testing.assert_allclose(gradient, slopes, atol=2e-5)


@pytest.mark.parametrize("kind", TRIPLET_LOSSES)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [7, 7, 7, 7], [3]])
def test_without_a_triplet_loss_and_gradient_are_zero(kind: str, labels: list[int]):
  embeddings = np.random.default_rng(0).normal(size=(len(labels), 3))
  loss, gradient = loss_and_gradient(
    kind, embeddings.astype(np.float32), np.array(labels, np.int32)
  )
  assert loss == 0.0
  np.testing.assert_array_equal(gradient, np.zeros_like(embeddings))


NORMAL = np.random.default_rng(1).normal(size=(6, 3))


@pytest.mark.parametrize("kind", TRIPLET_LOSSES)
@pytest.mark.parametrize(
  "embeddings",
  [
    NORMAL[[0] * 6],
    NORMAL[[0] * 6] + 1e-7 * NORMAL,
    NORMAL[[0, 0, 2, 3, 2, 5]],  # two pairs, of one identity and of two
    NORMAL * [[0], [0], [1], [1], [1], [0]],
  ],
  ids=["equal", "nearly equal", "duplicates", "zeros"],
)
def test_equal_embeddings_and_zero_vectors_have_finite_gradients(
  kind: str, embeddings: np.ndarray
):
  labels = np.array([0, 0, 1, 1, 2, 2], np.int32)
  loss, gradient = loss_and_gradient(kind, embeddings.astype(np.float32), labels)
  assert np.isfinite(loss)
  assert np.abs(gradient).max() < 10.0


@pytest.mark.parametrize("kind", TRIPLET_LOSSES)
def test_embeddings_of_half_precision_are_compared_in_float32(kind: str):
  rng = np.random.default_rng(2)
  labels = np.array([0, 1, 0, 1], np.int32)
  embeddings = rng.normal(size=(4, 64)).astype(np.float16)
  loss, _ = loss_and_gradient(kind, embeddings, labels)
  expected = by_hand(kind, embeddings.astype(np.float64), labels)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", TRIPLET_LOSSES)
def test_replicas_together_have_the_loss_and_gradient_of_one(
  kind: str, two_replicas: tf.distribute.MirroredStrategy
):
  rng = np.random.default_rng(3)
  labels = (rng.permutation(12) % 4 + 2**31 - 5).astype(np.int32)
  embeddings = rng.normal(size=(12, 8)).astype(np.float32)

  def replica() -> tuple[tf.Tensor, ...]:
    place = tf.distribute.get_replica_context().replica_id_in_sync_group
    inputs = tf.constant(embeddings.reshape(2, 6, 8))[place]
    own_labels = tf.constant(labels.reshape(2, 6))[place]
    with tf.GradientTape() as tape:
      tape.watch(inputs)
      all_embeddings, all_labels = gather_batch(inputs, own_labels)
      loss = triplet_loss.triplet_loss(
        all_embeddings, all_labels, kind=kind, margin=MARGINS[kind]
      )
      part = loss / 2
    return loss, all_labels, tape.gradient(part, inputs)

  results = tf.function(lambda: two_replicas.run(replica))()
  losses, gathered, gradients = (
    two_replicas.experimental_local_results(result) for result in results
  )
  loss, gradient = loss_and_gradient(kind, embeddings, labels)
  for place in (0, 1):
    np.testing.assert_array_equal(gathered[place], labels)
    np.testing.assert_allclose(losses[place], loss, rtol=1e-6)
  np.testing.assert_allclose(np.concatenate(gradients), gradient, atol=1e-7)


def test_an_unknown_loss_lists_the_known_ones():
  with pytest.raises(errors.UsageError, match="triplet_hard, triplet_semihard"):
    triplet_loss.triplet_loss(
      tf.zeros([2, 2]), tf.constant([0, 0]), kind="triplet", margin=0.2
    )
