"""Scores of a labelled set: all its pairs (1:1), and identification (1:N).

Pure functions of NumPy arrays. Scores are products of matrices, taken in blocks, so
memory depends on the number of images and not on the number of pairs.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from facedist import errors
from facedist.evaluation import verification

STEPS = 1 << 16  # of a cosine of 1, in the histograms of all pairs
MAX_RANK = 20
_TILE = 2048  # images a side, of a block of pairs
_SCORES_AT_ONCE = 1 << 24  # of probes with the gallery


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """Rates at one threshold.

  Attributes:
    far: Limit of the false accept rate that the threshold keeps.
    tar: Fraction of same pairs accepted.
    threshold: Lowest cosine accepted.
  """

  far: float
  tar: float
  threshold: float


@dataclasses.dataclass(frozen=True)
class AllPairs:
  """How well the cosines of all pairs of a set tell same from different.

  Attributes:
    num_same: Pairs of two images of one identity.
    num_different: Pairs of images of two identities.
    auc: Area under the ROC curve.
    eer: Equal error rate.
    tar_at_far: At each of `verification.FAR_LIMITS` that is at least 1 / num_different.
  """

  num_same: int
  num_different: int
  auc: float
  eer: float
  tar_at_far: tuple[OperatingPoint, ...]


@dataclasses.dataclass(frozen=True)
class GroupRates:
  """The pairs within one group, at the threshold of the whole set.

  Attributes:
    group: Its name.
    num_same: Pairs of two images of one identity, both in the group.
    num_different: Pairs of images of two identities, both in the group.
    tar: Fraction of its same pairs accepted; None if it has none.
    far: Fraction of its different pairs accepted; None if it has none.
  """

  group: str
  num_same: int
  num_different: int
  tar: float | None
  far: float | None


@dataclasses.dataclass(frozen=True)
class GroupsAtFar:
  """All groups at one common threshold.

  Attributes:
    far: Limit of the false accept rate of the whole set.
    threshold: Lowest cosine accepted, in every group.
    groups: The rates of each, by name.
    largest_tar_gap: Highest less lowest TAR; None with fewer than two.
    largest_far_gap: Highest less lowest FAR; None with fewer than two.
  """

  far: float
  threshold: float
  groups: tuple[GroupRates, ...]
  largest_tar_gap: float | None
  largest_far_gap: float | None


@dataclasses.dataclass(frozen=True)
class TpirAtFpir:
  """Open-set identification at one limit of the false positive identification rate.

  Attributes:
    fpir: Limit of the fraction of probes without a mate whose best score is accepted.
    tpir: Largest fraction of probes with a mate that have rank 1 and are accepted.
  """

  fpir: float
  tpir: float


@dataclasses.dataclass(frozen=True)
class Identification:
  """How well probes find their identity in a gallery.

  Attributes:
    num_probes: Probes whose identity is in the gallery.
    num_unmated: Probes whose identity is not; they count in the open set only.
    num_identities: Identities of the gallery.
    rank_1: Fraction of probes whose identity has the best score.
    rank_5: Fraction of probes whose identity has one of the five best scores.
    cmc: Fractions for ranks 1 to at most `MAX_RANK`.
    tpir_at_fpir: At each of `verification.FAR_LIMITS` that is at least 1 / num_unmated.
  """

  num_probes: int
  num_unmated: int
  num_identities: int
  rank_1: float
  rank_5: float
  cmc: tuple[float, ...]
  tpir_at_fpir: tuple[TpirAtFpir, ...]


def all_pairs_histograms(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Counts the cosines of all pairs of two different images.

  Args:
    embeddings: float32[images, embedding] of length 1.
    labels: int[images].

  Returns:
    int64[2, 2 * STEPS + 1], the different pairs and the same pairs; a pair of cosine c
    is counted at floor((c + 1) * STEPS).
  """
  histograms = np.zeros((2, 2 * STEPS + 1), np.int64)
  for top in range(0, len(embeddings), _TILE):
    for left in range(top, len(embeddings), _TILE):
      rows, columns = slice(top, top + _TILE), slice(left, left + _TILE)
      cosines = embeddings[rows] @ embeddings[columns].T
      bins = np.floor((np.clip(cosines, -1, 1) + 1) * STEPS).astype(np.int32)
      is_same = labels[rows, np.newaxis] == labels[columns]
      if top == left:  # each pair once, and no image with itself
        upper = np.triu_indices(len(bins), k=1)
        bins, is_same = bins[upper], is_same[upper]
      size = histograms.shape[1]
      same = np.bincount(bins[is_same], minlength=size)
      histograms[1] += same
      histograms[0] += np.bincount(bins.ravel(), minlength=size) - same
  return histograms


def all_pairs(histograms: np.ndarray) -> AllPairs:
  """Returns the figures of all pairs; exact for cosines rounded down to 1 / STEPS.

  Args:
    histograms: As `all_pairs_histograms` returns them.

  Raises:
    errors.DataError: There are pairs of one kind only.
  """
  from sklearn import metrics  # a second that training does without

  num_different, num_same = map(int, histograms.sum(axis=1))
  if not num_different or not num_same:
    raise errors.DataError(
      f"the images have {num_same} pairs of one identity and {num_different} of two; "
      "all pairs need both: give two images of one identity, and two identities."
    )
  far, tar = _accepted(histograms) / [[num_different], [num_same]]
  points = []
  for limit in verification.supported_limits(num_different):
    last = int(np.flatnonzero(far <= limit)[-1])
    points.append(OperatingPoint(limit, float(tar[last]), _threshold(last)))
  return AllPairs(
    num_same=num_same,
    num_different=num_different,
    auc=float(metrics.auc(far, tar)),
    eer=verification.equal_error_rate(far, tar),
    tar_at_far=tuple(points),
  )


def by_group(
  embeddings: np.ndarray,
  labels: np.ndarray,
  groups: np.ndarray,
  *,
  points: tuple[OperatingPoint, ...],
) -> tuple[GroupsAtFar, ...]:
  """Returns the rates of each group at the common thresholds of the whole set.

  Only pairs with both images in one group count, as in RFW (arXiv:1812.00194).

  Args:
    embeddings: float32[images, embedding] of length 1.
    labels: int[images].
    groups: str[images]; an empty one is of no group.
    points: The thresholds, of `all_pairs` of the whole set.
  """
  accepted = {
    str(group): _accepted(
      all_pairs_histograms(embeddings[groups == group], labels[groups == group])
    )
    for group in np.unique(groups[groups != ""])
  }
  found = []
  for point in points:
    place = round((1 - point.threshold) * STEPS) + 1
    rates = []
    for group, sums in accepted.items():
      num_different, num_same = map(int, sums[:, -1])
      false, true = map(int, sums[:, place])
      rates.append(
        GroupRates(
          group,
          num_same,
          num_different,
          tar=true / num_same if num_same else None,
          far=false / num_different if num_different else None,
        )
      )
    found.append(
      GroupsAtFar(
        point.far,
        point.threshold,
        tuple(rates),
        largest_tar_gap=_gap([each.tar for each in rates]),
        largest_far_gap=_gap([each.far for each in rates]),
      )
    )
  return tuple(found)


def identify(
  probes: np.ndarray,
  probe_labels: np.ndarray,
  gallery: np.ndarray | None = None,
  gallery_labels: np.ndarray | None = None,
) -> Identification:
  """Searches the identity of each probe in a gallery.

  The score of an identity is the highest cosine of its images. The rank of a probe is
  1 + the other identities whose score is at least that of its own: a tie counts
  against the probe, so that a network that says nothing finds nobody.

  Args:
    probes: float32[probes, embedding] of length 1; at least one.
    probe_labels: int[probes].
    gallery: float32[images, embedding] of length 1. None: each probe is searched
      among all other probes.
    gallery_labels: int[images].

  Raises:
    errors.DataError: No probe's identity is in the gallery.
  """
  is_leave_one_out = gallery is None or gallery_labels is None
  if gallery is None or gallery_labels is None:
    gallery, gallery_labels = probes, probe_labels
  order = np.argsort(gallery_labels, kind="stable")
  identities, starts = np.unique(gallery_labels[order], return_index=True)
  by_identity = gallery[order].T
  ranks, mates, unmated = [], [], []
  for some in _blocks(len(probes), _SCORES_AT_ONCE // len(gallery)):
    scores = probes[some] @ by_identity
    if is_leave_one_out:
      scores[order == np.arange(len(probes))[some, np.newaxis]] = -np.inf
    best = np.maximum.reduceat(scores, starts, axis=1)
    place = np.searchsorted(identities, probe_labels[some])
    place = np.minimum(place, len(identities) - 1)
    mate = best[np.arange(len(best)), place]
    has_mate = (identities[place] == probe_labels[some]) & (mate > -np.inf)
    unmated.append(best[~has_mate].max(axis=1, initial=-np.inf))
    mates.append(mate[has_mate])
    ranks.append((best[has_mate] >= mate[has_mate, np.newaxis]).sum(axis=1))
  rank, mate_score = np.concatenate(ranks), np.concatenate(mates)
  if not len(rank):
    raise errors.DataError(
      f"none of {len(probes)} probes has its identity in the gallery of "
      f"{len(identities)}; identities are compared by name: check both."
    )
  cmc = [
    float(np.mean(rank <= n)) for n in range(1, min(MAX_RANK, len(identities)) + 1)
  ]
  impostors = np.concatenate(unmated)
  return Identification(
    num_probes=len(rank),
    num_unmated=len(impostors),
    num_identities=len(identities),
    rank_1=cmc[0],
    rank_5=cmc[min(5, len(cmc)) - 1],
    cmc=tuple(cmc),
    tpir_at_fpir=_open_set(np.where(rank == 1, mate_score, -np.inf), impostors),
  )


def _open_set(mates: np.ndarray, impostors: np.ndarray) -> tuple[TpirAtFpir, ...]:
  """Returns TPIR at every FPIR that the probes without a mate support.

  Args:
    mates: float[probes], the score of each; -inf where its rank is not 1.
    impostors: float[unmated], the best score of each probe without a mate.
  """
  falling = np.sort(impostors)[::-1]
  fractions = np.arange(1, len(falling) + 1) / max(1, len(falling))
  return tuple(
    TpirAtFpir(
      fpir, float(np.mean(mates > falling[np.searchsorted(fractions, fpir, "right")]))
    )
    for fpir in verification.supported_limits(len(falling))
  )


def _accepted(histograms: np.ndarray) -> np.ndarray:
  """Returns int64[2, 2 * STEPS + 2]: [:, i], the pairs in the i highest bins."""
  return np.pad(histograms[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0)))


def _threshold(num_bins: int) -> float:
  """Returns the lowest cosine that the `num_bins` highest bins hold."""
  return 1 - (num_bins - 1) / STEPS


def _gap(rates: list[float | None]) -> float | None:
  """Returns the highest less the lowest of those that are known."""
  known = [rate for rate in rates if rate is not None]
  return max(known) - min(known) if len(known) > 1 else None


def _blocks(count: int, size: int) -> Iterator[slice]:
  """Yields slices of at least one item that cover `count` items."""
  size = max(1, size)
  for start in range(0, count, size):
    yield slice(start, start + size)
