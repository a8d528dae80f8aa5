"""Which records stay: rules on columns of numbers, each record a row.

A label of LEFT_OUT marks a record that is out. Memory is some bytes a record: 16 for
labels and counts, 60 while images are drawn, 40 while duplicates are looked for.
"""

import numpy as np

LEFT_OUT = -1
ACROSS = ("drop_all", "keep_first")
"""What becomes of copies under different identities."""
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_STEP = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def listed(names: tuple[str, ...], own: tuple[str, ...], lines: set[str]) -> np.ndarray:
  """Says which identities a list names, by the selection's name or by their own.

  Args:
    names: What the selection calls each identity.
    own: What the input calls it.
    lines: The list.

  Returns:
    bool[identities].
  """
  pairs = zip(names, own, strict=True)
  return np.array([name in lines or old in lines for name, old in pairs], bool)


def draws(seed: int, shard: int, offsets: np.ndarray) -> np.ndarray:
  """Returns a number for each record that looks random.

  It depends on the seed and on the record alone, so an image that is kept stays so
  when others come or go: SplitMix64's step (Steele et al., OOPSLA 2014, fig. 14).

  Args:
    seed: Any integer.
    shard: CRC-32C of the shard's file.
    offsets: uint64[records], bytes of the shard at which they start.

  Returns:
    uint64[records].
  """
  state = np.full(1, ((seed << 32) + shard + _STEP) & _WORD, np.uint64)
  return _mix(_mix(state) + offsets.astype(np.uint64))


def keep_at_least(
  labels: np.ndarray, *, num_train: int, num_identities: int, minimum: int
) -> np.ndarray:
  """Leaves out identities with too few images, or with none to train on.

  Args:
    labels: int32[records], LEFT_OUT for those that are out already.
    num_train: The first so many records are train's, the others val's.
    num_identities: Labels are below it.
    minimum: Images, those of train and val together.

  Returns:
    bool[identities], true for those that stay.
  """
  counts = _counts(labels, num_identities)
  train_counts = _counts(labels[:num_train], num_identities)
  return (counts >= minimum) & (train_counts > 0)


def keep_at_most(
  labels: np.ndarray, drawn: np.ndarray, *, num_identities: int, maximum: int
) -> np.ndarray:
  """Keeps of each identity the images with the smallest draws.

  Args:
    labels: int32[records] of train, LEFT_OUT for those that are out already.
    drawn: uint64[records] from `draws`.
    num_identities: Labels are below it.
    maximum: Images of an identity.

  Returns:
    bool[records], true for those that stay.
  """
  counts = _counts(labels, num_identities)
  crowded = np.append(counts > maximum, False)  # the last place is LEFT_OUT's
  candidates = np.flatnonzero(crowded[labels])
  order = candidates[np.lexsort((drawn[candidates], labels[candidates]))]
  _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
  rank = np.arange(len(order)) - np.repeat(first, sizes)
  stays = labels != LEFT_OUT
  stays[order[rank >= maximum]] = False
  return stays


def renumber(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns labels without gaps, in the same order; LEFT_OUT where not kept.

  Args:
    labels: int32[records].
    kept: bool[identities].
  """
  new = np.append(np.cumsum(kept, dtype=np.int32) - 1, LEFT_OUT).astype(np.int32)
  new[:-1][~kept] = LEFT_OUT
  return new[labels]


def _counts(labels: np.ndarray, num_identities: int) -> np.ndarray:
  """Returns int64[identities], images of each."""
  return np.bincount(labels[labels != LEFT_OUT], minlength=num_identities)


def _mix(values: np.ndarray) -> np.ndarray:
  """Scrambles uint64[n]; a bijection."""
  values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
  values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
  return values ^ (values >> _SHIFTS[2])
