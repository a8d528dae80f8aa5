"""Draws embeddings of two or three floats where they lie: on a circle or a sphere."""

import io
import itertools
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from facedist import errors

_MAX_POINTS = 20_000
_MAX_NAMES = 30
_NUM_VIEWS = 500
_GRID_DEGREES = 30
_PAPER, _GRID = "#f4f4f1", "#d2d2cc"

Classes = Mapping[str, np.ndarray]
"""float[images, embedding] unit embeddings of each class."""


class Plot:
  """Gathers embeddings for a picture, evenly thinned where there are very many."""

  def __init__(self, *, embedding_size: int, num_images: int, flag: str) -> None:
    """Starts without an embedding.

    Args:
      embedding_size: Floats of an embedding.
      num_images: How many embeddings will come.
      flag: What the user asked for the picture with, for the error.

    Raises:
      errors.UsageError: Such embeddings lie neither on a circle nor on a sphere.
    """
    if embedding_size not in _PANELS:
      raise errors.UsageError(
        f"{flag} draws embeddings of 2 or 3 floats, but this run's have "
        f"{embedding_size}; train one with --embedding_size=3."
      )
    self._draw = _PANELS[embedding_size]
    self._numbers = itertools.count()
    self._every = -(-num_images // _MAX_POINTS) or 1
    self._found: dict[str, list[np.ndarray]] = {}

  @property
  def num_points(self) -> int:
    """How many embeddings the picture shows."""
    return sum(map(len, self._found.values()))

  def add(self, *, identity: str | None, embedding: np.ndarray) -> None:
    """Adds the float32[embedding] of an image, of any length but zero."""
    if next(self._numbers) % self._every == 0:
      unit = embedding / np.linalg.norm(embedding)
      self._found.setdefault(identity or "", []).append(unit)

  def png(self, title: str) -> bytes:
    """Draws what was added; the same embeddings give the same bytes."""
    classes = {name: np.stack(self._found[name]) for name in sorted(self._found)}
    figure = self._draw(classes)
    figure.suptitle(f"{title}: {self.num_points:,} images of {len(classes):,} classes")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()


def best_view(means: np.ndarray) -> np.ndarray:
  """Chooses from where to look at a sphere so that no class lies at the rim.

  Args:
    means: float[classes, 3] unit vectors.

  Returns:
    float64[3]: the unit vector, of a few hundred, to which or to whose opposite the
    farthest class is nearest.
  """
  numbers = np.arange(_NUM_VIEWS) + 0.5
  height = 1 - 2 * numbers / _NUM_VIEWS
  turn = np.pi * (1 + 5**0.5) * numbers  # a spiral that covers the sphere evenly
  radius = np.sqrt(1 - height**2)
  views = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
  return views[np.abs(views @ means.T).min(axis=1, initial=1.0).argmax()]


def _sphere(classes: Classes) -> Figure:
  """Draws the two halves of a sphere, as seen from two opposite sides."""
  figure = Figure(figsize=(10, 5.3), dpi=100, layout="constrained")
  means = [_mean_direction(those) for those in classes.values()]
  front = best_view(np.reshape(means, (-1, 3)))
  size = float(np.clip(8000 / max(1, sum(map(len, classes.values()))), 3, 20))
  sides = (("one side", front), ("the other side", -front))
  for axes, (side, towards) in zip(figure.subplots(1, 2), sides, strict=True):
    axes.set_title(side, fontsize=10)
    _prepare(axes, room=1.06)
    across, up = _screen(towards)
    for line in _graticule():
      hidden = line @ towards < 0
      shown = np.where(hidden[:, None], np.nan, line)
      axes.plot(shown @ across, shown @ up, color=_GRID, linewidth=0.7, zorder=1)
    for (name, those), colour in zip(classes.items(), _colours(classes), strict=True):
      near = those[those @ towards >= 0]
      axes.scatter(
        near @ across, near @ up, s=size, color=colour, alpha=0.5, linewidths=0
      )
      mean = _mean_direction(those)
      if mean @ towards >= 0 and len(classes) <= _MAX_NAMES:
        _write(axes, name, (mean @ across, mean @ up + 0.09))
  return figure


def _circle(classes: Classes) -> Figure:
  """Draws the circle, with a short ray for each embedding."""
  figure = Figure(figsize=(5.6, 5.9), dpi=100, layout="constrained")
  axes = figure.subplots()
  _prepare(axes, room=1.3)
  for (name, those), colour in zip(classes.items(), _colours(classes), strict=True):
    rays = np.stack([0.92 * those, 1.08 * those], axis=1)
    axes.add_collection(LineCollection(rays, colors=[colour], alpha=0.6, linewidth=1.5))
    if len(classes) <= _MAX_NAMES:
      _write(axes, name, tuple(1.18 * _mean_direction(those)))
  return figure


_PANELS: dict[int, Callable[[Classes], Figure]] = {2: _circle, 3: _sphere}


def _prepare(axes: Axes, *, room: float) -> None:
  """Draws the disc and leaves out the frame."""
  turn = np.linspace(0, 2 * np.pi, 361)
  axes.fill(np.cos(turn), np.sin(turn), facecolor=_PAPER, edgecolor=_GRID, zorder=0)
  axes.set(xlim=(-room, room), ylim=(-room, room), aspect="equal")
  axes.set_axis_off()


def _graticule() -> list[np.ndarray]:
  """Returns meridians and parallels, float64[points, 3] each."""
  around = np.radians(np.linspace(0, 360, 181))
  lines = []
  for degrees in range(0, 180, _GRID_DEGREES):
    a = np.radians(degrees)
    flat = np.cos(around)
    lines.append(np.stack([np.cos(a) * flat, np.sin(a) * flat, np.sin(around)], axis=1))
    height = np.full_like(around, np.sin(a - np.pi / 2))
    radius = np.sqrt(1 - height**2)
    lines.append(
      np.stack([radius * np.cos(around), radius * np.sin(around), height], axis=1)
    )
  return lines


def _screen(towards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the unit vectors that point to the right and up when looking at a side."""
  across = np.cross([0.0, 0.0, 1.0], towards)
  across /= np.linalg.norm(across)
  return across, np.cross(towards, across)


def _mean_direction(embeddings: np.ndarray) -> np.ndarray:
  """Returns the unit vector of the mean of a class."""
  mean = embeddings.mean(axis=0)
  return mean / max(float(np.linalg.norm(mean)), 1e-9)


def _colours(classes: Classes) -> np.ndarray:
  """Returns float64[classes, 4], as different as so many can be."""
  count = len(classes)
  if count <= 10:
    return colormaps["tab10"](np.arange(count))
  return colormaps["hsv"](np.arange(count) / count)


def _write(axes: Axes, name: str, place: tuple[float, float]) -> None:
  """Writes a class's name at its middle."""
  outline = patheffects.withStroke(linewidth=3, foreground="white")
  axes.text(
    *place, name, ha="center", va="center", weight="bold", path_effects=[outline]
  )
