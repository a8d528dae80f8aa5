import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from facedist.models.heads import replicated
from facedist.models.heads.margins import MarginInput
from facedist.training import metrics


def batch_sums(
  cosines, labels, weights=None, damaged=None, scale=8.0, metric_loss=None
):
  count, cosines = len(labels), tf.constant(cosines, tf.float32)
  inputs = MarginInput(
    cosines=cosines,
    is_target=tf.one_hot(labels, cosines.shape[1], on_value=True, off_value=False),
    target=tf.gather(cosines, labels, batch_dims=1),
    norms=tf.ones(count),
    running_statistics=tf.zeros(0),
  )
  losses = tf.range(count, dtype=tf.float32)
  return metrics.sums(
    replicated.head_output(
      inputs, tf.constant(labels, tf.int32), losses=losses, scale=scale
    ),
    weights=tf.ones(count) if weights is None else tf.constant(weights, tf.float32),
    damaged=tf.zeros(count) if damaged is None else tf.constant(damaged, tf.float32),
    metric_loss=metric_loss,
  ).numpy()


def test_sums_of_a_hand_made_batch():
  cosines = [
    [0.9, 0.0, 0.0],  # right and sure
    [0.9, 0.0, 0.0],  # wrong and sure
    [0.02, 0.01, 0.0],  # right, unsure: p about 0.35
  ]
  sums = batch_sums(cosines, [0, 1, 0])
  expected = [3.0, 3.0, 2.0, 1.0, 1.0, 0.92, np.nan, 0.0]  # there is no metric loss
  np.testing.assert_allclose(sums, expected, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), identities=st.integers(2, 9))
def test_precision_and_recall_equal_keras_on_one_hot_labels(seed: int, identities: int):
  rng = np.random.default_rng(seed)
  cosines = rng.uniform(-1, 1, (32, identities)).astype(np.float32)
  labels = rng.integers(0, identities, 32)
  scale = rng.uniform(1, 20)
  probabilities = tf.nn.softmax(scale * cosines)
  one_hot = tf.one_hot(labels, identities)
  precision, recall = tf.keras.metrics.Precision(), tf.keras.metrics.Recall()
  precision.update_state(one_hot, probabilities)
  recall.update_state(one_hot, probabilities)
  summary = metrics.summarise(batch_sums(cosines, labels, scale=scale))
  np.testing.assert_allclose(summary.precision, precision.result(), rtol=1e-5)
  np.testing.assert_allclose(summary.recall, recall.result(), rtol=1e-5)
  accuracy = np.mean(np.argmax(cosines, axis=1) == labels)
  np.testing.assert_allclose(summary.accuracy, accuracy, rtol=1e-6)


def test_padding_counts_nowhere_even_where_it_is_not_a_number():
  whole = batch_sums([[0.9, 0.1]], [0])
  padded = batch_sums([[0.9, 0.1], [np.nan, np.nan]], [0, 0], weights=[1, 0])
  np.testing.assert_allclose(padded, whole)


def test_a_metric_loss_is_the_mean_over_steps_and_absent_where_there_is_none():
  steps = [
    batch_sums([[0.9, 0.1]] * 4, [0] * 4, metric_loss=loss) for loss in (2.0, 3.0)
  ]
  scalars = metrics.summarise(np.sum(steps, axis=0)).scalars()
  assert scalars["metric_loss"] == 2.5
  assert "metric_loss" not in metrics.summarise(batch_sums([[0.9, 0.1]], [0])).scalars()


def test_damaged_records_are_counted_whatever_they_weigh():
  sums = batch_sums([[0.9, 0.1]] * 3, [0] * 3, weights=[1, 0, 1], damaged=[1, 1, 0])
  summary = metrics.summarise(sums)
  assert (summary.samples, summary.damaged) == (2, 2)
  assert "damaged" not in summary.scalars()


def test_precision_is_zero_where_nothing_is_predicted():
  summary = metrics.summarise(batch_sums([[0.0, 0.0, 0.0]], [1]))
  assert (summary.precision, summary.recall, summary.samples) == (0.0, 0.0, 1)
