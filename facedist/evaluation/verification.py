"""Face verification: scores of pairs, thresholds and accuracy by fold, ROC.

The protocol is LFW's View 2 (Huang et al., Labeled Faces in the Wild, UMass Amherst
TR 07-49, 2007, section 4): the pairs come in ten folds; each fold is classified with
a threshold chosen on the other nine, and the mean over the folds is reported. TAR at
FAR, EER and AUC are of all pairs. Pure functions of NumPy arrays and scikit-learn; no
network and no file.
"""

import dataclasses

import numpy as np

from facedist import errors

FAR_LIMITS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RESAMPLES = 1000
_PAIRS_AT_ONCE = 8192  # bounds the float64 copies of embeddings, not their number
_WEIGHTS_AT_ONCE = 2_000_000  # bounds the memory of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles of the resamples


@dataclasses.dataclass(frozen=True)
class TarAtFar:
  """The true accept rate at one limit of the false accept rate.

  Attributes:
    far: The limit.
    tar: Largest fraction of same pairs accepted with at most that fraction of the
      different pairs accepted.
    low: Lower end of its 95 % bootstrap interval; None if no resample has pairs of
      both kinds.
    high: Upper end.
    threshold: Lowest cosine accepted; 2 where none is.
  """

  far: float
  tar: float
  low: float | None
  high: float | None
  threshold: float


@dataclasses.dataclass(frozen=True)
class Verification:
  """How well the scores of a list of pairs tell same from different.

  Attributes:
    num_pairs: Pairs scored.
    accuracy_mean: Mean over the folds of the fraction of pairs classified correctly.
    accuracy_std: Population standard deviation of the same (divisor: folds), as
      papers print it. LFW's standard error of the mean is this / sqrt(folds - 1).
    fold_accuracies: Accuracy on each fold, folds in ascending number.
    fold_thresholds: Cosine that each fold was classified with; from the others.
    auc: Area under the ROC curve of all pairs.
    eer: Equal error rate: where false accepts are as frequent as false rejects.
    tar_at_far_1e2: Largest fraction of same pairs accepted with at most 1 % of the
      different pairs accepted.
    tar_at_far_1e3: The same with at most 0.1 %.
    tar_at_far: The same with an interval, at each of `FAR_LIMITS` that is at least
      1 / different pairs; below that every limit means that none is accepted.
    resampled: What the intervals resample: 'identities' or 'pairs', see
      `bootstrap_weights`.
  """

  num_pairs: int
  accuracy_mean: float
  accuracy_std: float
  fold_accuracies: tuple[float, ...]
  fold_thresholds: tuple[float, ...]
  auc: float
  eer: float
  tar_at_far_1e2: float
  tar_at_far_1e3: float
  tar_at_far: tuple[TarAtFar, ...]
  resampled: str


def cosine_scores(
  embeddings: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
  """Returns the cosine of the two embeddings of each pair.

  Args:
    embeddings: float32[images, embedding], of any length but zero.
    first: int[pairs], places in `embeddings`.
    second: int[pairs], places in `embeddings`.

  Returns:
    float64[pairs] in [-1, 1].
  """
  scores = np.empty(len(first))
  for start in range(0, len(first), _PAIRS_AT_ONCE):
    some = slice(start, start + _PAIRS_AT_ONCE)
    left = embeddings[first[some]].astype(np.float64)
    right = embeddings[second[some]].astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    scores[some] = np.einsum("pe,pe->p", left, right) / lengths
  return np.clip(scores, -1.0, 1.0)


def verify(
  scores: np.ndarray,
  same: np.ndarray,
  folds: np.ndarray,
  *,
  identities: np.ndarray | None = None,
) -> Verification:
  """Classifies the pairs fold by fold and as a whole.

  Args:
    scores: float[pairs]; higher means more alike.
    same: bool[pairs].
    folds: int[pairs]; any numbers, at least two different ones.
    identities: int[pairs, 2], the identities of each pair's two images, for the
      intervals; None if not known.

  Raises:
    errors.DataError: The list cannot be classified: sizes differ, a score is not
      finite, there is one fold only, or pairs of one kind only.
  """
  from sklearn import metrics  # a second that training does without

  _check(scores, same, folds)
  scores, same = scores.astype(np.float64), same.astype(bool)
  accuracies, thresholds = fold_accuracies(scores, same, folds)
  far, tar, _ = roc(scores, same)
  if identities is not None and not links_pairs(identities, same):
    identities = None
  return Verification(
    num_pairs=len(scores),
    accuracy_mean=float(np.mean(accuracies)),
    accuracy_std=float(np.std(accuracies)),
    fold_accuracies=tuple(accuracies.tolist()),
    fold_thresholds=tuple(thresholds.tolist()),
    auc=float(metrics.auc(far, tar)),
    eer=equal_error_rate(far, tar),
    tar_at_far_1e2=tar_at_far(far, tar, 1e-2),
    tar_at_far_1e3=tar_at_far(far, tar, 1e-3),
    tar_at_far=tar_with_intervals(scores, same, identities=identities),
    resampled="pairs" if identities is None else "identities",
  )


def fold_accuracies(
  scores: np.ndarray, same: np.ndarray, folds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Classifies each fold with the threshold that is best on all other folds.

  Args:
    scores: float64[pairs].
    same: bool[pairs].
    folds: int[pairs].

  Returns:
    float64[folds] accuracies and float64[folds] thresholds, ascending fold number.
  """
  accuracies, thresholds = [], []
  for fold in np.unique(folds):
    tested = folds == fold
    threshold = best_threshold(scores[~tested], same[~tested])
    is_predicted_same = scores[tested] >= threshold
    accuracies.append(np.mean(is_predicted_same == same[tested]))
    thresholds.append(threshold)
  return np.array(accuracies), np.array(thresholds)


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
  """Returns the threshold that classifies most pairs correctly, in O(pairs log pairs).

  A pair is classified as same where `score >= threshold`. Every cut between two
  different neighbours of the sorted scores is tried, and those below and above them
  all, so the answer is exact and not one of a grid. Of cuts that are equally good the
  highest is taken, which accepts the fewest pairs. The threshold is the middle of its
  cut; the lowest score itself where all are accepted, the next float above the
  highest where none is.

  Args:
    scores: float64[pairs].
    same: bool[pairs].
  """
  order = np.argsort(scores, kind="stable")
  ordered = scores[order]
  # Moving the cut above a pair classifies it as different: right if it is.
  gains = np.where(same[order], -1, 1)
  correct = np.concatenate(([0], np.cumsum(gains)))
  inside_a_tie = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
  correct[inside_a_tie] = correct.min() - 1
  cut = len(scores) - int(np.argmax(correct[::-1]))
  if cut == 0:
    return float(ordered[0])
  if cut == len(scores):
    return float(np.nextafter(ordered[-1], np.inf))
  below, above = ordered[cut - 1], ordered[cut]
  middle = below + (above - below) / 2
  return float(middle if middle > below else above)


def roc(
  scores: np.ndarray, same: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the ROC curve of all pairs.

  Args:
    scores: float64[pairs].
    same: bool[pairs], with both kinds.

  Returns:
    float64[points] each: false accept rate, true accept rate, both rising from 0 to
    1, and the threshold (accepted where `score >= threshold`; the first is infinite).
  """
  from sklearn import metrics

  far, tar, thresholds = metrics.roc_curve(same, scores, drop_intermediate=False)
  return far, tar, thresholds


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
  """Returns where the ROC curve, drawn with straight lines, meets `far = 1 - tar`.

  Args:
    far: float64[points], rising from 0 to 1.
    tar: float64[points], rising from 0 to 1.
  """
  excess = far - (1.0 - tar)  # rises from -1 to 1
  after = int(np.argmax(excess >= 0))
  share = excess[after] / (excess[after] - excess[after - 1])
  return float(far[after] - share * (far[after] - far[after - 1]))


def tar_at_far(far: np.ndarray, tar: np.ndarray, limit: float) -> float:
  """Returns the largest true accept rate whose false accept rate is within `limit`.

  No interpolation: some real threshold reaches it. With fewer than 1 / `limit`
  different pairs this is the rate at which none of them is accepted.

  Args:
    far: float64[points], rising from 0 to 1.
    tar: float64[points], rising from 0 to 1.
    limit: Largest false accept rate allowed, in [0, 1].
  """
  return float(tar[far <= limit].max())


def supported_limits(count: int) -> list[float]:
  """Returns those of `FAR_LIMITS` that the rate of `count` scores can measure."""
  return [limit for limit in FAR_LIMITS if limit * count >= 1]


def tar_with_intervals(
  scores: np.ndarray,
  same: np.ndarray,
  *,
  identities: np.ndarray | None,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> tuple[TarAtFar, ...]:
  """Returns TAR at every FAR that the different pairs support, with 95 % intervals.

  The intervals are percentiles of a bootstrap; each resample finds its own threshold.
  The scores are sorted once, and each resample is two weighted cumulative sums.

  Args:
    scores: float64[pairs].
    same: bool[pairs], with both kinds.
    identities: int[pairs, 2], or None to resample pairs; see `bootstrap_weights`.
    resamples: Number of resamples.
    seed: Seed of the resamples.
  """
  different = np.flatnonzero(~same)
  limits = supported_limits(len(different))
  falling_same = np.flatnonzero(same)[np.argsort(-scores[same])]
  different = different[np.argsort(-scores[different])]
  # [i]: same pairs accepted by a threshold just above the i-th different pair, which
  # refuses all different pairs that tie with it; at the end, all.
  num_same_above = np.append(
    np.searchsorted(-scores[falling_same], -scores[different]), len(falling_same)
  )

  def tars(weights: np.ndarray) -> np.ndarray:
    """Returns float64[resamples, limits] of int64[resamples, pairs] weights."""
    accepts = np.cumsum(weights[:, falling_same], axis=1)
    accepts = np.pad(accepts, ((0, 0), (1, 0)))
    false_accepts = np.cumsum(weights[:, different], axis=1)
    result = np.full((len(weights), len(limits)), np.nan)
    for row, (true, false) in enumerate(zip(accepts, false_accepts, strict=True)):
      if true[-1] and false[-1]:
        first_refused = np.searchsorted(false / false[-1], limits, side="right")
        result[row] = true[num_same_above[first_refused]] / true[-1]
    return result

  measured = tars(np.ones((1, len(scores)), np.int64))[0]
  false = np.arange(1, len(different) + 1) / len(different)
  refused = scores[different[np.searchsorted(false, limits, side="right")]]
  accepted = [scores[scores > each] for each in refused]
  thresholds = [float(some.min()) if len(some) else 2.0 for some in accepted]
  rng = np.random.default_rng(seed)
  at_once = max(1, _WEIGHTS_AT_ONCE // len(scores))
  counts = [min(at_once, resamples - n) for n in range(0, resamples, at_once)]
  resampled = np.concatenate(
    [
      tars(bootstrap_weights(rng, count, identities=identities, num_pairs=len(scores)))
      for count in counts
    ]
  )
  resampled = resampled[~np.isnan(resampled).any(axis=1)]
  intervals: list[tuple[float | None, float | None]] = [(None, None)] * len(limits)
  if len(resampled):
    intervals = [
      (float(low), float(high))
      for low, high in np.percentile(resampled, INTERVAL, axis=0).T
    ]
  return tuple(
    TarAtFar(far, float(tar), *interval, threshold)
    for far, tar, interval, threshold in zip(
      limits, measured, intervals, thresholds, strict=True
    )
  )


def bootstrap_weights(
  rng: np.random.Generator,
  resamples: int,
  *,
  identities: np.ndarray | None,
  num_pairs: int,
) -> np.ndarray:
  """Returns how often each resample holds each pair, as int64[resamples, pairs].

  With identities, a resample draws as many identities as there are, with replacement.
  A pair of two identities drawn m and n times has the weight m * n; a pair of one
  identity drawn n times has the weight n. So the pairs of one person come and go
  together, which a bootstrap of pairs ignores: its intervals are too narrow. Without
  identities, a resample draws as many pairs as there are.

  Args:
    rng: Source of the draws.
    resamples: Number of resamples.
    identities: int[pairs, 2], or None.
    num_pairs: Number of pairs.
  """

  def draw(number: int) -> np.ndarray:
    """Draws `number` of `number` for each resample; returns how often each came."""
    places = rng.integers(number, size=(resamples, number))
    places += number * np.arange(resamples)[:, np.newaxis]
    counts = np.bincount(places.ravel(), minlength=resamples * number)
    return counts.reshape(resamples, number)

  if identities is None:
    return draw(num_pairs)
  names, numbers = np.unique(identities, return_inverse=True)
  first, second = numbers.reshape(-1, 2).T
  counts = draw(len(names))
  return counts[:, first] * np.where(first == second, 1, counts[:, second])


def links_pairs(identities: np.ndarray, same: np.ndarray) -> bool:
  """Returns whether identities tell which pairs depend on each other.

  They do not where each identity is in one pair only, as in InsightFace's .bin files,
  which name no people, or where a different pair has one identity.

  Args:
    identities: int[pairs, 2].
    same: bool[pairs].
  """
  is_one = identities[:, 0] == identities[:, 1]
  pairs_of_each = np.unique(
    np.concatenate([identities[:, 0], identities[~is_one, 1]]), return_counts=True
  )[1]
  return bool(pairs_of_each.max() > 1 and not (is_one & ~same).any())


def _check(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> None:
  """Raises DataError for a list of pairs that cannot be classified."""
  if not scores.shape == same.shape == folds.shape or scores.ndim != 1:
    raise errors.DataError(
      f"{scores.shape} scores, {same.shape} answers and {folds.shape} folds must be "
      "lists of one length; rebuild the verification set."
    )
  broken = np.flatnonzero(~np.isfinite(scores))
  if len(broken):
    raise errors.DataError(
      f"pair {broken[0]} scores {scores[broken[0]]}; scores must be finite: look at "
      "the embeddings of its two images."
    )
  if len(np.unique(folds)) < 2:
    raise errors.DataError(
      f"{len(scores)} pairs lie in {len(np.unique(folds))} fold(s); the threshold of a "
      "fold comes from the others, so rebuild the verification set with two or more."
    )
  if len(np.unique(same.astype(bool))) < 2:
    raise errors.DataError(
      f"all {len(scores)} pairs are of one kind; a verification set needs same and "
      "different pairs."
    )
