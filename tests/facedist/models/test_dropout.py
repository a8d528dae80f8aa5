import numpy as np
import pytest
import tensorflow as tf

from facedist.models import network

SHAPE = 64, 5, 5, 8
RATE = 0.3
KEYS = np.random.default_rng(0).integers(-(2**31), 2**31, SHAPE[0]).astype(np.int32)


def dropped(values: np.ndarray, keys: np.ndarray = KEYS) -> np.ndarray:
  return network.SampleDropout(RATE)((values, keys), training=True).numpy()


def test_the_fraction_is_dropped_and_the_rest_scaled_up():
  found = dropped(np.full(SHAPE, 7, np.float32))
  fraction = np.mean(found == 0)
  deviation = np.sqrt(RATE * (1 - RATE) / found.size)
  assert abs(fraction - RATE) < 4 * deviation
  np.testing.assert_allclose(found[found != 0], 7 / (1 - RATE), rtol=1e-6)


def test_what_is_dropped_of_a_sample_depends_on_its_key_alone():
  ones = np.ones(SHAPE, np.float32)
  whole = dropped(ones)
  np.testing.assert_array_equal(dropped(ones[:3], KEYS[40:43]), whole[40:43])
  assert not np.array_equal(whole[40], whole[41])


def test_samples_and_places_drop_independently():
  is_dropped = (dropped(np.ones(SHAPE, np.float32)) == 0).reshape(SHAPE[0], -1)
  for table in (is_dropped, is_dropped.T):
    correlations = np.corrcoef(table) - np.eye(len(table))
    assert abs(correlations).max() < 6 / np.sqrt(table.shape[1])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
def test_the_dtype_stays_and_what_is_dropped_has_no_gradient(dtype: tf.DType):
  values = tf.ones(SHAPE, dtype)
  policy = "float32" if dtype == tf.float32 else f"mixed_{dtype.name}"
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(policy)
  layer = network.SampleDropout(RATE)
  tf.keras.mixed_precision.set_global_policy(before)
  with tf.GradientTape() as tape:
    tape.watch(values)
    found = layer((values, KEYS), training=True)
  assert found.dtype == dtype
  np.testing.assert_array_equal(tape.gradient(found, values), found)
