"""`best.json`: names the best checkpoint of a run by a metric, which is then kept.

The checkpoint stays in `checkpoints/` under its own name, and neither training nor the
evaluator deletes it, whatever --keep_last says; `--checkpoint=best` finds it. The file
has `step`, `checkpoint`, `metric`, `value`, the `sets` of which it is the mean,
`mirrored`, `weights`, and `plan`, the fingerprint of the sets and the way of embedding.
"""

from typing import Any

import numpy as np
from absl import logging

from facedist import errors
from facedist.evaluation import report
from facedist.evaluation.evaluator import ScorePlan, list_steps
from facedist.evaluation.score_log import ScoreLog
from facedist.training.checkpoint import checkpoints

METRICS = {
  "accuracy": "accuracy_mean",
  "auc": "auc",
  "eer": "eer",
  **{f"tar_at_far_1e{digits}": f"tar_at_far_1e{digits}" for digits in range(1, 7)},
}
"""The name of each metric in `report.mean_over_sets`."""
_LOWER_IS_BETTER = ("eer",)


class BestCheckpoint:
  """Keeps the best checkpoint of a run among those that are scored and still exist."""

  def __init__(
    self, workdir: str, plan: ScorePlan, score_log: ScoreLog, *, metric: str
  ) -> None:
    """Checks that the metric can be computed and is the one of best.json.

    Args:
      workdir: The run's folder.
      plan: The sets over which the mean is taken.
      score_log: Has the scores, of other evaluators too.
      metric: One of METRICS.

    Raises:
      errors.UsageError: A set has too few different pairs for the metric's FAR.
      errors.ConfigError: best.json is of another metric or of other sets.
    """
    self._workdir, self._plan, self._score_log = workdir, plan, score_log
    self._metric = metric
    if metric.startswith("tar_at_far_1e"):
      needed = 10 ** int(metric.removeprefix("tar_at_far_1e"))
      for pair_set in plan.sets:
        if (there := np.count_nonzero(~pair_set.same)) < needed:
          raise errors.UsageError(
            f"--keep_best={metric} needs {needed} different pairs, but "
            f"{pair_set.name} has {there}; choose a higher FAR or accuracy."
          )
    found = checkpoints.read_best(workdir)
    if found is not None and (found.get("metric"), found.get("plan")) != (
      metric,
      plan.fingerprint,
    ):
      raise errors.ConfigError(
        f"--keep_best={metric}: {checkpoints.best_path(workdir)} keeps the best by "
        f"{found.get('metric')} on {', '.join(found.get('sets', []))} with "
        f"{found.get('weights')} weights, of other sets or another way of embedding; "
        "give the same flags as then, or remove that file to choose anew."
      )

  def update(self) -> None:
    """Writes best.json if a checkpoint is better; of equal ones the earliest stays.

    Call it after a row was added to the score log, and while the lease still keeps its
    checkpoint. It reads the scores again after it has written, so that the last of
    several evaluators at once writes the best of all.
    """
    while (best := self._find()) and best != checkpoints.read_best(self._workdir):
      checkpoints.write_best(self._workdir, best)
      logging.info(
        "step %d is the best so far: %s %.4f", best["step"], self._metric, best["value"]
      )

  def _find(self) -> dict[str, Any] | None:
    """Returns what best.json should say; None if nothing is scored yet."""
    rows, existing = self._score_log.rows(), set(list_steps(self._workdir))
    values: dict[int, float] = {}
    for step in sorted(existing.intersection(self._plan.finished_steps(rows))):
      mean = report.mean_over_sets(self._plan.of_step(step, rows))
      if METRICS[self._metric] in mean:  # rows of older versions lack some
        values[step] = mean[METRICS[self._metric]]
    if not values:
      return None
    choose = min if self._metric in _LOWER_IS_BETTER else max
    step = choose(values, key=lambda one: values[one])
    return {
      "step": step,
      "checkpoint": checkpoints.at(self._workdir, step).name,
      "metric": self._metric,
      "value": values[step],
      "sets": [each.name for each in self._plan.sets],
      "mirrored": self._plan.mirror,
      "weights": self._plan.weights,
      "plan": self._plan.fingerprint,
    }
