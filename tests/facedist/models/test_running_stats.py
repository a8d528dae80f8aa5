import numpy as np
import tensorflow as tf

from facedist.models.heads import running_stats

RNG = np.random.default_rng(0)


def test_the_curriculum_moves_to_the_mean_target_cosine_of_all_replicas():
  target = RNG.uniform(-1, 1, 12)
  halves = [
    running_stats.curriculum_sums(tf.constant(half))
    for half in (target[:3], target[3:])
  ]
  after = running_stats.next_curriculum(
    tf.constant([0.5], tf.float64), tf.add_n(halves), momentum=0.9
  )
  np.testing.assert_allclose(after, [0.9 * 0.5 + 0.1 * target.mean()], rtol=1e-12)


def test_the_norms_mean_and_deviation_are_those_of_all_replicas():
  norms = RNG.normal(22, 1, 16).astype(np.float32)
  statistics = tf.constant([20.0, 100.0])
  halves = [
    running_stats.norm_sums(statistics, tf.constant(half))
    for half in (norms[:5], norms[5:])
  ]
  after = running_stats.next_norms(statistics, tf.add_n(halves), momentum=0.99)
  expected = [
    0.99 * 20 + 0.01 * norms.mean(dtype=np.float64),
    0.99 * 100 + 0.01 * norms.std(ddof=1, dtype=np.float64),
  ]
  np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_a_norm_above_100_counts_as_100():
  statistics = tf.constant([20.0, 100.0])
  sums = running_stats.norm_sums(statistics, tf.constant([1e6, 0.0]))
  np.testing.assert_allclose(sums, [2, 80 - 19.999, 80**2 + 19.999**2], rtol=1e-6)


def test_one_sample_or_equal_norms_leave_the_statistics_finite():
  statistics = tf.constant([20.0, 1.0])
  for norms in ([5.0], [5.0, 5.0, 5.0], [0.0]):
    sums = running_stats.norm_sums(statistics, tf.constant(norms))
    after = running_stats.next_norms(statistics, sums, momentum=0.0)
    np.testing.assert_allclose(after, [max(norms[0], 1e-3), 0.0], atol=1e-5)
    score = running_stats.norm_score(after, tf.constant(norms), concentration=0.333)
    assert np.abs(score).max() < 0.01


def test_a_score_is_a_fraction_of_the_deviations_and_at_most_one():
  statistics = tf.constant([20.0, 2.0])
  norms = tf.constant([20.0, 22.0, 18.0, 30.0, 1.0])
  score = running_stats.norm_score(statistics, norms, concentration=0.333)
  np.testing.assert_allclose(score, [0, 0.333, -0.333, 1, -1], atol=1e-3)
