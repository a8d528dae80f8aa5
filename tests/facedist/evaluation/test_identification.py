"""All pairs and identification by hand, and against loops and scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from facedist import errors
from facedist.evaluation import identification


def _at(*degrees: float) -> np.ndarray:
  """Returns embeddings on the circle; the cosine is that of the angle between two."""
  angles = np.radians(degrees)
  return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _random_set(seed: int, images: int, people: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  labels = rng.integers(people, size=images)
  embeddings = rng.normal(size=(people, 16))[labels] + rng.normal(size=(images, 16))
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  return embeddings.astype(np.float32), labels


def _all_pairs(embeddings: np.ndarray, labels: np.ndarray) -> identification.AllPairs:
  return identification.all_pairs(
    identification.all_pairs_histograms(embeddings, labels)
  )


@pytest.mark.parametrize("tile", [7, 64, 2048])
def test_all_pairs_equal_scikit_learn_on_the_rounded_cosines(monkeypatch, tile):
  monkeypatch.setattr(identification, "_TILE", tile)
  embeddings, labels = _random_set(0, images=150, people=20)
  first, second = np.triu_indices(150, k=1)
  cosines = np.einsum("pe,pe->p", *embeddings[np.stack([first, second])])
  same = labels[first] == labels[second]
  found = _all_pairs(embeddings, labels)
  assert (found.num_same, found.num_different) == (same.sum(), (~same).sum())
  far, tar, _ = metrics.roc_curve(same, cosines)
  assert found.auc == pytest.approx(metrics.roc_auc_score(same, cosines), abs=1e-5)
  assert [at.far for at in found.tar_at_far] == [1e-1, 1e-2, 1e-3, 1e-4]
  for at in found.tar_at_far:
    assert at.tar == pytest.approx(tar[far <= at.far].max(), abs=2 / same.sum())
    assert np.mean(cosines[~same] >= at.threshold) <= at.far
    assert np.mean(cosines[same] >= at.threshold) == pytest.approx(
      at.tar, abs=2 / same.sum()
    )


def test_pairs_that_tie_are_accepted_or_refused_together():
  # All images are one point: at FAR 1e-1 no different pair may be accepted, so no same.
  labels = np.repeat(np.arange(4), 2)
  found = _all_pairs(_at(*[0] * 8), labels)
  assert (found.num_same, found.num_different) == (4, 24)
  assert found.auc == found.eer == 0.5
  assert [at.tar for at in found.tar_at_far] == [0.0]


def test_pairs_of_one_kind_are_an_error():
  with pytest.raises(errors.DataError, match="1 pairs of one identity and 0 of two"):
    _all_pairs(_at(0, 1), np.array([3, 3]))


def test_groups_are_compared_at_one_threshold():
  # In group a the pairs are 10 (same) and 90 or more degrees apart, in b 40 (same) and
  # 20 or 60 (different); the image of no group is left out.
  embeddings = _at(0, 10, 100, 200, 240, 220, 300)
  labels = np.array([0, 0, 1, 2, 2, 3, 4])
  groups = np.array(["a", "a", "a", "b", "b", "b", ""])
  points = (
    identification.OperatingPoint(0.1, 0.0, 1 - round((1 - 0.9) * 65536) / 65536),
    identification.OperatingPoint(0.01, 0.0, 1 - round((1 - 0.7) * 65536) / 65536),
  )
  strict, loose = identification.by_group(embeddings, labels, groups, points=points)
  rates = [(each.group, each.tar, each.far) for each in strict.groups]
  assert rates == [("a", 1.0, 0.0), ("b", 0.0, 1.0)]
  assert (strict.largest_tar_gap, strict.largest_far_gap) == (1.0, 1.0)
  assert [each.tar for each in loose.groups] == [1.0, 1.0]
  assert loose.largest_tar_gap == 0.0
  assert [(each.num_same, each.num_different) for each in loose.groups] == [(1, 2)] * 2


@pytest.mark.parametrize("scores_at_once", [1, 1 << 24])
def test_ranks_in_a_gallery_computed_by_hand(monkeypatch, scores_at_once):
  monkeypatch.setattr(identification, "_SCORES_AT_ONCE", scores_at_once)
  # Identity 1 is at 0 and 90 degrees, identity 2 at 30, identity 3 at 180.
  gallery, gallery_labels = _at(0, 30, 180, 90), np.array([1, 2, 3, 1])
  # 85: identity 1 by its second image. 25: 2, then 1. 150 is 3's. 20 of identity 1: 2
  # is nearer.
  found = identification.identify(
    _at(85, 25, 150, 20), np.array([1, 2, 3, 1]), gallery, gallery_labels
  )
  assert (found.num_probes, found.num_unmated, found.num_identities) == (4, 0, 3)
  assert found.cmc == (0.75, 1.0, 1.0)
  assert (found.rank_1, found.rank_5) == (0.75, 1.0)
  assert found.tpir_at_fpir == ()


def test_a_tie_counts_against_the_probe():
  found = identification.identify(_at(0), np.array([1]), _at(0, 0, 90), np.arange(3))
  assert found.cmc == (0.0, 1.0, 1.0)


def test_the_open_set_refuses_probes_whose_identity_is_unknown():
  # Ten unmated probes, of which the best scores lie 20 and 40 degrees away, the others
  # at 90. FPIR 1e-1 allows one: the threshold is above the cosine of 40 degrees.
  gallery, gallery_labels = _at(0, 180), np.array([0, 1])
  unmated = _at(20, 40, *[90] * 8)
  mated = _at(5, 39, 40, 100)  # the last is nearer to identity 1
  labels = np.array([0, 0, 0, 0] + [7] * 10)
  found = identification.identify(
    np.concatenate([mated, unmated]), labels, gallery, gallery_labels
  )
  assert found.num_unmated == 10
  (at,) = found.tpir_at_fpir
  assert (at.fpir, at.tpir) == (0.1, 0.5)  # 5 and 39; 40 ties with an unmated probe


def test_without_a_gallery_each_image_is_searched_among_the_others_as_in_a_loop():
  embeddings, labels = _random_set(3, images=120, people=40)
  found = identification.identify(embeddings, labels)
  ranks = []
  for probe in range(120):
    best: dict[int, float] = {}
    for other in set(range(120)) - {probe}:
      cosine = float(embeddings[probe] @ embeddings[other])
      best[labels[other]] = max(cosine, best.get(labels[other], -1.0))
    if labels[probe] in best:
      own = best[labels[probe]]
      ranks.append(sum(score >= own for score in best.values()))
  assert found.num_probes == len(ranks) < 120
  assert found.num_unmated == 120 - len(ranks)
  assert found.cmc == pytest.approx(
    [np.mean(np.array(ranks) <= n) for n in range(1, 21)]
  )


def test_a_gallery_of_strangers_is_an_error():
  with pytest.raises(errors.DataError, match="none of 1 probes has its identity"):
    identification.identify(_at(0), np.array([9]), _at(0), np.array([1]))
