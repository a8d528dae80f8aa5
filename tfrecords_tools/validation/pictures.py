"""Pictures of a set: histograms of its images, and a contact sheet of its faces."""

import dataclasses
import functools
import io
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from facedist import errors, storage
from facedist.data import decoding
from facedist.data.shards import tfrecord
from tfrecords_tools.validation import scan, stats

COLUMNS = 8
_TILE, _GAP, _MARGIN, _CAPTION, _HEADING = 128, 14, 28, 32, 44  # pixels
_DPI = 100
_FONT = "DejaVu Sans Mono"
_LETTERS = 21  # of a caption at 7 points, as wide as a tile
_BLUE, _GREEN, _GREY, _RED = "#2f5d8a", "#1b7f5c", "#44546a", "#b3322b"
_BINS = 60
_TICKS = 12
_THOUSANDS = "{x:,.0f}"


@dataclasses.dataclass(frozen=True)
class PictureFace:
  """A record as a sheet shows it.

  Attributes:
    image: uint8[height, width, 3] RGB; none where the record is corrupt.
    captions: What stands below it, a line each.
  """

  image: np.ndarray | None
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Section:
  """Faces under a heading, in rows of COLUMNS."""

  heading: str
  faces: Sequence[PictureFace]

  @property
  def height(self) -> int:
    """Pixels from its heading to the next."""
    rows = -(-len(self.faces) // COLUMNS)
    return _HEADING + rows * (_TILE + _CAPTION + _GAP)


def read_face(
  place: scan.RecordPlace, *, image_size: int, caption: str | None
) -> PictureFace:
  """Reads a record for a sheet; a corrupt one has the error as its caption.

  Args:
    place: Where it lies.
    image_size: Height and width of the set's images in pixels.
    caption: What stands above the image's file name.
  """
  identity = () if caption is None else (caption,)
  try:
    framed = storage.read_range(place.path, place.offset, place.length)
    record = tfrecord.parse(tfrecord.unframe(framed))
  except errors.DataError as error:
    return PictureFace(None, (*identity, str(error)))
  name = record.filename.rpartition("/")[2]
  image = np.empty((image_size, image_size, 3), np.uint8)
  try:
    decoding.decode_record(record.jpeg, image)
  except errors.DataError:
    return PictureFace(None, (*identity, name))
  return PictureFace(image, (*identity, name))


def draw_sheet(path: str, title: str, sections: Sequence[Section]) -> None:
  """Draws a contact sheet as a PNG file, local or in a bucket."""
  width = 2 * _MARGIN + COLUMNS * _TILE + (COLUMNS - 1) * _GAP
  height = 2 * _MARGIN + _HEADING + sum(section.height for section in sections)
  figure = Figure((width / _DPI, height / _DPI), _DPI, facecolor="white")
  FigureCanvasAgg(figure)

  def write(x: int, y: int, text: str, *, size: float, color: str, weight: str) -> None:
    figure.text(
      x / width,
      1 - y / height,
      drawable(text),
      size=size,
      color=color,
      weight=weight,
      family=_FONT,
      va="top",
      parse_math=False,
    )

  write(_MARGIN, _MARGIN, title, size=12, color="black", weight="bold")
  top = _MARGIN + _HEADING
  for section in sections:
    heading = shorten(section.heading, 110)
    write(_MARGIN, top + 14, heading, size=9.5, color=_BLUE, weight="bold")
    for number, face in enumerate(section.faces):
      row, column = divmod(number, COLUMNS)
      x = _MARGIN + column * (_TILE + _GAP)
      y = top + _HEADING + row * (_TILE + _CAPTION + _GAP)
      figure.figimage(_tile(face.image), x, height - y - _TILE)
      for line, caption in enumerate(face.captions):
        color = _GREY if face.image is not None else _RED
        text = shorten(caption, _LETTERS)
        write(x, y + _TILE + 4 + 13 * line, text, size=7, color=color, weight="normal")
    top += section.height
  _save(figure, path)


def draw_histograms(
  path: str, title: str, found: stats.Statistics, *, image_size: int
) -> None:
  """Draws images by identity and by JPEG size as a PNG file, local or in a bucket."""
  figure = Figure((12, 4.4), _DPI, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(drawable(title), size=12, weight="bold", parse_math=False)
  left, right = figure.subplots(1, 2)
  draw_bars(left, found.images, np.ones(len(found.images)), color=_BLUE)
  left.set(xlabel="images of an identity", ylabel="identities")
  sizes = np.flatnonzero(found.by_size)
  draw_bars(right, sizes, found.by_size[sizes], color=_GREEN)
  right.set(xlabel=f"bytes of a JPEG ({image_size}×{image_size} pixels)")
  right.set_ylabel("images")
  _save(figure, path)


def draw_bars(
  axes: Axes, values: np.ndarray, weights: np.ndarray, *, color: str
) -> None:
  """Draws a histogram of whole numbers with its median.

  Args:
    axes: Where.
    values: int64[n], none negative.
    weights: float64[n], how often each comes.
    color: Of the bars.
  """
  axes.grid(alpha=0.3, axis="y")
  axes.set_axisbelow(True)
  axes.yaxis.set_major_locator(_whole_numbers())
  axes.yaxis.set_major_formatter(_THOUSANDS)
  if not len(values):
    return
  edges = stats.edges(values, _BINS)
  heights, _ = np.histogram(values, edges, weights=weights)
  _scale(axes, edges)
  axes.bar(
    edges[:-1] - _shift(edges),
    heights,
    np.diff(edges),
    align="edge",
    color=color,
    edgecolor="white",
    linewidth=0.4,
  )
  middle = np.searchsorted(np.cumsum(weights[np.argsort(values)]), weights.sum() / 2)
  median = np.sort(values)[middle]
  axes.axvline(median, color=_RED, linewidth=1, linestyle="--")
  axes.set_ylim(top=1.15 * heights.max())  # leaves room for the median's number
  axes.annotate(
    f" median {median:,}",
    (median, 1.0),
    xycoords=("data", "axes fraction"),
    xytext=(2, -4),
    textcoords="offset points",
    va="top",
    color=_RED,
  )


def shorten(text: str, letters: int) -> str:
  """Returns the text, its middle left out where it is longer than `letters`."""
  if len(text) <= letters:
    return text
  kept = letters - 1
  return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def drawable(text: str) -> str:
  """Returns the text with what the font lacks as a question mark."""
  known = _letters()
  return "".join(letter if ord(letter) in known else "?" for letter in text)


@functools.cache
def _letters() -> frozenset[int]:
  """Returns the characters that the font has."""
  font = font_manager.get_font(font_manager.findfont(_FONT))
  return frozenset(font.get_charmap())


def _tile(image: np.ndarray | None) -> np.ndarray:
  """Returns uint8[_TILE, _TILE, 3]: the image, or grey with a cross for none."""
  if image is None:
    tile = np.full((_TILE, _TILE, 3), 230, np.uint8)
    for first, last in (((32, 32), (96, 96)), ((96, 32), (32, 96))):
      cv2.line(tile, first, last, (179, 50, 43), 3, cv2.LINE_AA)
    return tile
  is_larger = image.shape[0] > _TILE
  method = cv2.INTER_AREA if is_larger else cv2.INTER_CUBIC
  return cv2.resize(image, (_TILE, _TILE), interpolation=method)


def _scale(axes: Axes, edges: np.ndarray) -> None:
  """Lets the axis begin and end with the bars, which are all equally wide on it."""
  if edges[-1] - edges[-2] == edges[1] - edges[0]:
    shift = _shift(edges)
    room = max(0.02 * (edges[-1] - edges[0]), shift)
    axes.set_xlim(max(edges[0] - shift - room, -shift), edges[-1] - shift + room)
    axes.xaxis.set_major_locator(_whole_numbers())
  else:
    # 0 has no logarithm: up to the first edge above it the axis is even.
    factor = edges[-1] / edges[-2]
    even = {"linthresh": max(edges[0], 1), "linscale": 1 - 1 / factor}
    axes.set_xscale("symlog", base=factor, **even)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks(edges[:: -(-len(edges) // _TICKS)])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(_THOUSANDS)


def _shift(edges: np.ndarray) -> float:
  """Returns how far a bar lies to the left; one of a single number stands on it."""
  return 0.5 if edges[-1] - edges[-2] == 1 else 0.0


def _whole_numbers() -> ticker.Locator:
  """Returns what finds places for ticks, one if there is no room for more."""
  steps = [1, 2, 5, 10]
  return ticker.MaxNLocator(nbins=9, steps=steps, integer=True, min_n_ticks=1)


def _save(figure: Figure, path: str) -> None:
  """Writes a figure as a PNG file."""
  content = io.BytesIO()
  figure.savefig(content, format="png")
  storage.write_bytes(path, content.getvalue())
