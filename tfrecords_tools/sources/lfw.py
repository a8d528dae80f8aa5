"""LFW's layouts: Name/Name_0001.jpg, and a pairs.txt that lists the pairs to compare.

The images may also lie in one folder without the people's; in a folder of the one that
--input_dir names, as archives unpack (lfw-deepfunneled/lfw-deepfunneled/Name); or in
the archive as it is downloaded (lfw.tgz, lfw-funneled.tgz).

pairs.txt (View 2) starts with `10 300`: the number of folds, and of pairs of each kind
in a fold. View 1's lists start with the pairs of each kind alone and are one fold. The
pairs follow, fold by fold: `Name 1 4` for two images of one person, `Name 1 Other 2`
for two people.

People of a training set who are also in LFW are found by name. A model that was trained
on them scores too high, so they should be excluded.
"""

import dataclasses
import io
import itertools
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from facedist import errors, storage
from facedist.data import image_names
from tfrecords_tools.sources import base, listing, tables

PAIRS_FILES = ("{}/pairs.txt", "pairs.txt")
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_LEVELS = 2  # of folders in which the people's folders are looked for
_MAX_IMAGE_BYTES = 64 << 20
_MAX_DIGITS = 9


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two images as paths without endings, whether they show one person, and the fold."""

  first: str
  second: str
  same: bool
  fold: int


def open_images(input_dir: str, *, pairs: str) -> base.Source | None:
  """Returns the images that the pairs need, from a layout that only LFW has.

  Those of a compressed archive are held in memory, 120 MB for View 2 of LFW.

  Args:
    input_dir: A folder or an archive, local or in a bucket.
    pairs: A list such as pairs.txt.

  Returns:
    The images; None if they are folders of people or a plain tar file, which
    `listing.list_images` reads.

  Raises:
    errors.DataError: An archive is corrupt, or several folders have the images.
  """
  listed = read_pairs(pairs)
  if input_dir.endswith(_COMPRESSED) and not os.path.isdir(input_dir):
    needed = {image for pair in listed for image in (pair.first, pair.second)}
    return _from_compressed(input_dir, needed)
  if storage.is_bucket(input_dir) or not os.path.isdir(input_dir):
    return None
  person = listed[0].first.partition("/")[0]
  folder = _folder_of_people(input_dir, person)
  names = image_names.NameFilter()
  if os.path.isdir(os.path.join(folder, person)):
    if folder == input_dir:
      return None
    groups = listing.in_folder(folder, names)
  else:
    groups = _in_one_folder(folder, names)
  return base.Source(folder, groups, [folder], left_out=names.left_out)


def _folder_of_people(folder: str, person: str) -> str:
  """Returns the folder that a person's images lie in, at most _LEVELS below."""
  level = [folder]
  for _ in range(_LEVELS + 1):
    found = [one for one in level if _has_person(one, person)]
    if len(found) > 1:
      raise errors.DataError(
        f"--input_dir={folder} has the images of {person} in {found[0]} and in "
        f"{found[1]}; name one of them."
      )
    if found:
      return found[0]
    level = [
      entry.path
      for one in level
      for entry in sorted(os.scandir(one), key=lambda entry: entry.name)
      if entry.is_dir() and not image_names.is_system(entry.name)
    ]
  return folder


def _has_person(folder: str, person: str) -> bool:
  """Says whether a folder has a person's folder, or images called by the person."""
  return os.path.isdir(os.path.join(folder, person)) or any(
    name.rpartition("_")[0] == person and image_names.has_image_ending(name)
    for name in os.listdir(folder)
  )


def _in_one_folder(
  folder: str, names: image_names.NameFilter
) -> Iterator[base.IdentityGroup]:
  """Yields the images of a folder without the people's folders, by person."""
  found = sorted(
    f"{person}/{name}"
    for name in map(image_names.escaped, os.listdir(folder))
    if names.takes_file(name) and (person := name.rpartition("_")[0])
  )
  for person, group in itertools.groupby(found, key=base.identity_of):
    paths = list(group)
    yield base.new_group(person, paths, starts=len(person) + 1)


def _from_compressed(archive: str, needed: Collection[str]) -> base.Source:
  """Reads the images that are needed from an archive as it is downloaded."""
  content = storage.read_bytes(archive)
  if kind := storage.kind_of_text(content[: storage.HEAD_BYTES]):
    raise errors.DataError(f"{archive} is {kind}.")
  found: dict[str, bytes] = {}
  try:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as opened:
      for member in opened:
        name = member.name.rpartition("/")[2]
        path = f"{name.rpartition('_')[0]}/{name}"
        if not member.isreg() or tables.without_suffix(path) not in needed:
          continue
        if path in found:
          raise errors.DataError(f"{archive} has {name} twice; keep one.")
        if member.size > _MAX_IMAGE_BYTES:
          raise errors.DataError(f"{archive}: {member.name!r} is too large for a face.")
        stream = opened.extractfile(member)
        found[path] = stream.read() if stream is not None else b""
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise errors.DataError(
      f"{archive} is no whole compressed tar file ({error}); download it again."
    ) from error
  paths = sorted(found)
  number_of = {path: number for number, path in enumerate(paths)}
  groups = (
    base.new_group(person, members, starts=[number_of[path] for path in members])
    for person, members in (
      (person, list(group))
      for person, group in itertools.groupby(paths, key=base.identity_of)
    )
  )
  contents = [found[path] for path in paths]
  return base.Source(archive, groups, [archive], contents=contents)


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
