"""Accuracy and TAR by group, by hand."""

import numpy as np
import pytest

from facedist import errors
from facedist.evaluation import groups

# Two equal folds, each with group a's two pairs, b's three, one across, and four with
# an image of no group.
SCORES = np.array([0.9, 0.2, 0.6, 0.3, 0.1, 0.8, *[0.0] * 4] * 2)
SAME = np.array([True, False, True, True, False, False, *[False] * 4] * 2)
_WITHIN = [("a", "a")] * 2 + [("b", "b")] * 3
PAIRS = np.array([*_WITHIN, ("a", "b"), *[("", "a")] * 4] * 2)
FOLDS = np.repeat([3, 8], 10)


def test_groups_are_classified_with_common_thresholds():
  found = groups.verify_by_group(SCORES, SAME, FOLDS, PAIRS)
  # Of the 14 different pairs FAR 1e-1 allows one, but the two of 0.8 tie: the lowest
  # threshold is 0.9. The best threshold of a fold is between 0.2 and 0.3; only the pair
  # across the groups is wrong.
  assert found.far_limits == (0.1,)
  assert found.thresholds == (0.9,)
  a, b = found.groups
  assert (a.group, a.num_pairs, a.tar_at_far, a.far_at_far) == ("a", 4, (1.0,), (0.0,))
  assert (b.group, b.num_pairs, b.tar_at_far, b.far_at_far) == ("b", 6, (0.0,), (0.0,))
  assert (a.accuracy, b.accuracy) == (1.0, 1.0)
  assert found.largest_accuracy_gap == 0.0
  assert found.largest_tar_gaps == (1.0,)


def test_the_threshold_of_a_fold_comes_from_all_groups_of_the_others():
  # Fold 0 would choose 0.45, fold 1 chooses 0.65: each is classified with the other's.
  scores = np.array([0.6, 0.3, 0.8, 0.5])
  same = np.array([True, False, True, False])
  within = np.array([["a", "a"], ["b", "b"], ["a", "a"], ["b", "b"]])
  found = groups.verify_by_group(scores, same, np.array([0, 0, 1, 1]), within)
  assert [each.accuracy for each in found.groups] == [0.5, 0.5]
  assert found.groups[0].far_at_far == ()  # two different pairs do not support 1e-1


def test_a_group_without_same_pairs_has_no_tar():
  within = PAIRS.copy()
  within[SAME & (PAIRS[:, 0] == "a")] = ""
  found = groups.verify_by_group(SCORES, SAME, FOLDS, within)
  assert [each.tar_at_far for each in found.groups] == [(None,), (0.0,)]
  assert found.largest_tar_gaps == (0.0,)


def test_no_pair_within_a_group_is_an_error():
  across = np.array([["a", "b"]] * 20)
  with pytest.raises(errors.DataError, match="both images in one group"):
    groups.verify_by_group(SCORES, SAME, FOLDS, across)
