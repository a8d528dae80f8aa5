"""Draws what came out of the demo: pairs, accuracy over steps, cosines, a map.

launch/demo.py calls it and shows the flags.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn import manifold

from facedist import config, storage
from facedist.data import decoding, verification_set
from facedist.evaluation import verification
from tfrecords_tools.sources import lfw

_RIGHT, _WRONG, _PLAIN = "#1b7f5c", "#b3322b", "#44546a"
_SHOWN_PAIRS = 8  # of each kind
_MAPPED_PEOPLE = 24
_PIXELS = 150  # height and width of a shown face
_IMAGES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Scored:
  """Pairs and their scores.

  Attributes:
    pairs: As the list has them.
    scores: float64[pairs], cosines of the embeddings.
    same: bool[pairs].
    threshold: Cosine from which on a pair counts as the same person.
  """

  pairs: list[lfw.Pair]
  scores: np.ndarray
  same: np.ndarray
  threshold: float


@dataclasses.dataclass(frozen=True)
class PictureConfig:
  """The flags of this command."""

  output: str = config.setting(help="The PNG file to write.", on_disk=True)
  faces: str = config.setting(
    help="Folder of the drawn images/ and pairs.txt.", path=True
  )
  shards: str = config.setting(
    help="The verification set built from them.", on_disk=True
  )
  embeddings: str = config.setting(
    help="JSON file that facedist.embed wrote for that set.", path=True
  )
  scores: str = config.setting(help="The run's metrics.jsonl.", path=True)


def main(settings: PictureConfig) -> None:
  """Draws the picture."""
  embedded = json.loads(storage.read_bytes(settings.embeddings))["embeddings"]
  lines = storage.read_bytes(settings.scores).splitlines()
  rows = sorted(map(json.loads, lines), key=lambda row: int(row["step"]))
  pairs = lfw.read_pairs(storage.join(settings.faces, "pairs.txt"))
  threshold = float(np.mean(rows[-1]["fold_thresholds"]))
  scored = _score(pairs, embedded, threshold)
  figure = Figure(figsize=(12, 10.6), dpi=100, facecolor="white")
  FigureCanvasAgg(figure)
  for same, top in ((True, 0.93), (False, 0.625)):
    title = "Two images of one person" if same else "Images of two people"
    figure.text(0.02, top + 0.04, title, size=13, weight="bold")
    strip = figure.add_gridspec(
      1, _SHOWN_PAIRS, left=0.02, right=0.98, top=top, bottom=top - 0.235
    )
    for column, pair in enumerate(_choose(scored, same=same)):
      axes = figure.add_subplot(strip[column])
      _show_pair(axes, scored, pair, images=storage.join(settings.faces, "images"))
  charts = figure.add_gridspec(
    1, 3, left=0.06, right=0.98, top=0.33, bottom=0.06, wspace=0.22
  )
  raw_pixels = _raw_accuracy(settings.shards)
  _show_accuracy(figure.add_subplot(charts[0]), rows, raw_pixels=raw_pixels)
  _show_scores(figure.add_subplot(charts[1]), scored)
  _show_map(figure.add_subplot(charts[2]), embedded)
  with storage.partial_file(settings.output) as partial:
    figure.savefig(partial, format="png")


def _score(
  pairs: list[lfw.Pair], embedded: Sequence[dict[str, Any]], threshold: float
) -> Scored:
  """Returns the pairs with the cosines of their embeddings."""
  row_of = {pathlib.PurePath(entry["path"]).stem: i for i, entry in enumerate(embedded)}
  vectors = np.array([entry["embedding"] for entry in embedded], np.float32)
  first, second = (
    np.array([row_of[pathlib.PurePath(path).name] for path in images])
    for images in zip(*((pair.first, pair.second) for pair in pairs), strict=True)
  )
  return Scored(
    pairs=pairs,
    scores=verification.cosine_scores(vectors, first, second),
    same=np.array([pair.same for pair in pairs]),
    threshold=threshold,
  )


def _choose(scored: Scored, *, same: bool) -> list[int]:
  """Returns pairs of one kind, spread over its scores, the hardest first.

  No person is shown twice, unless there are too few.
  """
  rows = np.flatnonzero(scored.same == same)
  hardest_first = rows[np.argsort(scored.scores[rows] * (1 if same else -1))]
  chosen: list[int] = []
  seen: set[str] = set()
  for place in np.linspace(0, len(rows) - 1, _SHOWN_PAIRS).astype(int):
    for row in [*hardest_first[place:], hardest_first[place]]:
      pair = scored.pairs[row]
      people = {image.partition("/")[0] for image in (pair.first, pair.second)}
      if not people & seen:
        break
    seen |= people
    chosen.append(int(row))
  return chosen


def _show_pair(axes: Axes, scored: Scored, pair: int, *, images: str) -> None:
  """Shows one image above the other, with score and decision."""
  shown = []
  for path in (scored.pairs[pair].first, scored.pairs[pair].second):
    jpeg = storage.read_bytes(storage.join(images, f"{path}.jpg"))
    image = decoding.decode(jpeg)
    image = cv2.resize(image, (_PIXELS, _PIXELS), interpolation=cv2.INTER_AREA)
    shown.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
  score = scored.scores[pair]
  says_same = bool(score >= scored.threshold)
  is_right = says_same == bool(scored.same[pair])
  color = _RIGHT if is_right else _WRONG
  axes.imshow(np.concatenate(shown))
  axes.set_title(
    f"{score:.2f}  {'same' if says_same else 'different'} {'✓' if is_right else '✗'}",
    size=10,
    color=color,
  )
  axes.set(xticks=[], yticks=[])
  for side in axes.spines.values():
    side.set(color=color, linewidth=3)


def _show_accuracy(
  axes: Axes, rows: Sequence[dict[str, Any]], *, raw_pixels: float
) -> None:
  """Draws accuracy over steps, with its deviation over the folds."""
  steps = [row["step"] for row in rows]
  means = np.array([row["accuracy_mean"] for row in rows])
  deviations = np.array([row["accuracy_std"] for row in rows])
  axes.fill_between(
    steps, means - deviations, means + deviations, color=_RIGHT, alpha=0.2, linewidth=0
  )
  axes.plot(steps, means, color=_RIGHT, marker="o", markersize=4)
  axes.annotate(
    f"{means[-1]:.3f} ± {deviations[-1]:.3f}",
    (steps[-1], means[-1]),
    xytext=(0, -18),
    textcoords="offset points",
    ha="right",
    color=_RIGHT,
  )
  axes.axhline(raw_pixels, color=_PLAIN, linestyle="--", linewidth=1)
  axes.text(
    steps[-1],
    raw_pixels + 0.006,
    f"raw pixels {raw_pixels:.3f}",
    ha="right",
    color=_PLAIN,
  )
  axes.set_title("Accuracy on people not trained on", size=11)
  axes.set(xlabel="step", ylim=(0.5, 1.01))
  axes.grid(alpha=0.3)


def _show_scores(axes: Axes, scored: Scored) -> None:
  """Draws the histograms of both kinds of pairs and the threshold."""
  bins = np.linspace(min(-0.4, scored.scores.min()), 1, 40).tolist()
  for kind, color, label in (
    (False, _WRONG, "two people"),
    (True, _RIGHT, "one person"),
  ):
    axes.hist(
      scored.scores[scored.same == kind], bins, color=color, alpha=0.6, label=label
    )
  axes.axvline(scored.threshold, color=_PLAIN, linewidth=1, linestyle="--")
  axes.set_title("Cosine of the pairs", size=11)
  axes.set(xlabel="cosine", yticks=[])
  axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # leaves room for the legend
  axes.legend(frameon=False, loc="upper left")


def _show_map(axes: Axes, embedded: Sequence[dict[str, Any]]) -> None:
  """Draws the embeddings of some people in the plane, a colour a person."""
  people = sorted({entry["identity"] for entry in embedded})[:_MAPPED_PEOPLE]
  chosen = [entry for entry in embedded if entry["identity"] in people]
  vectors = np.array([entry["embedding"] for entry in chosen], np.float32)
  numbers = np.array([people.index(entry["identity"]) for entry in chosen])
  perplexity = min(10.0, (len(chosen) - 1) / 3)
  plane = manifold.TSNE(
    2, perplexity=perplexity, metric="cosine", init="pca", random_state=0
  ).fit_transform(vectors)
  x, y = plane.T
  axes.scatter(x, y, c=numbers, cmap="hsv", s=14, linewidth=0)
  axes.set_title(f"{len(people)} of these people (t-SNE)", size=11)
  axes.set(xticks=[], yticks=[])


def _raw_accuracy(shards: str) -> float:
  """Returns the accuracy of cosines of the pixels themselves, less their mean."""
  pairs = verification_set.load_verification_set(shards)
  ids = np.arange(pairs.num_images)
  pixels = np.concatenate(
    [
      pairs.read(ids[start : start + _IMAGES_AT_ONCE])
      for start in range(0, len(ids), _IMAGES_AT_ONCE)
    ]
  )
  vectors = pixels.reshape(len(ids), -1).astype(np.float32)
  vectors -= vectors.mean(axis=1, keepdims=True)
  scores = verification.cosine_scores(vectors, pairs.first, pairs.second)
  return verification.verify(scores, pairs.same, pairs.folds).accuracy_mean


def run() -> None:
  """Runs the command."""
  config.run_command(main, PictureConfig)


if __name__ == "__main__":
  run()
