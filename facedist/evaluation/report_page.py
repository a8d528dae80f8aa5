"""The report of a run: one HTML page with tables, curves, faces and a map.

`read_run` collects what the workdir holds, `page` turns it into HTML, and
`ReportWriter` does both in a thread of its own beside an evaluator. The page needs no
script and no network: pictures are SVG or JPEG inside it, and its content security
policy forbids all else. Colours are those of Okabe and Ito (Color Universal Design,
2008); line styles and markers differ too.
"""

import base64
import dataclasses
import functools
import html
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from facedist import __version__, errors, storage
from facedist.data import decoding
from facedist.evaluation import report, score_details
from facedist.evaluation.score_details import HardPair, ScoreDetails
from facedist.evaluation.score_log import (
  SCORE_LOG_NAME,
  UNSCORED_LOG_NAME,
  Row,
  read_rows,
)
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints, manager

PAGE_NAME = "report.html"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", "-.", ":")
_MAX_POINTS = 600  # of a curve: more than a picture has columns
_MAX_ROWS = 200  # of the table of all scores
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; background: #fff;
  color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072B2; }
.lead { font-size: 1.1rem; }
.grid { display: grid; gap: 1.5rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure > img { display: block; width: 100%; max-width: 34rem; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
.scroll { overflow-x: auto; margin: .25rem 0 .75rem;
  background: linear-gradient(to right, #fff 50%, #fff0) 0 0 / 2rem 100% local,
    linear-gradient(to left, #fff 50%, #fff0) 100% 0 / 2rem 100% local,
    linear-gradient(to right, #0005, #0000) 0 0 / .7rem 100% scroll,
    linear-gradient(to left, #0005, #0000) 100% 0 / .7rem 100% scroll;
  background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
.title { margin: 1rem 0 0; font-weight: 600; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ccc;
  text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
.figures th, .figures td { white-space: nowrap; }
.facts td { min-width: 10rem; overflow-wrap: anywhere; }
.faces { display: grid; gap: 1rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.faces li { break-inside: avoid; font-size: .8rem; line-height: 1.35; }
.faces div { display: flex; gap: 2px; }
.faces img { flex: 1; min-width: 0; height: auto; }
.faces b { font-size: .95rem; }
summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; }
  .grid { grid-template-columns: 1fr 1fr 1fr; gap: 1rem; } h2 { break-after: avoid; }
  .faces { grid-template-columns: repeat(8, 1fr); gap: .5rem; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Series:
  """The scores of one set, embedded in one way, over the steps.

  Attributes:
    name: The set, and how it was embedded where that is not the usual way.
    rows: By rising step, none twice; all of the set as it was last.
    shown: The row whose pictures are shown.
    details: Of that row; None where there is no file, or a broken one.
  """

  name: str
  rows: list[Row]
  shown: Row
  details: ScoreDetails | None


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir holds.

  Attributes:
    workdir: The run's folder.
    config: The content of its config.json; None where there is none.
    marker: What the newest checkpoint's marker says; empty where there is none.
    is_done: Whether training has finished all its steps.
    log: See `metric_writer.read_log`.
    series: The scores, by name.
    unscored: The lines of unscored.jsonl whose steps have no score.
  """

  workdir: str
  config: dict[str, Any] | None
  marker: dict[str, Any]
  is_done: bool
  log: dict[str, list[dict[str, Any]]]
  series: list[Series]
  unscored: list[Row]


def read_run(workdir: str, *, step: int | None = None) -> Run:
  """Reads what the report shows.

  Args:
    workdir: The run's folder, local or gs://.
    step: The step whose pictures are shown; None for the newest of each set.

  Raises:
    errors.DataError: The folder holds nothing of a run, no score of that step, or a
      broken file.
  """
  config_path = storage.join(workdir, manager.CONFIG_NAME)
  config = None
  if storage.exists(config_path):
    try:
      config = dict(json.loads(storage.read_bytes(config_path)))
    except (ValueError, TypeError) as error:
      raise errors.DataError(
        f"{config_path} is no JSON object; restore it from a copy of the run."
      ) from error
  rows = read_rows(storage.join(workdir, SCORE_LOG_NAME))
  log = metric_writer.read_log(workdir)
  if config is None and not rows and not any(log.values()):
    raise errors.DataError(
      f"{workdir} holds no run: there is no {manager.CONFIG_NAME}, "
      f"{metric_writer.LOG_NAME} or {SCORE_LOG_NAME}; check the spelling of --workdir."
    )
  known = checkpoints.list_checkpoints(workdir)
  scored = {(row.get("step"), row.get("set")) for row in rows}  # some of other tools
  return Run(
    workdir=workdir,
    config=config,
    marker=known[-1].marker() if known else {},
    is_done=checkpoints.is_done(workdir),
    log=log,
    series=_series(workdir, rows, step=step),
    unscored=[
      each
      for each in read_rows(storage.join(workdir, UNSCORED_LOG_NAME))
      if (each["step"], each["set"]) not in scored
    ],
  )


def page(run: Run, *, faces: bool = True) -> str:
  """Returns the report as one HTML document.

  Args:
    run: What it is of.
    faces: Whether to show the images of the hardest pairs.
  """
  name = posixpath.basename(run.workdir.rstrip("/")) or run.workdir
  parts = [
    f"<h1>Training run {_text(name)}</h1>",
    f'<p class="lead">{_text(_lead(run))}</p>',
    *_scores(run),
    "<h2>Over the training steps</h2>",
    '<div class="grid">',
    *_verification_curve(run),
    *_training_curves(run),
    "</div>",
    *(part for series in run.series for part in _set(series, faces=faces)),
    *_facts(run),
  ]
  body = "\n".join(parts)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    f"<title>Training run {_text(name)}</title>\n<style>{_STYLE}</style>\n</head>\n"
    f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
  )


def write(
  workdir: str,
  output: str | None = None,
  *,
  step: int | None = None,
  faces: bool = True,
) -> str:
  """Draws the report of a run and replaces the page at once; returns its path.

  Args:
    workdir: The run's folder.
    output: The page; `WORKDIR/report.html` if None.
    step: See `read_run`.
    faces: See `page`.

  Raises:
    errors.DataError: See `read_run`.
  """
  path = output or storage.join(workdir, PAGE_NAME)
  storage.write_bytes(path, page(read_run(workdir, step=step), faces=faces).encode())
  return path


class ReportWriter:
  """Draws pictures and the page beside an evaluator, in one thread of its own.

  Leaving its block waits until all is drawn. A page that waits to be drawn when a newer
  one is asked for is left out. What fails is logged; scoring continues.
  """

  def __init__(
    self, workdir: str, board: report.TensorBoard, *, has_page: bool = True
  ) -> None:
    """Draws nothing yet.

    Args:
      workdir: The run's folder.
      board: Gets the pictures of each score.
      has_page: Whether there is to be a page.
    """
    self._workdir, self._board, self._has_page = workdir, board, has_page
    self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="report")
    self._page: futures.Future | None = None

  def draw_pictures(self, row: Row, details: ScoreDetails) -> None:
    """Asks for TensorBoard's pictures of a score."""
    self._thread.submit(self._try, lambda: self._draw_pictures(row, details))

  def draw_page(self) -> None:
    """Asks for a new page, of what the workdir holds when it is drawn."""
    if self._has_page:
      if self._page is not None:
        self._page.cancel()  # does nothing once it has begun
      self._page = self._thread.submit(self._try, lambda: write(self._workdir))

  def __enter__(self) -> "ReportWriter":
    return self

  def __exit__(self, *error: object) -> None:
    self._thread.shutdown()

  def _draw_pictures(self, row: Row, details: ScoreDetails) -> None:
    """Writes TensorBoard's pictures of a score."""
    scores = report.picture(details.scores, details.same, row)
    self._board.write_picture(row["step"], f"{row['set']}/scores", scores)
    for name, figure in _figures_of(details):
      self._board.write_picture(row["step"], f"{row['set']}/{name}", _pixels(figure))

  def _try(self, draw: Callable[[], Any]) -> None:
    try:
      draw()
    except Exception as error:  # whatever it is, scoring continues
      logging.error("the report in %s could not be drawn: %s", self._workdir, error)


def _series(workdir: str, rows: Sequence[Row], *, step: int | None) -> list[Series]:
  """Sorts the rows by set and way of embedding, and loads the details to show."""
  by_name: dict[str, list[Row]] = {}
  for row in rows:
    if "accuracy_mean" in row:  # else it is of another tool
      by_name.setdefault(_name(row), []).append(row)
  found = []
  for name, each in sorted(by_name.items()):
    last = each[-1].get("fingerprint")  # a set that was rebuilt is another one
    of_step = {row["step"]: row for row in each if row.get("fingerprint") == last}
    ordered = [of_step[number] for number in sorted(of_step)]
    if step is None or step in of_step:
      shown = ordered[-1] if step is None else of_step[step]
      found.append(Series(name, ordered, shown, _details(workdir, shown)))
  if step is not None and not found:
    steps = sorted({row["step"] for row in rows if "step" in row})
    raise errors.DataError(
      f"--step={step} has no score in {storage.join(workdir, SCORE_LOG_NAME)}; choose "
      f"one of {', '.join(map(str, steps)) or 'none: evaluate the run first'}."
    )
  return found


def _name(row: Row) -> str:
  """Returns the set of a row, and how it was embedded where that is not usual."""
  weights = row.get("weights", "trained")
  words = [] if weights == "trained" else [f"{weights} weights"]
  words += [] if row.get("mirrored", True) else ["without mirror images"]
  return ", ".join([str(row["set"]), *words])


def _details(workdir: str, row: Row) -> ScoreDetails | None:
  """Loads the details of a row; None where there are none that can be read."""
  for path in score_details.find(workdir, [row]).values():
    try:
      return score_details.load(path)
    except errors.DataError as error:
      logging.warning("%s", error)
  return None


def _lead(run: Run) -> str:
  """Returns what matters most, in a sentence or two."""
  steps = [entry["step"] for entry in run.log["train"]]
  steps += [run.marker["step"]] if "step" in run.marker else []
  words = f"{'Finished' if run.is_done else 'Trained so far'}: step " if steps else ""
  words += f"{max(steps)}. " if steps else ""
  best = [
    max(series.rows, key=lambda row: row["accuracy_mean"]) for series in run.series
  ]
  words += " ".join(
    f"Best accuracy on {series.name}: {row['accuracy_mean']:.4f} ± "
    f"{row['accuracy_std']:.4f} at step {row['step']}."
    for series, row in zip(run.series, best, strict=True)
  )
  return words or "Nothing was trained or scored yet."


def _scores(run: Run) -> Iterator[str]:
  """Yields the tables of all sets and the curve of their accuracies."""
  yield "<h2>Scores</h2>"
  if not run.series:
    yield _missing(
      "no checkpoint was scored",
      f"python -m facedist.evaluate --workdir={run.workdir} --verification_data=DIR",
    )
    return
  with_means = [*run.series, *_means(run.series)]
  best = {
    id(max(series.rows, key=lambda row: row["accuracy_mean"])) for series in with_means
  }
  shown = [
    (series, row)
    for series in with_means
    for row in series.rows
    if id(row) in best or row is series.rows[-1]
  ]
  yield _score_table("The newest and the best score of each set", shown, best)
  yield (
    '<p class="note">Accuracy is the mean over the folds ± its standard deviation. TAR '
    "is the fraction of same pairs accepted where at most the fraction FAR of "
    "different pairs is, with its 95\u00a0% interval. The best step was chosen on the "
    "same pairs, so its figures are optimistic.</p>"
  )
  for line in report.unscored_lines(run.unscored):
    yield f'<p class="note">Without a score: {_text(line)}.</p>'
  every = [(series, row) for series in with_means for row in series.rows]
  if len(every) > len(shown):
    every.sort(key=lambda each: int(each[1]["step"]))
    newest = every[-_MAX_ROWS:]
    what = "All scores" if newest == every else f"The newest {_MAX_ROWS} scores"
    yield f"<details><summary>{what}</summary>{_score_table(what, newest, best)}"
    yield "</details>"


def _means(found: Sequence[Series]) -> Iterator[Series]:
  """Yields the means over the sets, for each way of embedding several sets."""
  by_way: dict[str, list[Row]] = {}
  for series in found:
    way = series.name.removeprefix(str(series.shown["set"]))
    by_way.setdefault(way, []).extend(series.rows)
  for way, rows in by_way.items():
    if means := report.mean_rows(rows):
      yield Series(f"mean over sets{way}", means, means[-1], None)


def _score_table(
  caption: str, scored: Sequence[tuple[Series, Row]], best: set[int]
) -> str:
  """Returns a table of rows; those in `best` are marked."""
  limits = sorted(
    {at["far"] for _, row in scored for at in row.get("tar_at_far", ())}, reverse=True
  )
  header = ["set", "step", "accuracy", "AUC", "EER"]
  header += [f"TAR at FAR {report.exponent(limit)}" for limit in limits] + ["pairs", ""]
  cells = []
  for series, row in scored:
    cells.append(
      [
        series.name,
        str(row["step"]),
        report.accuracy(row),
        f"{row['auc']:.4f}",
        f"{row['eer']:.4f}",
        *(_tar(row, limit) for limit in limits),
        str(row.get("num_pairs", "")),
        "★ best" if id(row) in best else "",
      ]
    )
  return _table(caption, header, cells)


def _verification_curve(run: Run) -> Iterator[str]:
  """Yields the accuracy of all sets."""
  if not run.series:
    return
  curves = [
    (
      series.name,
      [row["step"] for row in series.rows],
      [row["accuracy_mean"] for row in series.rows],
      [row["accuracy_std"] for row in series.rows],
    )
    for series in run.series
  ]
  yield _picture(
    _over_steps(curves, "accuracy on pairs"),
    "Verification accuracy",
    "Higher is better; 0.5 is a guess. Bars are ± one standard deviation over the "
    "folds, so a difference well within them may be chance.",
  )


def _training_curves(run: Run) -> Iterator[str]:
  """Yields what training logged."""
  train, validation = run.log["train"], run.log["validation"]
  if not train:
    yield _missing(
      f"loss, learning rate and input wait, because {metric_writer.LOG_NAME} has none",
      f"python -m facedist.train --workdir={run.workdir} with the flags of the run",
    )
    return

  def curve(name: str, label: str, entries: Sequence[Row]) -> _Curve:
    measured = [entry for entry in entries if name in entry]
    steps = [entry["step"] for entry in measured]
    return label, *_thin(steps, [entry[name] for entry in measured]), None

  def both(name: str) -> list[_Curve]:
    return [curve(name, "training", train), curve(name, "validation", validation)]

  yield _picture(
    _over_steps(both("loss"), "loss"),
    "Loss",
    "Lower is better. A point of training is the mean since the point before. "
    "Validation has no augmentation, so it may lie below.",
  )
  yield _picture(
    _over_steps(both("accuracy"), "accuracy on identities"),
    "Classification accuracy",
    "The fraction of images that are nearest to the class weight of their own "
    "identity. Training far above validation means that the network memorises.",
  )
  yield _picture(
    _over_steps([curve("learning_rate", "", train)], "learning rate"),
    "Learning rate",
    "What the schedule set at each step, warm-up included.",
  )
  if (waits := curve("input_wait", "", train))[1]:
    yield _picture(
      _over_steps([waits], "share of the time", is_share=True),
      "Input wait",
      "The share of the time in which training waited for images. Where it is above a "
      "few per cent, faster storage or more cores speed up the run.",
    )
  yield _picture(
    _over_steps([curve("images_per_second", "", train)], "images per second"),
    "Speed",
    "Higher is better. Drops are pauses, such as other work on the machine.",
  )


def _set(series: Series, *, faces: bool) -> Iterator[str]:
  """Yields the pictures and tables of one set."""
  row, details = series.shown, series.details
  yield f"<h2>{_text(series.name)}, step {row['step']}</h2>"
  if details is None:
    yield _missing(
      "the file with the pairs' scores is missing or broken, so there are no ROC, "
      "histograms, faces and map",
      "the evaluator again in a copy of the run without metrics.jsonl, or wait for its "
      "next checkpoint: each score since this version has such a file",
    )
    yield from _groups(row)
    return
  accepted = int(np.sum(~details.same & (details.scores >= details.threshold)))
  rejected = int(np.sum(details.same & (details.scores < details.threshold)))
  yield '<div class="grid">'
  yield _picture(
    _roc(row, details),
    "ROC: true accept rate over false accept rate",
    "The further up and left, the better. False accepts fall by ten from one line of "
    "the grid to the next; a point's bar is the 95\u00a0% interval.",
  )
  yield _picture(
    _histograms(details),
    "How the cosines of same and of different pairs are spread",
    f"The less they overlap, the better. At the threshold {details.threshold:.3f}, the "
    f"mean over the folds, {accepted} of {int((~details.same).sum())} different pairs "
    f"are accepted and {rejected} of {int(details.same.sum())} same pairs rejected.",
  )
  if len(details.map_points):
    yield _picture(
      _map(details),
      "Map of some identities' embeddings",
      "Each colour and marker is one identity, each point an image; shown are the "
      "identities with most images. Those of one identity should lie together. t-SNE "
      "keeps neighbours; the distances between groups mean little.",
    )
  yield "</div>"
  yield from _groups(row)
  if faces:
    yield from _faces(
      "Hardest false accepts",
      "Different people whose cosine is furthest above the threshold.",
      details.false_accepts,
      count=accepted,
    )
    yield from _faces(
      "Hardest false rejects",
      "Images of one person whose cosine is furthest below the threshold.",
      details.false_rejects,
      count=rejected,
    )


def _groups(row: Row) -> Iterator[str]:
  """Yields the table of the groups, where the row has them."""
  if "by_group" not in row:
    return
  found = row["by_group"]
  header = ["group", "pairs", "accuracy"]
  header += [f"TAR at FAR {report.exponent(far)}" for far in found["far_limits"]]
  cells = [
    [
      each["group"],
      str(each["num_pairs"]),
      f"{each['accuracy']:.4f}",
      *("–" if tar is None else f"{tar:.4f}" for tar in each["tar_at_far"]),
    ]
    for each in found["groups"]
  ]
  gaps = [found["largest_accuracy_gap"], *found["largest_tar_gaps"]]
  cells.append(["largest gap", "", *(f"{gap:.4f}" for gap in gaps)])
  yield _table("By group, at the same thresholds for all groups", header, cells)


def _faces(
  title: str, caption: str, pairs: Sequence[HardPair], *, count: int
) -> Iterator[str]:
  """Yields a heading and the image pairs."""
  yield f"<h3>{title}</h3>"
  if not pairs:
    yield '<p class="note">None.</p>'
    return
  yield f'<p class="note">{caption} The first {len(pairs)} of {count}.</p>'
  yield '<ul class="faces">'
  for pair in pairs:
    images = "".join(
      f'<img src="{_data("image/jpeg", jpeg)}" alt="{_text(name or "no name")}">'
      for jpeg, name in zip(pair.jpegs, pair.names, strict=True)
    )
    names = "<br>".join(map(_text, filter(None, pair.names)))
    yield f"<li><div>{images}</div><b>{pair.score:.3f}</b><br>{names}</li>"
  yield "</ul>"


def _facts(run: Run) -> Iterator[str]:
  """Yields what the run was: config, data, versions."""
  yield "<h2>The run</h2>"
  facts = {"workdir": run.workdir, "report drawn by": f"facedist {__version__}"}
  names = {
    "num_identities": "training identities",
    "image_size": "image size in pixels",
    "data_fingerprint": "fingerprint of the training data",
    "alignment": "alignment of the training data",
  }
  facts |= {
    text: run.marker[name] for name, text in names.items() if name in run.marker
  }
  for series in run.series:
    made_by = series.shown.get("provenance", {})
    versions = made_by.get("versions", {}).items()
    facts |= {f"scored with {name}": version for name, version in versions}
    facts |= {"scored on": made_by["device"]} if "device" in made_by else {}
  yield _fact_table("Data and versions", facts)
  for series in run.series:
    row = series.shown
    kept = ("checkpoint", "fingerprint", "images", "seconds")
    scored: Row = {name: row[name] for name in kept if name in row}
    scored |= dict(_flat(row.get("provenance", {})))
    yield f"<details><summary>How {_text(series.name)} was scored</summary>"
    yield _fact_table(f"{series.name}, step {row['step']}", scored) + "</details>"
  if run.config is None:
    yield _missing(f"there is no {manager.CONFIG_NAME}", "training, which writes it")
  else:
    yield "<details><summary>All flags of the training</summary>"
    flags = {f"--{name}": value for name, value in run.config.items()}
    yield _fact_table(manager.CONFIG_NAME, flags) + "</details>"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested objects, each with its names joined."""
  if not isinstance(value, dict):
    yield prefix, value
    return
  for name, each in value.items():
    yield from _flat(each, f"{prefix} {name}".strip())


_Curve = tuple[str, Sequence[float], Sequence[float], Sequence[float] | None]
"""Its name, steps, values and, or None, the half lengths of its error bars."""


def _figures_of(details: ScoreDetails) -> Iterator[tuple[str, Figure]]:
  """Yields by name what TensorBoard shows beside ROC and histograms."""
  if len(details.map_points):
    yield "embedding_map", _map(details)
  for name in ("false_accepts", "false_rejects"):
    if pairs := getattr(details, name):
      yield name, _face_figure(pairs)


def _face_figure(pairs: Sequence[HardPair]) -> Figure:
  """Draws image pairs in a row, each below its score."""
  shown = [
    np.concatenate([decoding.decode(jpeg)[..., ::-1] for jpeg in pair.jpegs], axis=1)
    for pair in pairs
  ]
  figure = Figure(figsize=(1.6 * len(pairs), 1.0), dpi=100, facecolor="white")
  axes = figure.add_axes((0.0, 0.0, 1.0, 0.8))
  axes.imshow(np.concatenate(shown, axis=1))
  for place, pair in enumerate(pairs):
    axes.text(
      (place + 0.5) / len(pairs),
      1.05,
      f"{pair.score:.3f}",
      transform=axes.transAxes,
      ha="center",
    )
    axes.axvline(place * shown[0].shape[1] - 0.5, color="white", linewidth=4)
  axes.axis("off")
  return figure


def _roc(row: Row, details: ScoreDetails) -> Figure:
  """Draws the ROC curve with its intervals."""
  figure, axes = _figure()
  report.draw_roc(axes, details.scores, details.same, row.get("tar_at_far", ()))
  return figure


def _histograms(details: ScoreDetails) -> Figure:
  """Draws the histograms of both kinds of pairs."""
  figure, axes = _figure()
  report.draw_histograms(axes, details.scores, details.same, details.threshold)
  return figure


def _map(details: ScoreDetails) -> Figure:
  """Draws each identity in its own colour and marker."""
  figure, axes = _figure()
  points = _on_plane(details.map_points.tobytes(), details.map_points.shape[1])
  looks = itertools.product(_MARKERS, _COLOURS)
  for label, (marker, colour) in zip(
    np.unique(details.map_labels), looks, strict=False
  ):
    x, y = points[details.map_labels == label].T
    axes.scatter(x, y, s=16, marker=marker, color=colour, alpha=0.8, linewidths=0)
  axes.set(xticks=[], yticks=[])
  return figure


@functools.lru_cache(maxsize=64)  # the page is drawn after each set of a checkpoint
def _on_plane(content: bytes, components: int) -> np.ndarray:
  """Returns float32[points, 2] by t-SNE of float32[points, components]."""
  import threadpoolctl
  from sklearn import manifold

  points = np.frombuffer(content, np.float32).reshape(-1, components)
  spread = np.std(points[:, 0])
  if not spread:  # a broken network, which says the same of all images
    return points[:, :2]
  with threadpoolctl.threadpool_limits(1):  # more only wait for each other
    return manifold.TSNE(
      init=points[:, :2] / spread * 1e-4,
      perplexity=min(10.0, (len(points) - 1) / 3),
      random_state=0,
    ).fit_transform(points)


def _over_steps(
  curves: Iterable[_Curve], what: str, *, is_share: bool = False
) -> Figure:
  """Draws values over steps; of several curves, each with its name."""
  figure, axes = _figure()
  drawn = [curve for curve in curves if len(curve[1])]
  for place, (name, steps, values, bars) in enumerate(drawn):
    few = len(steps) <= 60
    axes.errorbar(
      steps,
      values,
      yerr=bars,
      label=name,
      color=_COLOURS[place % len(_COLOURS)],
      linestyle=_LINES[place % len(_LINES)],
      marker=_MARKERS[place % len(_MARKERS)] if few else None,
      markersize=4,
      capsize=3,
      elinewidth=1,
    )
  axes.set(xlabel="step", ylabel=what)
  axes.grid(alpha=0.3)
  axes.margins(x=0.02)
  if is_share:
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  if len(drawn) > 1:
    axes.legend(fontsize="small")
  return figure


def _thin(
  steps: Sequence[float], values: Sequence[float]
) -> tuple[list[float], list[float]]:
  """Returns at most _MAX_POINTS points, each the mean of its neighbours."""
  parts = min(len(steps), _MAX_POINTS)
  if not parts:
    return [], []
  split = [np.array_split(np.asarray(each, float), parts) for each in (steps, values)]
  return [part[-1] for part in split[0]], [part.mean() for part in split[1]]


def _figure() -> tuple[Figure, Axes]:
  """Returns a figure that a phone shows at nearly its own size."""
  figure = Figure(figsize=(4.6, 3.3), dpi=100, layout="constrained", facecolor="white")
  return figure, figure.subplots()


def _pixels(figure: Figure) -> np.ndarray:
  """Returns the figure as uint8[height, width, 3] RGB."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.array(canvas.buffer_rgba())[..., :3]


def _picture(figure: Figure, title: str, caption: str) -> str:
  """Returns a figure as HTML, with what it shows and how to read it."""
  stream = io.BytesIO()
  figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
  return (
    f'<figure><img src="{_data("image/svg+xml", stream.getvalue())}" '
    f'alt="{_text(title)}. {_text(caption)}">'
    f"<figcaption><b>{_text(title)}.</b> {_text(caption)}</figcaption></figure>"
  )


def _table(caption: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  """Returns a table of figures that scrolls in a box of its own."""
  head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
  rows = "".join(
    f'<tr><th scope="row">{_text(first)}</th>'
    + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
    + "</tr>\n"
    for first, *rest in cells
  )
  return _scrolled(
    caption, f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>", "figures"
  )


def _fact_table(caption: str, facts: dict[str, Any]) -> str:
  """Returns a table of names and values."""
  rows = "".join(
    f'<tr><th scope="row">{_text(name)}</th><td>{_text(_value(value))}</td></tr>\n'
    for name, value in facts.items()
  )
  return _scrolled(caption, f"<tbody>\n{rows}</tbody>", "facts")


def _scrolled(caption: str, body: str, kind: str) -> str:
  return (
    f'<p class="title">{_text(caption)}</p>\n'
    f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">'
    f'<table class="{kind}">\n{body}</table></div>'
  )


def _missing(what: str, how: str) -> str:
  """Returns a line on what the run lacks, and how to get it."""
  return f'<p class="note">Not shown: {_text(what)}. To get it, run {_text(how)}.</p>'


def _value(value: Any) -> str:
  """Returns a value as flags and logs write it."""
  if value is None:
    return "–"
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tar(row: Row, far: float) -> str:
  """Returns a row's TAR with its interval; a dash where it was not measured."""
  for at in row.get("tar_at_far", ()):
    if at["far"] == far:
      return f"{at['tar']:.4f}{report.interval(at)}"
  value = row.get(report.tar_name(far))
  return "–" if value is None else f"{value:.4f}"


def _data(kind: str, content: bytes) -> str:
  """Returns the address that holds the content itself."""
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: str) -> str:
  """Returns the value as HTML text, or as an attribute's content in double quotes."""
  return html.escape(value)
