"""Cosines between all identities of two files, a block at a time."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from facedist import errors
from tfrecords_tools import centres

MOST_PAIRS = 1_000_000
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
"""Quantiles that are told."""
_BINS_A_UNIT = 1000


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two identities by their places, and the cosine of their means."""

  first: int
  second: int
  cosine: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What all cosines are like, and the highest of them.

  Attributes:
    pairs: Those above the threshold, best first.
    histogram: int64[2001], how many cosines are nearest to -1, -0.999, ..., 1.
    best: float32[identities of the first], each one's highest cosine.
  """

  pairs: list[Pair]
  histogram: np.ndarray
  best: np.ndarray

  def quantiles(self) -> dict[str, dict[str, float]]:
    """Returns cosines by quantile: at most that share of the cosines is below it."""
    ranks = [np.ceil(share * self.histogram.sum()) for share in SHARES]
    bins = np.searchsorted(np.cumsum(self.histogram), ranks)
    best = np.quantile(self.best, SHARES, method="inverted_cdf")
    keys = [f"{share:g}" for share in SHARES]
    return {
      "all_pairs": dict(zip(keys, (bins / _BINS_A_UNIT - 1).tolist(), strict=True)),
      "best_matches": dict(zip(keys, best.round(6).tolist(), strict=True)),
    }


def compare(
  first: centres.Centres, second: centres.Centres, *, threshold: float
) -> Comparison:
  """Compares every identity of the first with every one of the second.

  Raises:
    errors.UsageError: More pairs are above the threshold than can be looked through.
  """
  histogram = np.zeros(2 * _BINS_A_UNIT + 1, np.int64)
  best = np.full(len(first.names), -1, np.float32)
  pairs: list[Pair] = []
  for row, column, cosines in _blocks(first, second):
    places = np.rint((cosines + 1) * _BINS_A_UNIT).astype(np.int64).ravel()
    histogram += np.bincount(places, minlength=len(histogram))
    rows = slice(row, row + len(cosines))
    best[rows] = np.maximum(best[rows], cosines.max(axis=1))
    found = np.argwhere(cosines > threshold)
    if len(pairs) + len(found) > MOST_PAIRS:
      raise errors.UsageError(
        f"--threshold={threshold:g} finds more than {MOST_PAIRS:,} pairs; raise it."
      )
    pairs += [
      Pair(row + one, column + other, float(cosines[one, other]))
      for one, other in found.tolist()
    ]
  pairs.sort(key=lambda pair: (-pair.cosine, pair.first, pair.second))
  return Comparison(pairs, histogram, best)


def _blocks(
  first: centres.Centres, second: centres.Centres
) -> Iterator[tuple[int, int, np.ndarray]]:
  """Yields places of a block's first identities and float32[block, block] cosines."""
  row = 0
  for ours in first.blocks:
    column = 0
    for others in second.blocks:
      yield row, column, np.clip(ours @ others.T, -1, 1)
      column += len(others)
    row += len(ours)
