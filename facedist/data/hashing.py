"""Random numbers as a pure function of a seed and counters: hashes of integers.

Sampling, augmentation, replacements and selections use them. `models/random.py` has the
same hash for the accelerator.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Odd numbers; the upper bits of a product with them depend on all lower bits."""
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_WORD = (1 << 64) - 1


def combine(seed: int, *parts: np.ndarray) -> np.ndarray:
  """Hashes a seed and arrays that broadcast together to one number per element.

  Args:
    seed: Any integer; only its lower 64 bits count.
    *parts: Integer arrays; their order matters.

  Returns:
    uint64 array of the broadcast shape.
  """
  state: np.ndarray = np.array([seed & _WORD], np.uint64)
  for part in parts:
    state = mix(state) ^ np.asarray(part).astype(np.uint64)
  return mix(state)


def mix(values: np.ndarray) -> np.ndarray:
  """Scrambles each number: SplitMix64's step (Steele et al., OOPSLA 2014, fig. 14).

  Args:
    values: uint64[...].

  Returns:
    uint64[...]; a bijection of 64-bit numbers whose output bits look independent.
  """
  return finalize(values + _GOLDEN)


def finalize(values: np.ndarray) -> np.ndarray:
  """Scrambles each number without adding the constant first: `mix64` of that paper."""
  values = (values ^ (values >> _SHIFTS[0])) * MULTIPLIERS[0]
  values = (values ^ (values >> _SHIFTS[1])) * MULTIPLIERS[1]
  return values ^ (values >> _SHIFTS[2])
