"""Which identities a step compares with: Partial FC's sample (arXiv:2203.15565)."""

import tensorflow as tf

from facedist.models import hashing


def is_sampled(
  identities: tf.Tensor, *, seed: int, step: tf.Tensor, rate: float
) -> tf.Tensor:
  """Draws each identity with probability `rate`, by a hash of seed, step and identity.

  Whoever asks, about however many identities, hears the same.

  Args:
    identities: int64[n].
    seed: The run's.
    step: int64[], number of finished steps.
    rate: Share of identities, in [0, 1].

  Returns:
    bool[n].
  """
  return hashing.is_below(hashing.combine(seed, step, identities), rate)
