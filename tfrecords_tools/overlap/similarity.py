"""Cosines between all identities of two files, a block at a time."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from facedist import errors
from tfrecords_tools.overlap import centroids

MAX_PAIRS = 1_000_000
SHARES = (0.05, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
"""Quantiles that are reported."""
_BINS_A_UNIT = 1000
_MAX_BLOCKS = 8  # compared with themselves: 33 million pairs of 8,192 identities


@dataclasses.dataclass(frozen=True)
class SimilarPair:
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

  pairs: list[SimilarPair]
  histogram: np.ndarray
  best: np.ndarray

  def quantiles(self) -> dict[str, dict[str, float]]:
    """Returns cosines by quantile: at most that share of the cosines is below it."""
    return {
      "all_pairs": _quantiles_of_bins(self.histogram),
      "best_matches": _quantiles(self.best),
    }


@dataclasses.dataclass(frozen=True)
class Reference:
  """The cosines within one file, whose identities are known.

  Attributes:
    threshold: Cosine above which two identities are taken for one.
    histogram: int64[2001], as of `Comparison`, of pairs of different identities.
    num_above: How many of these pairs are above the threshold.
    halves: float32[identities], `centroids.Centroids.halves`.
  """

  threshold: float
  histogram: np.ndarray
  num_above: int
  halves: np.ndarray

  @property
  def false_match_rate(self) -> float | None:
    """Share of pairs of different people above the threshold; none without pairs."""
    pairs = int(self.histogram.sum())
    return self.num_above / pairs if pairs else None

  @property
  def miss_rate(self) -> float | None:
    """Share of people whose two halves are not above the threshold."""
    missed = self.halves <= self.threshold
    return float(missed.mean()) if len(missed) else None

  def quantiles(self) -> dict[str, dict[str, float]]:
    """Returns cosines by quantile, of what there is."""
    found = {}
    if self.histogram.any():
      found["different_people"] = _quantiles_of_bins(self.histogram)
    if len(self.halves):
      found["same_people"] = _quantiles(self.halves)
    return found


def compare_identities(
  first: centroids.Centroids, second: centroids.Centroids, *, threshold: float
) -> Comparison:
  """Compares every identity of the first with every one of the second.

  Raises:
    errors.UsageError: More pairs are above the threshold than can be looked through.
  """
  histogram = np.zeros(2 * _BINS_A_UNIT + 1, np.int64)
  best = np.full(len(first.names), -1, np.float32)
  pairs: list[SimilarPair] = []
  for row, column, cosines in _blocks(first, second):
    histogram += _bins(cosines)
    rows = slice(row, row + len(cosines))
    best[rows] = np.maximum(best[rows], cosines.max(axis=1))
    found = np.argwhere(cosines > threshold)
    if len(pairs) + len(found) > MAX_PAIRS:
      raise errors.UsageError(
        f"--threshold={threshold:g} finds more than {MAX_PAIRS:,} pairs; raise it."
      )
    pairs += [
      SimilarPair(row + one, column + other, float(cosines[one, other]))
      for one, other in found.tolist()
    ]
  pairs.sort(key=lambda pair: (-pair.cosine, pair.first, pair.second))
  return Comparison(pairs, histogram, best)


def refer(others: centroids.Centroids, *, threshold: float) -> Reference:
  """Compares the first identities of a file with one another, and with themselves.

  Args:
    others: Read with halves.
    threshold: Cosine above which two identities are taken for one.
  """
  histogram = np.zeros(2 * _BINS_A_UNIT + 1, np.int64)
  num_above = 0
  blocks = others.blocks[:_MAX_BLOCKS]
  for place, ours in enumerate(blocks):
    for other, theirs in enumerate(blocks[place:]):
      cosines = np.clip(ours @ theirs.T, -1, 1)
      if not other:  # each pair once, and none with itself
        cosines = cosines[np.triu_indices(len(ours), 1)]
      histogram += _bins(cosines)
      num_above += int((cosines > threshold).sum())
  halves = np.zeros(0, np.float32) if others.halves is None else others.halves
  return Reference(threshold, histogram, num_above, halves)


def _bins(cosines: np.ndarray) -> np.ndarray:
  """Returns int64[2001], how many cosines are nearest to -1, -0.999, ..., 1."""
  places = np.rint((cosines + 1) * _BINS_A_UNIT).astype(np.int64).ravel()
  return np.bincount(places, minlength=2 * _BINS_A_UNIT + 1)


def _quantiles_of_bins(histogram: np.ndarray) -> dict[str, float]:
  """Returns cosines by quantile of what `_bins` counted."""
  ranks = [np.ceil(share * histogram.sum()) for share in SHARES]
  bins = np.searchsorted(np.cumsum(histogram), ranks)
  return _by_share((bins / _BINS_A_UNIT - 1).round(3).tolist())


def _quantiles(cosines: np.ndarray) -> dict[str, float]:
  """Returns cosines by quantile."""
  found = np.quantile(cosines, SHARES, method="inverted_cdf")
  return _by_share(found.round(6).tolist())


def _by_share(values: list[float]) -> dict[str, float]:
  return dict(zip((f"{share:g}" for share in SHARES), values, strict=True))


def _blocks(
  first: centroids.Centroids, second: centroids.Centroids
) -> Iterator[tuple[int, int, np.ndarray]]:
  """Yields places of a block's first identities and float32[block, block] cosines."""
  row = 0
  for ours in first.blocks:
    column = 0
    for others in second.blocks:
      yield row, column, np.clip(ours @ others.T, -1, 1)
      column += len(others)
    row += len(ours)
