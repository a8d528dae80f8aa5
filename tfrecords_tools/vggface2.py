"""VGGFace2's own layout: a folder an identity, and tables beside the folders.

The archives unpack to `train/n000002/0001_01.jpg` and to `bb_landmark/` with
`loose_landmark_train.csv` and `loose_bb_train.csv`; `train_list.txt` and
`identity_meta.csv` come beside them.
"""

import dataclasses
import itertools
import os
from collections.abc import Collection, Sequence

from absl import logging

from facedist import errors
from tfrecords_tools import source, tables

LIST_FILES = ("{}_list.txt",)
META_FILES = ("identity_meta.csv", "meta/identity_meta.csv")


def read(
  input_dir: str,
  *,
  image_list: str | None,
  landmarks: str | None,
  bounding_boxes: str | None,
  identity_meta: str | None,
  missing_row: str,
  excluded: Collection[str] = (),
) -> source.Source:
  """Finds the images, where their faces lie, and the people's names.

  Args:
    input_dir: Folder of the identity folders.
    image_list: identity/image a line; None takes every image of the folder.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    identity_meta: CSV of people's names, or None.
    missing_row: See `source.locate`.
    excluded: Identities to leave out.

  Raises:
    errors.DataError: A file is missing or not in its format, or no image is left.
  """
  paths = list_images(input_dir, image_list)
  present = {source.identity_of(path) for path in paths}
  paths = [path for path in paths if source.identity_of(path) not in excluded]
  left_out = tuple(sorted(present.intersection(excluded)))
  if excluded:
    logging.info("excluded %d of %d listed identities", len(left_out), len(excluded))
  if not paths:
    raise errors.DataError(f"{input_dir} has no image that is not excluded.")
  located = source.locate(
    input_dir,
    paths,
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    missing_row=missing_row,
  )
  names = tables.read_identity_names(identity_meta) if identity_meta else {}
  kept = sorted({source.identity_of(path) for path in located.paths})
  known = {identity: names[identity] for identity in kept if identity in names}
  return dataclasses.replace(located, identity_names=known, excluded=left_out)


def list_images(input_dir: str, image_list: str | None) -> list[str]:
  """Returns identity/image of every image, sorted.

  Raises:
    errors.DataError: The folder or the list is missing, empty or malformed.
  """
  if not os.path.isdir(input_dir):
    raise errors.DataError(f"--input_dir={input_dir} is no folder; check the path.")
  if image_list:
    return _checked(tables.read_lines(image_list), input_dir, image_list=image_list)
  paths = []
  with os.scandir(input_dir) as entries:
    identities = sorted(entry.name for entry in entries if entry.is_dir())
  for identity in identities:
    with os.scandir(os.path.join(input_dir, identity)) as entries:
      names = [entry.name for entry in entries if tables.is_image_name(entry.name)]
    paths += [f"{identity}/{name}" for name in names]
  if not paths:
    raise errors.DataError(
      f"--input_dir={input_dir} has no images in folders; it must hold a folder for "
      "each identity, such as n000002/0001_01.jpg."
    )
  return sorted(paths)


def _checked(lines: Sequence[str], input_dir: str, *, image_list: str) -> list[str]:
  """Returns a list's lines sorted; DataError if they are not what `input_dir` holds."""
  for line in lines:
    parts = line.split("/")
    if len(parts) != 2 or not all(parts) or ".." in parts:
      raise errors.DataError(f"{image_list}: {line!r} is not identity/image.")
  paths = sorted(lines)
  for path, following in itertools.pairwise(paths):
    if path == following:
      raise errors.DataError(f"{image_list} lists {path} twice; keep one.")
  for identity in sorted({source.identity_of(path) for path in paths}):
    if not os.path.isdir(os.path.join(input_dir, identity)):
      raise errors.DataError(
        f"{image_list} lists images of {identity}, which is not in {input_dir}; say "
        f"--image_list={tables.NONE} to take what the folder holds."
      )
  if not paths:
    raise errors.DataError(f"{image_list} lists no image.")
  return paths
