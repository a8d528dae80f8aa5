"""The source images, as columns: what a data set's reader hands to the planner."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from facedist import errors
from tfrecords_tools import faces, tables

MISSING_ROW = ("skip", "crop", "fail")
"""What to do with an image that the landmarks, or boxes, have no row for."""
LANDMARK_FILES = ("loose_landmark_{}.csv", "bb_landmark/loose_landmark_{}.csv")
BOX_FILES = ("loose_bb_{}.csv", "bb_landmark/loose_bb_{}.csv")


@dataclasses.dataclass(frozen=True)
class Source:
  """Images and where the faces lie in them.

  Attributes:
    folder: The folder that `paths` start from.
    paths: identity/image, sorted.
    places: uint8[images] of `faces.Place`.
    geometry: float32[images, 10]; landmarks or box, by `places`.
    skipped: `path` and `reason` of each image that the tables leave out.
    excluded: Identities that were left out on demand.
    identity_names: Names of people by folder name, where known.
    pairs: int32[pairs, 4] of first, second (rows of `paths`), same, fold; or none.
    num_folds: Folds of `pairs`.
  """

  folder: str
  paths: list[str]
  places: np.ndarray
  geometry: np.ndarray
  skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
  excluded: tuple[str, ...] = ()
  identity_names: dict[str, str] = dataclasses.field(default_factory=dict)
  pairs: np.ndarray | None = None
  num_folds: int = 0


def identity_of(path: str) -> str:
  """Returns the identity's folder of an image's path."""
  return path.partition("/")[0]


def locate(
  folder: str,
  paths: Sequence[str],
  *,
  landmarks: str | None,
  bounding_boxes: str | None,
  missing_row: str,
) -> Source:
  """Looks each image up in the landmarks and in the face boxes.

  The landmarks, where there are any, decide; without them the boxes do; with neither
  every face is cut from the centre.

  Args:
    folder: The folder that `paths` start from.
    paths: identity/image, sorted.
    landmarks: CSV of five landmarks an image, or none.
    bounding_boxes: CSV of a face box an image, or none.
    missing_row: One of MISSING_ROW, for an image without a row in the table that
      decides; 'crop' falls back to its box, then to the centre.

  Raises:
    errors.DataError: No image has a row, or one has none and `missing_row` is 'fail'.
  """
  places = np.full(len(paths), faces.Place.UNKNOWN, np.uint8)
  geometry = np.zeros((len(paths), tables.LANDMARK_COLUMNS), np.float32)
  stems = [tables.without_suffix(path) for path in paths]
  deciding = landmarks or bounding_boxes
  if bounding_boxes and (missing_row == "crop" or not landmarks):
    table = tables.read_table(bounding_boxes, tables.BOX_COLUMNS)
    _fill(places, geometry, stems=stems, table=table, place=faces.Place.BOX)
  if landmarks:
    table = tables.read_table(landmarks, tables.LANDMARK_COLUMNS)
    _fill(places, geometry, stems=stems, table=table, place=faces.Place.LANDMARKS)
  found = Source(folder, list(paths), places, geometry)
  if deciding is None:
    return found
  return _without_missing(found, deciding, missing_row=missing_row)


def _fill(
  places: np.ndarray,
  geometry: np.ndarray,
  *,
  stems: Sequence[str],
  table: tables.Table,
  place: faces.Place,
) -> None:
  """Writes a table's rows over what is known of the images that it has."""
  rows = np.array([table.rows.get(stem, -1) for stem in stems], np.int64)
  has_row = rows >= 0
  if not has_row.any():
    raise errors.DataError(
      f"{table.origin} has no row for any of the {len(stems)} images, such as "
      f"{stems[0]}; give the file that belongs to this folder, or say none."
    )
  places[has_row] = place
  geometry[has_row] = 0
  geometry[has_row, : table.values.shape[1]] = table.values[rows[has_row]]


def _without_missing(found: Source, deciding: str, *, missing_row: str) -> Source:
  """Applies the rule for images that no table has a row for."""
  missing = np.flatnonzero(found.places == faces.Place.UNKNOWN)
  if not len(missing) or missing_row == "crop":
    return found
  if missing_row == "fail":
    raise errors.DataError(
      f"{deciding} has no row for {len(missing)} images, such as "
      f"{found.paths[missing[0]]}; add the rows, or let --missing_row=skip leave "
      "such images out or --missing_row=crop crop them."
    )
  keep = np.flatnonzero(found.places != faces.Place.UNKNOWN)
  reason = f"no row in {deciding.rpartition('/')[2]}"
  return dataclasses.replace(
    found,
    paths=[found.paths[row] for row in keep],
    places=found.places[keep],
    geometry=found.geometry[keep],
    skipped=[{"path": found.paths[row], "reason": reason} for row in missing],
  )
