"""LFW's layout: Name/Name_0001.jpg, and a pairs.txt that lists the pairs to compare.

pairs.txt (View 2) starts with `10 300`: the number of folds, and of pairs of each kind
in a fold. View 1's lists start with the pairs of each kind alone and are one fold. The
pairs follow, fold by fold: `Name 1 4` for two images of one person, `Name 1 Other 2`
for two people.

People of a training set who are also in LFW are found by name. A model that was trained
on them scores too high, so they should be excluded.
"""

import dataclasses
import unicodedata
from collections.abc import Collection, Mapping

import numpy as np

from facedist import errors
from facedist.data import image_names
from tfrecords_tools.sources import base, tables

PAIRS_FILES = ("{}/pairs.txt", "pairs.txt")
_MAX_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two images as paths without endings, whether they show one person, and the fold."""

  first: str
  second: str
  same: bool
  fold: int


def read(
  images: base.Source,
  *,
  pairs: str,
  landmarks: str | None,
  bounding_boxes: str | None,
  missing_row: str,
) -> base.Source:
  """Finds the images that the pairs need, each once, and their faces.

  Args:
    images: All images.
    pairs: A list such as pairs.txt.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    missing_row: 'crop' or 'fail', see `base.locate`.

  Raises:
    errors.DataError: An image is missing, or a file is not in its format.
  """
  listed = read_pairs(pairs)
  needed = {image for pair in listed for image in (pair.first, pair.second)}
  groups = [kept for group in images.groups if (kept := _needed(group, needed))]
  stems = (tables.without_suffix(path) for group in groups for path in group.paths)
  row_of = {stem: row for row, stem in enumerate(stems)}
  if missing := sorted(needed - row_of.keys()):
    raise errors.DataError(
      f"{images.folder}/{missing[0]}.jpg does not exist, but {pairs} lists it; "
      "bring the image or take it out of the list."
    )
  rows = [
    (row_of[pair.first], row_of[pair.second], pair.same, pair.fold) for pair in listed
  ]
  located = base.locate(
    groups,
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    missing_row=missing_row,
    skipped=images.skipped,
  )

  def explain_broken(path: str, reason: str) -> str:
    return (
      f"{images.folder}: {path}: {reason}; a verification set needs every image of its "
      "pairs: copy the image again, and start again to continue."
    )

  return dataclasses.replace(
    images,
    groups=located,
    explain_broken=explain_broken,
    pairs=np.array(rows, np.int32),
    num_folds=max(pair.fold for pair in listed) + 1,
  )


def _needed(
  group: base.IdentityGroup, stems: Collection[str]
) -> base.IdentityGroup | None:
  """Returns a person's images that are needed; None if none is.

  Of two files with one stem, the one whose ending is first in image_names.ENDINGS is
  taken.
  """
  place_of: dict[str, int] = {}
  for suffix in reversed(image_names.ENDINGS):
    for place, path in enumerate(group.paths):
      stem = path[: -len(suffix)]
      if path.lower().endswith(suffix) and stem in stems:
        place_of[stem] = place
  return group.take(np.array(sorted(place_of.values()))) if place_of else None


def read_pairs(path: str) -> list[Pair]:
  """Reads a list of pairs, in its order.

  Raises:
    errors.DataError: A line is no pair, or there are not as many as the header says.
  """
  lines = [line.split() for line in tables.read_lines(path)]
  header = lines[0] if lines else []
  if len(header) not in (1, 2) or not all(map(_is_count, header)):
    raise errors.DataError(
      f"{path} must start with folds and pairs, such as `10 300`, or with pairs alone."
    )
  num_folds = int(header[0]) if len(header) == 2 else 1
  fold_pairs = 2 * int(header[-1])
  if not len(lines) - 1 == num_folds * fold_pairs > 0:
    raise errors.DataError(
      f"{path} has {len(lines) - 1} pairs; its first line, {' '.join(header)!r}, "
      f"asks for {num_folds} x {fold_pairs}."
    )
  pairs = [
    _pair(words, number // fold_pairs, path=path)
    for number, words in enumerate(lines[1:])
  ]
  same = np.array([pair.same for pair in pairs]).reshape(num_folds, fold_pairs)
  if (same.sum(axis=1) != fold_pairs // 2).any():
    raise errors.DataError(
      f"{path} does not have {fold_pairs // 2} pairs of one person in each fold."
    )
  return pairs


def _pair(words: list[str], fold: int, *, path: str) -> Pair:
  """Reads a line of three or four words."""
  same = len(words) == 3
  names, files = (words[:1] * 2, words[1:]) if same else (words[::2], words[1::2])
  images = [
    _image(name, file) if _is_folder_name(name) else None
    for name, file in zip(names, files, strict=False)
  ]
  if len(words) not in (3, 4) or None in images:
    raise errors.DataError(
      f"{path}: {' '.join(words)[:100]!r} is neither `name number number` nor "
      "`name number name number`, with a number or a file of that person's folder for "
      "each image."
    )
  if not same and names[0] == names[1]:
    raise errors.DataError(
      f"{path}: {' '.join(words)[:100]!r} is a line of four words, which is for two "
      f"people; write `{names[0]} {files[0]} {files[1]}` for two images of one."
    )
  first, second = map(str, images)
  return Pair(first, second, same, fold)


def _image(name: str, word: str) -> str | None:
  """Returns the path without ending that a word of a line names; None for no name.

  Args:
    name: The person, whose folder the image lies in.
    word: A number, such as 3; or a file name, such as Cher_0003.jpg, Cher_0003 or
      Cher/Cher_0003.jpg.
  """
  if _is_count(word):
    return f"{name}/{name}_{int(word):04d}"
  folder, _, file = word.rpartition("/")
  is_file = image_names.has_image_ending(file) or file.startswith(f"{name}_")
  if folder not in ("", name) or not is_file or not _is_folder_name(file):
    return None
  return f"{name}/{tables.without_suffix(file)}"


def _is_count(word: str) -> bool:
  """Says whether a word is a number of images or pairs."""
  return word.isdecimal() and len(word) <= _MAX_DIGITS


def _is_folder_name(word: str) -> bool:
  """Says whether a word is the name of a folder or file, not a path."""
  return word not in (".", "..") and "/" not in word and "\0" not in word


def read_people(path: str) -> set[str]:
  """Returns the names in LFW's pairs.txt, people.txt or a list of names."""
  words = (word for line in tables.read_lines(path) for word in line.split())
  return {word for word in words if not word.isdecimal()}


def overlapping(
  identity_names: Mapping[str, str], people: Collection[str]
) -> tuple[str, ...]:
  """Returns the identities, sorted, whose name is also in `people`."""
  normalised = {normalise(name) for name in people}
  return tuple(
    sorted(
      identity
      for identity, name in identity_names.items()
      if normalise(name) in normalised
    )
  )


def normalise(name: str) -> str:
  """Removes differences of spelling: case, accents, dots, spaces and underscores."""
  decomposed = unicodedata.normalize("NFKD", name).casefold()
  return "".join(letter for letter in decomposed if letter.isalnum())
