import numpy as np
import tensorflow as tf

from facedist.models import heads


def test_cosface_lowers_only_the_target_logit():
  cosines = tf.constant([[0.5, 0.2], [-0.1, 0.9]])
  logits = heads.cosface_logits(cosines, tf.constant([0, 1]), margin=0.25, scale=64.0)
  np.testing.assert_allclose(logits, [[16.0, 12.8], [-6.4, 41.6]], rtol=1e-6)


def test_cosines_ignore_the_lengths_of_embeddings_and_centres():
  embeddings = tf.constant([[3.0, 0.0], [5.0, 5.0]])
  centres = tf.constant([[0.1, 0.0], [0.0, 7.0], [-2.0, 0.0]])
  half = np.sqrt(0.5)
  expected = [[1.0, 0.0, -1.0], [half, half, -half]]
  np.testing.assert_allclose(heads.cosines(embeddings, centres), expected, atol=1e-6)


def test_a_zero_embedding_has_cosine_zero_and_a_finite_gradient():
  embeddings = tf.zeros((1, 4))
  centres = tf.ones((2, 4))
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    cosines = heads.cosines(embeddings, centres)
  np.testing.assert_array_equal(cosines, [[0.0, 0.0]])
  assert np.isfinite(tape.gradient(cosines, embeddings)).all()


def test_cosines_are_float32_under_half_precision_embeddings():
  embeddings = tf.ones((1, 4), tf.float16)
  assert heads.cosines(embeddings, tf.ones((2, 4))).dtype == tf.float32


def test_centres_are_a_function_of_the_seed():
  def centres(seed: int) -> np.ndarray:
    head = heads.MarginHead(num_identities=3, embedding_size=4, seed=seed)
    return head.centres.numpy()

  np.testing.assert_array_equal(centres(1), centres(1))
  assert not np.array_equal(centres(1), centres(2))
