"""Which identities a step compares with: Partial FC's sample (arXiv:2203.15565)."""

import tensorflow as tf

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_KEPT_BITS = 32
_WORD = 1 << 64


def is_sampled(
  identities: tf.Tensor, *, seed: int, step: tf.Tensor, rate: float
) -> tf.Tensor:
  """Draws each identity with probability `rate`, by a hash of seed, step and identity.

  Whoever asks, about however many identities, hears the same. The hash is
  `data.hashing.combine`, on the accelerator.

  Args:
    identities: int64[n].
    seed: The run's.
    step: int64[], number of finished steps.
    rate: Share of identities, in [0, 1].

  Returns:
    bool[n].
  """
  state = _mix(tf.constant(_signed(seed), tf.int64))
  for part in (step, identities):
    state = _mix(tf.bitwise.bitwise_xor(state, part))
  return _shifted(state, 64 - _KEPT_BITS) < round(rate * 2**_KEPT_BITS)


def _mix(values: tf.Tensor) -> tf.Tensor:
  """Scrambles int64[...]: SplitMix64's step, in products that wrap around."""
  values += _signed(_GOLDEN)
  for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
    values = tf.bitwise.bitwise_xor(values, _shifted(values, shift))
    values *= _signed(multiplier)
  return tf.bitwise.bitwise_xor(values, _shifted(values, _SHIFTS[-1]))


def _shifted(values: tf.Tensor, places: int) -> tf.Tensor:
  """Shifts int64[...] to the right and fills up with zeros, not with the sign."""
  unsigned = tf.bitcast(values, tf.uint64)
  moved = tf.bitwise.right_shift(unsigned, tf.constant(places, tf.uint64))
  return tf.bitcast(moved, tf.int64)


def _signed(number: int) -> int:
  """Returns the number with these lowest 64 bits that an int64 holds."""
  word = number % _WORD
  return word - _WORD if word >= _WORD // 2 else word
