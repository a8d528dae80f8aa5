"""Rows, lines, tables, TensorBoard and the picture of known scores."""

import json
import pathlib

import numpy as np
import pytest
from matplotlib import pyplot

from facedist.evaluation import report, verification

RESULT = verification.Verification(
  num_pairs=6000,
  accuracy_mean=0.84817,
  accuracy_std=0.0131,
  fold_accuracies=(0.85, 0.84634),
  fold_thresholds=(0.3, 0.32),
  auc=0.92,
  eer=0.15,
  tar_at_far_1e2=0.5,
  tar_at_far_1e3=0.25,
  tar_at_far=(
    verification.TarAtFar(1e-1, 0.75, 0.7, 0.8, 0.4),
    verification.TarAtFar(1e-2, 0.5, None, None, 2.0),
  ),
  resampled="identities",
)


def _row(step: int, accuracy: float = 0.84817, set_name: str = "lfw") -> report.Row:
  scored = report.row(
    RESULT,
    key_fields={"step": step, "set": set_name, "fingerprint": "ab", "mirrored": True},
    checkpoint=f"step-{step:08d}",
    images=7701,
    seconds=12.34567,
  )
  return scored | {"accuracy_mean": accuracy}


def test_a_row_says_what_was_scored_how_well_and_at_what_cost():
  text = """{
    "step": 100, "checkpoint": "step-00000100", "set": "lfw",
    "fingerprint": "ab", "mirrored": true, "num_pairs": 6000,
    "accuracy_mean": 0.84817, "accuracy_std": 0.0131,
    "fold_accuracies": [0.85, 0.84634], "fold_thresholds": [0.3, 0.32],
    "auc": 0.92, "eer": 0.15, "tar_at_far_1e2": 0.5, "tar_at_far_1e3": 0.25,
    "tar_at_far": [
      {"far": 0.1, "tar": 0.75, "low": 0.7, "high": 0.8, "threshold": 0.4},
      {"far": 0.01, "tar": 0.5, "low": null, "high": null, "threshold": 2.0}
    ],
    "resampled": "identities", "images": 7701, "seconds": 12.346
  }"""
  assert json.loads(json.dumps(_row(100))) == json.loads(text)


def test_a_line_reads_well():
  assert report.line(_row(100)) == (
    "step 100, lfw: accuracy 0.8482 ± 0.0131 over 2 folds, 6000 pairs in all, "
    "threshold 0.310, AUC 0.9200, EER 0.1500, TAR 0.7500 [0.7000, 0.8000] at FAR "
    "1e-1, 0.5000 at FAR 1e-2 (95 %, resampling identities) (7701 images in 12.3 s)"
  )


def test_results_by_group_are_in_the_line():
  groups = [{"group": "a", "accuracy": 0.5}, {"group": "b", "accuracy": 0.75}]
  by_group = {"groups": groups, "largest_accuracy_gap": 0.25}
  assert ", accuracy by group a 0.5000, b 0.7500, gap 0.2500 (7701 images" in (
    report.line(_row(100) | {"by_group": by_group})
  )


def test_the_table_marks_the_best_step_of_each_set():
  rows = [_row(200, 0.9), _row(100, 0.8), _row(300, 0.9), _row(100, 0.6, "cfp")]
  lines = report.table(rows).splitlines()
  assert [line.split()[:3] for line in lines] == [
    ["set", "step", "accuracy"],
    ["cfp", "100", "0.6000"],
    ["lfw", "100", "0.8000"],
    ["lfw", "200", "0.9000"],
    ["lfw", "300", "0.9000"],
    ["mean", "100", "0.7000"],
  ]
  best = [place for place, line in enumerate(lines) if line.endswith("* best")]
  assert best == [1, 3, 5]


def _mixed_rows() -> list[report.Row]:
  """Two sets at step 100; only lfw supports FAR 1e-4, and only lfw has step 200."""
  rows = [_row(100, 0.75), _row(100, 0.5, "cfp"), _row(200, 0.9)]
  more = {"far": 1e-4, "tar": 0.125, "low": None, "high": None, "threshold": 0.9}
  rows[0]["tar_at_far"] = [{**rows[0]["tar_at_far"][0], "tar": 0.25}, more]
  rows[1] |= {"auc": 0.72, "eer": 0.25, "tar_at_far_1e3": 0.125}
  return rows


def test_the_mean_over_sets_is_of_what_all_sets_have():
  mean = report.mean_over_sets(_mixed_rows()[:2])
  assert list(mean) == ["accuracy_mean", "auc", "eer", "tar_at_far_1e1"]
  assert list(mean.values()) == pytest.approx([0.625, 0.82, 0.2, 0.5])
  assert report.mean_line(_mixed_rows()[:2]) == (
    "step 100, mean over 2 sets: accuracy 0.6250, AUC 0.8200, EER 0.2000, TAR 0.5000 "
    "at FAR 1e-1"
  )


@pytest.mark.parametrize(
  "rows", [[], [_row(1), _row(2, set_name="cfp")], [_row(1), _row(1)]]
)
def test_there_is_no_mean_over_nothing_or_over_several_steps_or_one_set_twice(rows):
  with pytest.raises(ValueError, match="one row of each set"):
    report.mean_over_sets(rows)


def test_the_table_has_the_mean_where_all_sets_have_a_score():
  lines = report.table(_mixed_rows()).splitlines()
  assert [line.split()[:3] for line in lines[1:]] == [
    ["cfp", "100", "0.5000"],
    ["lfw", "100", "0.7500"],
    ["lfw", "200", "0.9000"],
    ["mean", "100", "0.6250"],
  ]
  assert lines[-1].split()[-4:] == ["-", "-", "*", "best"]


def test_the_table_shows_no_tar_that_a_set_has_too_few_pairs_for():
  older = {name: value for name, value in _row(1).items() if name != "tar_at_far"}
  _, now, before = report.table([_row(2), older | {"set": "old"}]).splitlines()
  assert now.split()[-4:] == ["0.5000", "-", "*", "best"]
  assert before.split()[-4:] == ["0.5000", "0.2500", "*", "best"]


def test_a_table_of_nothing_is_its_header():
  assert len(report.table([]).splitlines()) == 1


@pytest.mark.parametrize("spread", [0.2, 0.0])
def test_the_picture_shows_both_kinds_of_pairs(spread):
  rng = np.random.default_rng(0)
  same = np.arange(400) % 2 == 0
  scores = np.where(same, 0.5, 0.1) * (spread > 0) + spread * rng.normal(size=400)
  pixels = report.picture(scores, same, _row(100))
  assert pixels.dtype == np.uint8
  assert pixels.shape == (420, 1000, 3)
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
  assert not pyplot.get_fignums()  # which would keep every picture


def test_tensorboard_holds_figures_and_picture_of_each_step(tmp_path: pathlib.Path):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  board = report.TensorBoard(str(tmp_path))
  image = np.zeros((4, 6, 3), np.uint8)
  board.write(_row(100, 0.75))
  board.write(_row(200, 0.8))
  board.write_picture(200, "lfw/scores", image)
  board.write_mean([_row(200, 0.8), _row(200, 0.6, "cfp")])
  events = event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0})
  events.Reload()  # before closing: a reader beside the evaluator sees it too
  accuracies = [
    (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
    for set_name in ("lfw", "mean")
    for event in events.Tensors(f"{set_name}/accuracy_mean")
  ]
  assert [step for step, _ in accuracies] == [100, 200, 200]
  assert [value for _, value in accuracies] == pytest.approx([0.75, 0.8, 0.7])
  tags = set(events.Tags()["tensors"])
  assert {"lfw/auc", "lfw/eer", "lfw/scores", "lfw/threshold"} <= tags
  tars = {tag.removeprefix("lfw/tar_at_far_") for tag in tags if "lfw/tar" in tag}
  assert tars == {"1e1", "1e1_low", "1e1_high", "1e2", "1e3"}
  board.close()
