"""Reports of a score: its row, a log line, a table, TensorBoard and a picture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from facedist.evaluation.verification import Verification, roc

Row = dict[str, Any]
_SCALARS = (
  "accuracy_mean",
  "accuracy_std",
  "auc",
  "eer",
  "tar_at_far_1e2",
  "tar_at_far_1e3",
)
_TAR = "tar_at_far_"
MEAN = "mean"
"""What the mean over the sets is called in the table and in TensorBoard."""
# of Okabe and Ito, which people with any colour vision tell apart
SAME_COLOUR, DIFFERENT_COLOUR = "#0072B2", "#D55E00"


def row(
  result: Verification, *, key_fields: Row, checkpoint: str, images: int, seconds: float
) -> Row:
  """Returns what `metrics.jsonl` says of one checkpoint on one verification set.

  Args:
    result: The score.
    key_fields: The fields that identify the score, such as step and set.
    checkpoint: Name of the checkpoint, such as step-00000100.
    images: Images embedded.
    seconds: Time to embed and score them.
  """
  cost = {"images": images, "seconds": round(seconds, 3)}
  return key_fields | {"checkpoint": checkpoint} | dataclasses.asdict(result) | cost


def line(scored: Row) -> str:
  """Returns one readable line of a row."""
  threshold = np.mean(scored["fold_thresholds"])
  tars = ", ".join(
    f"{at['tar']:.4f}{interval(at)} at FAR {exponent(at['far'])}"
    for at in scored["tar_at_far"]
  )
  tars = f", TAR {tars} (95 %, resampling {scored['resampled']})" if tars else ""
  return (
    f"step {scored['step']}, {scored['set']}: accuracy {accuracy(scored)} over "
    f"{len(scored['fold_accuracies'])} folds, {scored['num_pairs']} pairs in all, "
    f"threshold {threshold:.3f}, AUC {scored['auc']:.4f}, EER {scored['eer']:.4f}"
    f"{tars}{_groups(scored)} ({scored['images']} images in {scored['seconds']:.1f} s)"
  )


def mean_over_sets(rows: Sequence[Row]) -> dict[str, float]:
  """Returns the mean of each figure over several sets; each set counts the same.

  Args:
    rows: The rows of one step, one for each set.

  Returns:
    `accuracy_mean`, `auc`, `eer`, and the TARs that all rows have, under the names of
    TensorBoard, such as `tar_at_far_1e4`.

  Raises:
    ValueError: There is no row, or the rows are of several steps, or two of one set.
  """
  names = {scored["set"] for scored in rows}
  if len({scored["step"] for scored in rows}) != 1 or len(names) < len(rows):
    raise ValueError("the mean over sets is of one row of each set, all of one step")
  figures = [_figures(scored) for scored in rows]
  shared = [name for name in figures[0] if all(name in each for each in figures)]
  return {name: float(np.mean([each[name] for each in figures])) for name in shared}


def mean_line(rows: Sequence[Row]) -> str:
  """Returns one readable line of the mean over the sets of one step's rows."""
  mean = mean_over_sets(rows)
  tars = ", ".join(
    f"{value:.4f} at FAR {name.removeprefix(_TAR).replace('e', 'e-')}"
    for name, value in mean.items()
    if name.startswith(_TAR)
  )
  return (
    f"step {rows[0]['step']}, mean over {len(rows)} sets: accuracy "
    f"{mean['accuracy_mean']:.4f}, AUC {mean['auc']:.4f}, EER {mean['eer']:.4f}, "
    f"TAR {tars}"
  )


def table(rows: Sequence[Row], unscored: Sequence[Row] = ()) -> str:
  """Returns a table of rows by set and step; a star marks the best step of each set.

  With several sets, the mean over them follows for each step that all are scored on.

  Args:
    rows: Of `metrics.jsonl`.
    unscored: Of `unscored.jsonl`, for lines after the table.
  """
  header = ("set", "step", "accuracy", "AUC", "EER", "TAR@FAR=1e-2", "TAR@FAR=1e-3", "")
  best = {id(chosen) for chosen in best_rows(rows)}
  ordered = sorted(rows, key=lambda scored: (scored["set"], scored["step"]))
  means = mean_rows(rows)
  best |= {id(chosen) for chosen in best_rows(means)}
  cells = [header] + [
    (
      scored["set"],
      str(scored["step"]),
      accuracy(scored),
      f"{scored['auc']:.4f}",
      f"{scored['eer']:.4f}",
      *(
        f"{figures[name]:.4f}" if name in figures else "-"
        for name in ("tar_at_far_1e2", "tar_at_far_1e3")
      ),
      "* best" if id(scored) in best else "",
    )
    for scored in [*ordered, *means]
    for figures in [_figures(scored)]
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if place in (0, 7) else cell.rjust(width)
      for place, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in cells
  ]
  return "\n".join([*lines, *unscored_lines(unscored)])


def unscored_lines(unscored: Sequence[Row]) -> list[str]:
  """Returns a line for each set and reason, such as `lfw: steps 100, 200 skipped`."""
  steps: dict[tuple[str, str], list[int]] = {}
  for each in sorted(unscored, key=lambda each: each["step"]):
    steps.setdefault((each["set"], each["reason"]), []).append(each["step"])
  return [
    f"{name}: steps {', '.join(map(str, those))} {reason}"
    for (name, reason), those in sorted(steps.items())
  ]


def best_rows(rows: Sequence[Row]) -> list[Row]:
  """Returns the most accurate row of each set, of equal ones the earliest step."""
  best: dict[str, Row] = {}
  for scored in sorted(rows, key=lambda scored: scored["step"]):
    champion = best.get(scored["set"])
    if champion is None or scored["accuracy_mean"] > champion["accuracy_mean"]:
      best[scored["set"]] = scored
  return [best[name] for name in sorted(best)]


def picture(scores: np.ndarray, same: np.ndarray, scored: Row) -> np.ndarray:
  """Draws the ROC curve beside the histograms of same and different pairs.

  Args:
    scores: float[pairs] cosines.
    same: bool[pairs].
    scored: Their row.

  Returns:
    uint8[height, width, 3] RGB.
  """
  figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
  canvas = FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  threshold = float(np.mean(scored["fold_thresholds"]))
  draw_roc(left, scores, same, scored["tar_at_far"])
  draw_histograms(right, scores, same, threshold)
  left.set_title(f"AUC {scored['auc']:.4f}, EER {scored['eer']:.4f}", fontsize=10)
  right.set_title(f"mean threshold of the folds {threshold:.3f}", fontsize=10)
  title = f"{scored['set']}, step {scored['step']}: {accuracy(scored)}"
  figure.suptitle(title, fontsize=12)
  canvas.draw()
  return np.array(canvas.buffer_rgba())[..., :3]


class TensorBoard:
  """Writes rows and pictures as TensorBoard events; each is on the disk at once."""

  def __init__(self, folder: str) -> None:
    import tensorflow as tf  # the tables and pictures of this module do without it

    self._summary = tf.summary
    self._writer = tf.summary.create_file_writer(folder)

  def write(self, scored: Row) -> None:
    """Writes the figures of a row."""
    with self._writer.as_default(step=scored["step"]):
      for name, value in _scalars(scored).items():
        self._summary.scalar(f"{scored['set']}/{name}", value)
      threshold = float(np.mean(scored["fold_thresholds"]))
      self._summary.scalar(f"{scored['set']}/threshold", threshold)
    self._writer.flush()

  def write_picture(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture, uint8[height, width, 3]; any thread may call it."""
    with self._writer.as_default(step=step):
      self._summary.image(name, image[np.newaxis])
    self._writer.flush()

  def write_mean(self, rows: Sequence[Row]) -> None:
    """Writes the mean over the sets of one step's rows."""
    with self._writer.as_default(step=rows[0]["step"]):
      for name, value in mean_over_sets(rows).items():
        self._summary.scalar(f"{MEAN}/{name}", value)
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


def _groups(scored: Row) -> str:
  """Returns the accuracy by group and its largest gap, where a row has them."""
  if "by_group" not in scored:
    return ""
  groups = scored["by_group"]
  accuracies = ", ".join(
    f"{each['group']} {each['accuracy']:.4f}" for each in groups["groups"]
  )
  return f", accuracy by group {accuracies}, gap {groups['largest_accuracy_gap']:.4f}"


def mean_rows(rows: Sequence[Row]) -> list[Row]:
  """Returns a row of means for each step with a row of every set, if they are several.

  Such a row has what the table shows.
  """
  sets = {scored["set"] for scored in rows}
  if len(sets) < 2:
    return []
  of_steps: dict[int, list[Row]] = {}
  for scored in sorted(rows, key=lambda scored: scored["step"]):
    of_steps.setdefault(scored["step"], []).append(scored)
  return [
    {"set": MEAN, "step": step} | mean_over_sets(some)
    for step, some in of_steps.items()
    if len(some) == len(sets)
  ]


def _figures(scored: Row) -> dict[str, float]:
  """Returns the figures of a row of which a mean over sets is reported.

  TARs are those that the set has pairs for; a row of an older version does not say so.
  """
  tars = [name for name in scored if name.startswith(_TAR)]
  figures = {name: scored[name] for name in ("accuracy_mean", "auc", "eer")}
  if "tar_at_far" in scored:
    figures |= {tar_name(at["far"]): at["tar"] for at in scored["tar_at_far"]}
  else:
    figures |= {name: scored[name] for name in tars}
  return dict(sorted(figures.items()))


def _scalars(scored: Row) -> dict[str, float]:
  """Returns the figures of a row that are drawn over the steps."""
  scalars = {name: scored[name] for name in _SCALARS}
  for each in scored.get("by_group", {}).get("groups", ()):
    scalars[f"accuracy_by_group/{each['group']}"] = each["accuracy"]
  for at in scored["tar_at_far"]:
    name = tar_name(at["far"])
    bounds = {f"{name}_{end}": at[end] for end in ("low", "high")}
    scalars |= {name: at["tar"]} | {
      end: value for end, value in bounds.items() if value is not None
    }
  return scalars


def tar_name(far: float) -> str:
  """Returns the name of a TAR such as tar_at_far_1e3."""
  return _TAR + exponent(far).replace("-", "")


def exponent(far: float) -> str:
  """Returns a power of ten such as 1e-3."""
  return f"1e{round(np.log10(far))}"


def interval(at: dict[str, float | None]) -> str:
  """Returns a TAR's interval; nothing where there is none."""
  return "" if at["low"] is None else f" [{at['low']:.4f}, {at['high']:.4f}]"


def accuracy(scored: Row) -> str:
  """Returns mean and deviation over the folds as papers print them."""
  deviation = f" ± {scored['accuracy_std']:.4f}" if "accuracy_std" in scored else ""
  return f"{scored['accuracy_mean']:.4f}{deviation}"


def draw_roc(
  axes: Axes, scores: np.ndarray, same: np.ndarray, tar_at_far: Sequence[Row]
) -> None:
  """Draws true accepts over false accepts, these on a logarithmic scale.

  Args:
    axes: Where to draw.
    scores: float[pairs] cosines.
    same: bool[pairs].
    tar_at_far: The fields of each `verification.TarAtFar`, whose intervals are drawn.
  """
  far, tar, _ = roc(scores, same)
  lowest = 1.0 / max(2, np.count_nonzero(~same))
  axes.step(np.maximum(far, lowest), tar, where="post", color=SAME_COLOUR, label="ROC")
  chance = np.geomspace(lowest, 1.0)
  axes.plot(chance, chance, ":", color="grey", label="chance")
  measured = [at for at in tar_at_far if at["low"] is not None]
  if measured:
    tars = np.array([at["tar"] for at in measured])
    ends = np.array([[at[end] for at in measured] for end in ("low", "high")])
    axes.errorbar(
      [at["far"] for at in measured],
      tars,
      np.maximum([tars - ends[0], ends[1] - tars], 0.0),
      fmt="o",
      markersize=4,
      capsize=4,
      color=DIFFERENT_COLOUR,
      label="TAR, 95 % interval",
    )
  axes.set(xscale="log", xlim=(lowest, 1.0), ylim=(0.0, 1.02))
  axes.set(xlabel="false accept rate", ylabel="true accept rate")
  axes.grid(alpha=0.3)
  axes.legend(loc="lower right", fontsize="small")


def draw_histograms(
  axes: Axes, scores: np.ndarray, same: np.ndarray, threshold: float
) -> None:
  """Draws how cosines of same and of different pairs are spread.

  Args:
    axes: Where to draw.
    scores: float[pairs] cosines.
    same: bool[pairs].
    threshold: The cosine that is marked.
  """
  bins = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-3), 61)
  for chosen, label, colour, line in (
    (~same, "different", DIFFERENT_COLOUR, "--"),
    (same, "same", SAME_COLOUR, "-"),
  ):
    axes.hist(
      scores[chosen],
      bins,
      histtype="stepfilled",
      facecolor=(colour, 0.35),
      edgecolor=colour,
      linestyle=line,
      linewidth=1.2,
      label=label,
    )
  axes.axvline(threshold, color="black", linestyle=":", label="threshold")
  axes.set(xlabel="cosine", ylabel="pairs")
  axes.legend(fontsize="small")
