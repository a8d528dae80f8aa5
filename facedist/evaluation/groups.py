"""Results by group: a CSV of image and group, and the figures of each group's pairs."""

import csv
import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging

from facedist import errors, storage
from facedist.evaluation import verification


@dataclasses.dataclass(frozen=True)
class GroupResult:
  """How well the pairs within one group are classified.

  Attributes:
    group: Its name.
    num_pairs: Pairs with both images in the group.
    accuracy: Fraction of them classified correctly, each with the threshold of its
      fold, which the other folds' pairs of all groups chose.
    tar_at_far: The fraction of the group's same pairs accepted at each threshold of
      `GroupResults.far_limits`; None if it has no same pairs.
    far_at_far: The fraction of its different pairs accepted there; None if it has none.
  """

  group: str
  num_pairs: int
  accuracy: float
  tar_at_far: tuple[float | None, ...]
  far_at_far: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class GroupResults:
  """The groups of a list of pairs, all at the same thresholds.

  Attributes:
    far_limits: Limits of the false accept rate of all pairs, as many as the different
      pairs support.
    thresholds: Lowest cosine accepted at each; 2 where none is.
    groups: The results of each, by name.
    largest_accuracy_gap: Highest less lowest accuracy.
    largest_tar_gaps: Highest less lowest TAR, at each limit.
  """

  far_limits: tuple[float, ...]
  thresholds: tuple[float, ...]
  groups: tuple[GroupResult, ...]
  largest_accuracy_gap: float
  largest_tar_gaps: tuple[float, ...]


def read_groups(path: str, images: Sequence[str]) -> np.ndarray:
  """Returns str[images], the group of each image, empty where it has none.

  Args:
    path: CSV file with a line image,group for each image.
    images: Names of the images.

  Raises:
    errors.DataError: A line is not image,group, gives an image a second group, or no
      image is in a group.
  """
  group_of: dict[str, str] = {}
  for number, row in enumerate(csv.reader(storage.open_lines(path)), 1):
    if len(row) != 2 or not row[1]:
      raise errors.DataError(
        f"{path}, line {number}, is not image,group; write one image and its group."
      )
    if group_of.setdefault(row[0], row[1]) != row[1]:
      raise errors.DataError(
        f"{path}, line {number}, gives {row[0]} a second group, {row[1]}; keep one."
      )
  groups = np.array([group_of.get(image, "") for image in images])
  if not (groups != "").any():
    raise errors.DataError(
      f"{path} names none of the {len(images)} images, such as {images[0]}; write "
      "their names in the same way."
    )
  logging.info("%d of %d images are in a group", (groups != "").sum(), len(images))
  return groups


def verify_by_group(
  scores: np.ndarray, same: np.ndarray, folds: np.ndarray, groups: np.ndarray
) -> GroupResults:
  """Classifies all pairs with common thresholds, and counts within each group.

  Args:
    scores: float64[pairs].
    same: bool[pairs], with both kinds.
    folds: int[pairs], at least two different ones.
    groups: str[pairs, 2], the groups of a pair's two images. Pairs of two groups, or
      with an image of none, count for the thresholds only.

  Raises:
    errors.DataError: No pair lies within a group.
  """
  group_of = np.where(groups[:, 0] == groups[:, 1], groups[:, 0], "")
  names = np.unique(group_of[group_of != ""])
  if not len(names):
    raise errors.DataError(
      f"none of {len(scores)} pairs has both images in one group; check --groups."
    )
  fold_thresholds = verification.fold_accuracies(scores, same, folds)[1]
  places = np.searchsorted(np.unique(folds), folds)
  is_correct = (scores >= fold_thresholds[places]) == same
  far, _, all_thresholds = verification.roc(scores, same)
  num_different = np.count_nonzero(~same)
  limits = verification.supported_limits(num_different)
  thresholds = [float(all_thresholds[far <= limit][-1]) for limit in limits]

  def accepted(some: np.ndarray) -> tuple[float | None, ...]:
    """Returns the fraction of some pairs that is accepted at each threshold."""
    if not some.any():
      return (None,) * len(thresholds)
    return tuple(float(np.mean(scores[some] >= each)) for each in thresholds)

  results = []
  for name in names:
    mine = group_of == name
    results.append(
      GroupResult(
        group=str(name),
        num_pairs=int(mine.sum()),
        accuracy=float(np.mean(is_correct[mine])),
        tar_at_far=accepted(mine & same),
        far_at_far=accepted(mine & ~same),
      )
    )
  return GroupResults(
    far_limits=tuple(limits),
    # a threshold above all scores is infinite in the ROC, which JSON cannot hold
    thresholds=tuple(min(each, 2.0) for each in thresholds),
    groups=tuple(results),
    largest_accuracy_gap=float(np.ptp([each.accuracy for each in results])),
    largest_tar_gaps=tuple(
      float(np.ptp([tar for tar in tars if tar is not None] or [0.0]))
      for tars in zip(*(each.tar_at_far for each in results), strict=True)
    ),
  )
