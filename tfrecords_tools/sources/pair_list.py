"""Lists of pairs as CSV files.

A line is `image1,image2,same` or `image1,image2,same,fold`: two paths below the
folder of the images; 1, true or same for one person, 0, false or different for two; and
the fold, a whole number. A first line may name the columns, which may then be in any
order with others between them.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools.sources import base, tables

NUM_FOLDS = 10
_COLUMNS = ("image1", "image2", "same", "fold")
_SAME = {
  **dict.fromkeys(("1", "true", "same"), True),
  **dict.fromkeys(("0", "false", "different"), False),
}
_MAX_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two images by their paths, whether they show one person, the fold and the line."""

  first: str
  second: str
  same: bool
  fold: int
  line: int


def read_set(
  input_dir: str,
  *,
  pairs: str,
  landmarks: str | None = None,
  bounding_boxes: str | None = None,
  missing_row: str = "fail",
) -> base.Source:
  """Reads the pairs of a CSV file and finds their images.

  An image's identity is its folder, where folders agree with the pairs: the images of
  each pair of one person lie in one folder, those of two people in two. Where they do
  not, images that pairs of one person connect are an identity, called by a number.

  Args:
    input_dir: The folder that the paths start from, local or in a bucket.
    pairs: The CSV file.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    missing_row: 'crop' or 'fail', see `base.locate`.

  Raises:
    errors.DataError: A line is no pair, contradicts another, or names an image that
      does not exist. In a bucket, an image is missed when it is read.
  """
  folder = input_dir.rstrip("/") or "/"
  listed = read(pairs)
  line_of: dict[str, int] = {}
  for pair in listed:
    line_of.setdefault(pair.first, pair.line)
    line_of.setdefault(pair.second, pair.line)
  if not storage.is_bucket(folder):
    base.check_folder(folder)
    for image, line in line_of.items():
      if not os.path.exists(image_names.on_disk(f"{folder}/{image}")):
        raise errors.DataError(
          f"{pairs}, line {line}: {folder}/{image} does not exist; correct the line or "
          "--input_dir."
        )
  identity_of = _by_folder(listed, origin=pairs) or _by_connection(listed, origin=pairs)
  path_of = {
    image: image if _is_whole(image, identity) else f"{identity}/{image}"
    for image, identity in identity_of.items()
  }
  groups = []
  ordered = sorted(
    path_of, key=lambda image: (f"{identity_of[image]}/", path_of[image])
  )
  for identity, members in itertools.groupby(ordered, key=identity_of.__getitem__):
    images = list(members)
    paths = [path_of[image] for image in images]
    starts = [len(path_of[image]) - len(image) for image in images]
    groups.append(base.new_group(identity, paths, starts=starts))

  def explain_broken(path: str, reason: str) -> str:
    image = next(image for image, whole in path_of.items() if whole == path)
    return (
      f"{pairs}, line {line_of[image]}: {folder}/{image}: {reason}; a verification set "
      "needs every image of its pairs: correct the line or bring the image, and start "
      "again to continue."
    )

  located = base.locate(
    groups,
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    missing_row=missing_row,
    skipped=[],
  )
  number_of = {image: number for number, image in enumerate(ordered)}
  return base.Source(
    folder,
    located,
    [folder],
    pairs=table_of(listed, number_of),
    num_folds=max(pair.fold for pair in listed) + 1,
    explain_broken=explain_broken,
  )


def table_of(pairs: Sequence[Pair], number_of: dict[str, int]) -> np.ndarray:
  """Returns int32[pairs, 4] as `base.Source.pairs` has them."""
  rows = [
    (number_of[pair.first], number_of[pair.second], pair.same, pair.fold)
    for pair in pairs
  ]
  return np.array(rows, np.int32)


def _is_whole(image: str, identity: str) -> bool:
  """Says whether an image's path is identity/image already."""
  return image.count("/") == 1 and image.startswith(f"{identity}/")


def _by_folder(pairs: Sequence[Pair], *, origin: str) -> dict[str, str] | None:
  """Returns each image's folder as its identity; None where pairs contradict it."""
  folder_of: dict[str, str] = {}
  line_of: dict[str, int] = {}
  for pair in pairs:
    folders = [image.rpartition("/")[0] for image in (pair.first, pair.second)]
    if not all(folders) or (folders[0] == folders[1]) != pair.same:
      return None
    for image, folder in zip((pair.first, pair.second), folders, strict=True):
      folder_of[image] = folder
      line_of.setdefault(folder, pair.line)
  named: dict[str, str] = {}
  for folder, line in line_of.items():
    identity = folder.replace("/", "_")  # an identity's name is one folder
    if (other := named.setdefault(identity, folder)) != folder:
      raise errors.DataError(
        f"{origin}, line {line}: the folders {other} and {folder} would both be the "
        f"identity {identity}; rename one."
      )
  return {image: folder.replace("/", "_") for image, folder in folder_of.items()}


def _by_connection(pairs: Sequence[Pair], *, origin: str) -> dict[str, str]:
  """Returns a number for each set of images that pairs of one person connect."""
  parent: dict[str, str] = {}

  def root(image: str) -> str:
    parent.setdefault(image, image)
    while parent[image] != image:
      parent[image] = parent[parent[image]]
      image = parent[image]
    return image

  for pair in pairs:
    first, second = root(pair.first), root(pair.second)
    if pair.same:
      parent[second] = first
  for pair in pairs:
    if not pair.same and root(pair.first) == root(pair.second):
      raise errors.DataError(
        f"{origin}, line {pair.line}: {pair.first} and {pair.second} are two people "
        "here, but other lines make them one; correct one of them."
      )
  number_of: dict[str, str] = {}
  for image in parent:
    number_of.setdefault(root(image), f"{len(number_of):07d}")
  return {image: number_of[root(image)] for image in parent}


def read(path: str) -> list[Pair]:
  """Reads a list of pairs, in its order.

  Folds are numbered from 0 in the order of their numbers. Without a column of folds,
  they are ten ranges of lines, as scikit-learn's KFold cuts them without shuffling.

  Raises:
    errors.DataError: A line is no pair, comes twice, or says the opposite of another.
  """
  found: list[Pair] = []
  line_of: dict[tuple[str, ...], Pair] = {}
  places: dict[str, int] = {}
  with tables.open_text(path) as stream:
    for line, row, _ in tables.rows_of(stream, path):
      cells = [cell.strip() for cell in row]
      if not places:
        places = _places(cells, path=path)
        if any(cell in _COLUMNS for cell in map(str.lower, cells)):
          continue
      pair = _pair(cells, places, line=line, path=path)
      key = tuple(sorted((pair.first, pair.second)))
      if (other := line_of.setdefault(key, pair)) is not pair:
        raise errors.DataError(
          f"{path}, line {line}: {pair.first} and {pair.second} are in line "
          f"{other.line} already; keep one."
        )
      found.append(pair)
  if not found:
    raise errors.DataError(f"{path} lists no pair.")
  if "fold" in places:
    number_of = {fold: n for n, fold in enumerate(sorted({p.fold for p in found}))}
    return [dataclasses.replace(pair, fold=number_of[pair.fold]) for pair in found]
  folds = np.array_split(np.arange(len(found)), min(NUM_FOLDS, len(found)))
  return [
    dataclasses.replace(found[place], fold=fold)
    for fold, members in enumerate(folds)
    for place in members
  ]


def _places(cells: list[str], *, path: str) -> dict[str, int]:
  """Returns the columns' places by the first line, which may be a pair itself."""
  names = [cell.lower() for cell in cells]
  if not set(names) & set(_COLUMNS):
    return {name: place for place, name in enumerate(_COLUMNS[: max(3, len(cells))])}
  missing = [name for name in _COLUMNS[:3] if name not in names]
  if missing:
    raise errors.DataError(
      f"{path} names no column {missing[0]} in its first line; name image1, image2 and "
      "same, or leave that line out."
    )
  return {name: names.index(name) for name in _COLUMNS if name in names}


def _pair(cells: list[str], places: dict[str, int], *, line: int, path: str) -> Pair:
  """Reads a line."""
  shown = f"{path}, line {line}: {tables.shortened(','.join(cells))!r}"
  if len(cells) <= max(places.values()):
    raise errors.DataError(
      f"{shown} is not image1,image2,same or with the fold behind."
    )
  first, second = (_cleaned(cells[places[name]], shown) for name in _COLUMNS[:2])
  if first == second:
    raise errors.DataError(f"{shown} pairs an image with itself.")
  same = _SAME.get(cells[places["same"]].lower())
  if same is None:
    raise errors.DataError(
      f"{shown}: {cells[places['same']]!r} must be 1, true or same for one person; 0, "
      "false or different for two."
    )
  fold = cells[places["fold"]] if "fold" in places else "0"
  if not fold.isdecimal() or len(fold) > _MAX_DIGITS:
    raise errors.DataError(f"{shown}: the fold {fold!r} must be a whole number.")
  return Pair(first, second, same, int(fold), line)


def _cleaned(image: str, shown: str) -> str:
  """Returns an image's path without empty parts and dots."""
  parts = [part for part in image.split("/") if part not in ("", ".")]
  if not parts or image.startswith("/") or ".." in parts or "\0" in image:
    raise errors.DataError(
      f"{shown}: {image!r} must be the path of an image below --input_dir."
    )
  return "/".join(parts)
