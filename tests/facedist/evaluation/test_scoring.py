"""A plan against rows written by hand, and a set's batches."""

import dataclasses

import numpy as np

from facedist.data.verification_set import VerificationSet
from facedist.evaluation import evaluator

# Images 0 to 3 point right, right, up, up.
IMAGES = np.zeros((4, 2, 2, 3), np.uint8)
IMAGES[:2, :, :, 0] = 10
IMAGES[2:, :, :, 1] = 20

PAIRS = VerificationSet(
  name="lfw",
  fingerprint="aa",
  image_size=2,
  num_images=4,
  read=lambda numbers: IMAGES[numbers],
  read_names=lambda: ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"],
  first=np.array([0, 2, 0, 1]),
  second=np.array([1, 3, 2, 3]),
  same=np.array([True, True, False, False]),
  folds=np.array([0, 1, 0, 1]),
)
OTHER = dataclasses.replace(PAIRS, name="cfp", fingerprint="bb")
PLAN = evaluator.ScorePlan((PAIRS, OTHER), mirror=True)


def _row(step: int, name: str, fingerprint: str, mirrored: bool = True) -> dict:
  key = {"step": step, "set": name, "fingerprint": fingerprint, "mirrored": mirrored}
  return key | {"auc": 0.5}


def test_a_step_is_finished_once_every_set_has_its_score():
  rows = [
    _row(100, "lfw", "aa"),
    _row(100, "cfp", "bb"),
    _row(200, "lfw", "aa"),
    _row(300, "lfw", "aa"),
    _row(300, "cfp", "rebuilt"),
    _row(400, "lfw", "aa"),
    _row(400, "cfp", "bb", mirrored=False),
    {"note": "of another tool"},
  ]
  assert PLAN.finished_steps(rows) == [100]
  assert PLAN.missing(100, rows) == []
  for step in (200, 300, 400):
    assert [each.name for each in PLAN.missing(step, rows)] == ["cfp"]
  assert [each.name for each in PLAN.missing(500, rows)] == ["lfw", "cfp"]
  assert len(PLAN.matching(rows)) == 5


def test_each_plan_has_its_own_fingerprint():
  plans = [
    PLAN,
    evaluator.ScorePlan((PAIRS,), mirror=True),
    evaluator.ScorePlan((PAIRS,), mirror=False),
    evaluator.ScorePlan((PAIRS,), mirror=True, weights="ema"),
  ]
  assert len({plan.fingerprint for plan in plans}) == 4
  assert (
    evaluator.ScorePlan((PAIRS, OTHER), mirror=True).fingerprint == PLAN.fingerprint
  )


def test_images_are_yielded_in_batches_with_their_names():
  batches = list(PAIRS.batches(3))
  assert [len(images) for images, _ in batches] == [3, 1]
  assert batches[1][1] == ["image 3 of lfw"]
  np.testing.assert_array_equal(batches[1][0], IMAGES[3:])
