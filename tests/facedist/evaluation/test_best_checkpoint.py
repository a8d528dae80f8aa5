"""Which checkpoint best.json names, from rows written by hand."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from facedist import errors, storage
from facedist.evaluation import evaluator
from facedist.evaluation.best_checkpoint import BestCheckpoint
from facedist.evaluation.score_log import ScoreLog
from facedist.training.checkpoint import checkpoints
from tests.facedist.evaluation.test_scoring import PAIRS

# 10 different pairs
LFW = dataclasses.replace(PAIRS, same=np.arange(20) % 2 == 0)
CFP = dataclasses.replace(LFW, name="cfp", fingerprint="bb")
PLAN = evaluator.ScorePlan((LFW, CFP), mirror=True)
# accuracy, EER and TAR at FAR 1e-1 of (lfw, cfp) by step
FIGURES = {
  1: [(0.90, 0.05, 0.7), (0.70, 0.40, 0.7)],
  2: [(0.80, 0.10, 0.9), (0.84, 0.20, 0.6)],  # the best mean accuracy
  3: [(0.82, 0.25, 0.5), (0.82, 0.01, 0.5)],  # as good, and the best mean EER
  4: [(0.99, 0.01, 0.9), (0.10, 0.90, 0.4)],
}
BEST = {"accuracy": (2, 0.82), "eer": (3, 0.13), "tar_at_far_1e1": (2, 0.75)}


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path: pathlib.Path, bucket: str) -> str:
  return str(tmp_path) if request.param == "disk" else f"{bucket}/run"


def _save(workdir: str, *steps: int) -> None:
  for step in steps:
    storage.write_bytes(checkpoints.at(workdir, step).path + ".json", b"{}")


def _score(workdir: str, *steps: int, only: str = "") -> ScoreLog:
  scores = ScoreLog(storage.join(workdir, "metrics.jsonl"))
  for step in steps:
    for pair_set, (accuracy, eer, tar) in zip(PLAN.sets, FIGURES[step], strict=True):
      figures = {"accuracy_mean": accuracy, "eer": eer, "auc": 0.5}
      figures |= {"tar_at_far_1e2": 0.0, "tar_at_far_1e3": 0.0}
      figures["tar_at_far"] = [{"far": 0.1, "tar": tar}]
      if pair_set.name != only:
        scores.append(PLAN.key_fields(step, pair_set) | figures)
  return scores


@pytest.mark.parametrize("metric", BEST)
def test_the_mean_over_the_sets_decides_and_of_equal_ones_the_earliest(
  tmp_path, metric
):
  run = str(tmp_path)
  _save(run, 1, 2, 3, 4)
  BestCheckpoint(run, PLAN, _score(run, 1, 2, 3, 4), metric=metric).update()
  best = json.loads((tmp_path / "best.json").read_text())
  step, value = BEST[metric]
  assert (best.pop("step"), best.pop("value")) == (step, pytest.approx(value))
  assert best == {
    **{"checkpoint": f"step-0000000{step}", "metric": metric, "sets": ["lfw", "cfp"]},
    **{"mirrored": True, "weights": "trained", "plan": PLAN.fingerprint},
  }


def test_pruning_keeps_the_best_so_far_and_find_checkpoint_knows_it(workdir):
  with pytest.raises(errors.DataError, match=r"no .*best.json; run .*--keep_best"):
    evaluator.find_checkpoint(workdir, "best")
  _save(workdir, 1)
  scores = _score(workdir, 1)
  best = BestCheckpoint(workdir, PLAN, scores, metric="accuracy")
  kept = []
  for step in (2, 3, 4):
    best.update()
    _save(workdir, step)
    _score(workdir, step)
    checkpoints.prune(workdir, keep_last=1)
    kept.append((checkpoints.read_best(workdir)["step"], evaluator.list_steps(workdir)))
  assert kept == [(1, [1, 2]), (2, [2, 3]), (2, [2, 4])]
  assert evaluator.find_checkpoint(workdir, "best") == checkpoints.at(workdir, 2)
  assert evaluator.find_checkpoint(workdir, None).step == 4


def test_what_is_deleted_or_half_scored_is_not_the_best(tmp_path):
  run = str(tmp_path)
  _save(run, 1, 3)
  scores = _score(run, 1, 2)
  best = BestCheckpoint(run, PLAN, scores, metric="accuracy")
  _score(run, 3, only="cfp")
  best.update()
  assert checkpoints.read_best(run)["step"] == 1
  _score(run, 3)
  best.update()
  assert checkpoints.read_best(run)["step"] == 3


def test_a_far_that_a_set_cannot_support_is_refused(tmp_path):
  scores = ScoreLog(str(tmp_path / "metrics.jsonl"))
  BestCheckpoint(str(tmp_path), PLAN, scores, metric="tar_at_far_1e1")
  with pytest.raises(errors.UsageError, match="needs 100 different pairs, but lfw has"):
    BestCheckpoint(str(tmp_path), PLAN, scores, metric="tar_at_far_1e2")


def test_a_corrupt_file_is_named_and_nothing_is_deleted_meanwhile(tmp_path, caplog):
  run = str(tmp_path)
  _save(run, 1, 2)
  (tmp_path / "best.json").write_text('{"step": ')
  checkpoints.prune(run, keep_last=1)
  assert evaluator.list_steps(run) == [1, 2]
  assert "no old checkpoint is deleted" in caplog.text
  with pytest.raises(errors.DataError, match=r"best.json is corrupt"):
    evaluator.find_checkpoint(run, "best")
