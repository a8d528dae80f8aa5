"""Hashes of integers in TensorFlow, for random choices without a generator's state.

They equal the NumPy hashes of `data/hashing.py` bit for bit.
"""

import tensorflow as tf

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_KEPT_BITS = 32
_WORD = 1 << 64


def combine(seed: int, *parts: tf.Tensor) -> tf.Tensor:
  """Hashes a seed and int64 tensors that broadcast together to one int64 an element."""
  state = mix(tf.constant(_signed(seed), tf.int64))
  for part in parts:
    state = mix(tf.bitwise.bitwise_xor(state, part))
  return state


def is_below(hashes: tf.Tensor, rate: float) -> tf.Tensor:
  """Returns bool[...]: True for a fraction `rate`, in [0, 1], of int64[...] hashes."""
  return _shifted(hashes, 64 - _KEPT_BITS) < round(rate * 2**_KEPT_BITS)


def mix(values: tf.Tensor) -> tf.Tensor:
  """Scrambles int64[...] by a step of SplitMix64; its products wrap around."""
  values += _signed(_GOLDEN)
  for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
    values = tf.bitwise.bitwise_xor(values, _shifted(values, shift))
    values *= _signed(multiplier)
  return tf.bitwise.bitwise_xor(values, _shifted(values, _SHIFTS[-1]))


def _shifted(values: tf.Tensor, places: int) -> tf.Tensor:
  """Shifts int64[...] to the right and fills with zeros, not with the sign."""
  unsigned = tf.bitcast(values, tf.uint64)
  moved = tf.bitwise.right_shift(unsigned, tf.constant(places, tf.uint64))
  return tf.bitcast(moved, tf.int64)


def _signed(number: int) -> int:
  """Returns the int64 that has the same lowest 64 bits."""
  word = number % _WORD
  return word - _WORD if word >= _WORD // 2 else word
