"""The verification protocol against hand-made cases and brute force."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn import metrics

from facedist import errors
from facedist.evaluation import verification


def _bools(text: str) -> np.ndarray:
  """'sd' is a same pair and a different pair."""
  return np.array([letter == "s" for letter in text])


# Few different values, so that ties between and within the two kinds are common.
pair_lists = st.lists(
  st.tuples(st.integers(-4, 4).map(lambda n: n / 4), st.booleans()),
  min_size=1,
  max_size=30,
)


def test_cosines_of_more_pairs_than_are_taken_at_once():
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(5, 4)).astype(np.float32)
  first, second = rng.integers(5, size=(2, 9000))
  cosines = np.corrcoef(np.hstack([embeddings, -embeddings]))  # rows of mean 0
  scores = verification.cosine_scores(embeddings, first, second)
  assert scores.dtype == np.float64
  np.testing.assert_allclose(scores, cosines[first, second], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
  ("scores", "kinds", "threshold"),
  [
    ([0.1, 0.3, 0.5, 0.9], "ddss", 0.4),  # the middle of the gap
    ([0.1, 0.3, 0.5, 0.9], "dsds", 0.7),  # as good as 0.2, and higher
    ([0.1, 0.3, 0.9], "dsd", np.nextafter(0.9, 1)),  # as good as 0.2
    ([0.5, 0.5, 0.5, 0.2], "ssdd", 0.35),  # equal scores are not cut apart
    ([0.5, 0.2], "ss", 0.2),
    ([0.5, 1.0], "dd", np.nextafter(1, 2)),
    ([0.1, np.nextafter(0.1, 1)], "ds", np.nextafter(0.1, 1)),
  ],
)
def test_the_threshold_of_a_list_found_by_hand(scores, kinds, threshold):
  assert verification.best_threshold(np.array(scores), _bools(kinds)) == threshold


@hypothesis.given(pair_lists)
def test_no_cut_is_better_than_the_threshold_and_no_higher_one_as_good(pairs):
  scores, same = map(np.array, zip(*pairs, strict=True))
  accepted = scores >= verification.best_threshold(scores, same)
  best = np.mean(accepted == same)
  for threshold in [*scores, np.inf]:
    accuracy = np.mean((scores >= threshold) == same)
    is_higher = np.sum(scores >= threshold) < accepted.sum()
    assert accuracy < best or (accuracy == best and not is_higher)


@hypothesis.given(pair_lists, st.integers(2, 5))
def test_fold_accuracies_equal_brute_force(pairs, num_folds):
  hypothesis.assume(len(pairs) >= 2 * num_folds)
  scores, same = map(np.array, zip(*pairs, strict=True))
  folds = np.arange(len(pairs)) % num_folds
  accuracies, _ = verification.fold_accuracies(scores, same, folds)
  for fold in range(num_folds):
    others = [n for n in range(len(pairs)) if folds[n] != fold]
    values = sorted({scores[n] for n in others})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    best, threshold = -1, None
    for candidate in [values[0], *middles, np.nextafter(values[-1], 2)]:
      right = sum((scores[n] >= candidate) == same[n] for n in others)
      if right >= best:
        best, threshold = right, candidate
    tested = [n for n in range(len(pairs)) if folds[n] == fold]
    right = sum((scores[n] >= threshold) == same[n] for n in tested)
    assert accuracies[fold] == pytest.approx(right / len(tested))


def test_each_fold_is_classified_with_the_threshold_of_the_others():
  # Fold 4 alone parts at 0.2, fold 9 at 0.6. Each with the other's threshold:
  # fold 4 accepts 0.7 only of its same pairs, fold 9 accepts its 0.3 wrongly.
  result = verification.verify(
    np.array([0.1, 0.3, 0.7, 0.3, 0.5, 0.7]),
    _bools("dssdds"),
    np.array([4, 4, 4, 9, 9, 9]),
  )
  assert result.num_pairs == 6
  assert result.fold_accuracies == pytest.approx((2 / 3, 1 / 3))
  assert result.fold_thresholds == pytest.approx((0.6, 0.2))
  assert result.accuracy_mean == pytest.approx(0.5)
  assert result.accuracy_std == pytest.approx(1 / 6)  # of the population
  # Of 3 x 3 same and different pairs, 0.3 beats 0.1 and equals 0.3; both 0.7 beat all.
  assert result.auc == pytest.approx(7.5 / 9)
  # At 0.5 one of three different pairs is accepted and one of three same ones refused.
  assert result.eer == pytest.approx(1 / 3)


def test_equal_error_rate_lies_on_the_line_between_two_points():
  # From (0, 0.5) to (1, 1) the line is tar = 0.5 + far / 2; 1 - tar = far at 1/3.
  far, tar = np.array([0, 0, 1.0]), np.array([0, 0.5, 1.0])
  assert verification.equal_error_rate(far, tar) == pytest.approx(1 / 3)


def test_true_accepts_within_a_false_accept_limit():
  far = np.array([0, 0, 0.01, 0.01, 0.02, 1])
  tar = np.array([0, 0.3, 0.3, 0.6, 0.8, 1])
  assert verification.tar_at_far(far, tar, 1e-2) == 0.6
  assert verification.tar_at_far(far, tar, 1e-3) == 0.3


def test_tar_is_given_down_to_the_far_that_the_different_pairs_support():
  # Ten different pairs support 1e-1: the threshold may accept one. 0.8 is a tie of a
  # same pair and two different ones, so it must be refused: 0.9 alone is accepted.
  scores = np.array([0.9, 0.8, 0.2, 0.1, 0.8, 0.8, *[0.0] * 8])
  same = _bools("ssss" + "d" * 10)
  (at,) = verification.tar_with_intervals(scores, same, identities=None)
  assert (at.far, at.tar, at.threshold) == (0.1, 0.25, 0.9)
  scores[4] = 0.85  # accepted alone, and the tie still refused
  (at,) = verification.tar_with_intervals(scores, same, identities=None)
  assert at.tar == 0.25
  scores[5] = 0.75  # 0.8 is the same pair's alone
  (at,) = verification.tar_with_intervals(scores, same, identities=None)
  assert at.tar == 0.5


@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_tar_and_auc_equal_those_of_scikit_learn(decimals):
  rng = np.random.default_rng(decimals)
  same = rng.random(3000) < 0.5
  scores = np.round(rng.normal(same * 1.5, 1.0), decimals)
  result = verification.verify(scores, same, np.arange(3000) % 10)
  far, tar, thresholds = metrics.roc_curve(same, scores, drop_intermediate=False)
  assert result.auc == pytest.approx(metrics.roc_auc_score(same, scores))
  assert [at.far for at in result.tar_at_far] == [1e-1, 1e-2, 1e-3]
  for at in result.tar_at_far:
    assert at.tar == tar[far <= at.far].max()
    assert at.threshold == thresholds[far <= at.far][-1]
    assert at.low <= at.tar <= at.high
  of_limits = (result.tar_at_far_1e2, result.tar_at_far_1e3)
  assert of_limits == tuple(at.tar for at in result.tar_at_far[1:])


def test_a_resample_is_the_roc_of_the_pairs_repeated_by_their_weights():
  rng = np.random.default_rng(5)
  same = rng.random(200) < 0.4
  scores = np.round(rng.normal(same * 1.0, 1.0), 1)
  weights = verification.bootstrap_weights(
    np.random.default_rng(0), 1, identities=None, num_pairs=200
  )
  found = verification.tar_with_intervals(scores, same, identities=None, resamples=1)
  far, tar, _ = metrics.roc_curve(
    np.repeat(same, weights[0]), np.repeat(scores, weights[0])
  )
  assert [at.low for at in found] == [tar[far <= at.far].max() for at in found]


def test_the_weight_of_a_pair_follows_from_its_two_identities():
  # Identities 7 and 9; the pairs are 7-7, 7-9, 9-9.
  identities = np.array([[7, 7], [7, 9], [9, 9]])
  weights = verification.bootstrap_weights(
    np.random.default_rng(0), 500, identities=identities, num_pairs=3
  )
  assert {tuple(row) for row in weights.tolist()} == {(2, 0, 0), (1, 1, 1), (0, 0, 2)}


def test_intervals_of_identities_are_wider_than_those_of_pairs():
  # Ten people with 40 same pairs each; the pairs of a person are all alike.
  people = np.repeat(np.arange(10), 40)
  strangers = np.stack([people, (people + 1 + np.arange(400) % 9) % 10], axis=1)
  identities = np.concatenate([np.stack([people, people], axis=1), strangers])
  same = np.arange(800) < 400
  scores = np.where(same, np.repeat([0.9, 0.1], 400) - (identities[:, 0] % 2), 0.0)
  folds = np.arange(800) % 10
  by_pair = verification.verify(scores, same, folds)
  by_identity = verification.verify(scores, same, folds, identities=identities)
  assert (by_pair.resampled, by_identity.resampled) == ("pairs", "identities")
  widths = [
    at.high - at.low for at in (by_pair.tar_at_far[0], by_identity.tar_at_far[0])
  ]
  assert widths[1] > 3 * widths[0]


@pytest.mark.parametrize(
  ("identities", "expected"),
  [
    ([[0, 0], [1, 2], [3, 4]], False),  # each in one pair, as in a .bin file
    ([[0, 0], [0, 1], [2, 3]], True),
    ([[0, 0], [0, 0], [0, 0]], False),  # a different pair of one identity
  ],
)
def test_identities_are_resampled_where_they_link_pairs(identities, expected):
  assert verification.links_pairs(np.array(identities), _bools("sdd")) is expected


@pytest.mark.parametrize(
  ("scores", "same", "folds", "said"),
  [
    ([0.1, 0.2], [True, False], [0, 0], "1 fold"),
    ([0.1, 0.2], [True, True], [0, 1], "one kind"),
    ([0.1, np.nan], [True, False], [0, 1], "pair 1 scores nan"),
    ([0.1, 0.2], [True], [0, 1], "one length"),
  ],
)
def test_a_list_that_cannot_be_classified_is_named(scores, same, folds, said):
  with pytest.raises(errors.DataError, match=said):
    verification.verify(np.array(scores), np.array(same), np.array(folds))
