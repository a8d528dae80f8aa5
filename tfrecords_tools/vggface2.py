"""VGGFace2's own layout: a folder an identity, and tables beside the folders.

The archives unpack to `train/n000002/0001_01.jpg` and to `bb_landmark/` with
`loose_landmark_train.csv` and `loose_bb_train.csv`; `train_list.txt` and
`identity_meta.csv` come beside them.
"""

import dataclasses
from collections.abc import Collection, Iterator

from absl import logging

from facedist import errors
from tfrecords_tools import source, tables

LIST_FILES = ("{}_list.txt",)
META_FILES = ("identity_meta.csv", "meta/identity_meta.csv")


def read(
  images: source.Source,
  *,
  landmarks: str | None,
  bounding_boxes: str | None,
  identity_meta: str | None,
  missing_row: str,
  excluded: Collection[str] = (),
  scratch_dir: str | None = None,
) -> source.Source:
  """Leaves out identities, finds where the faces lie, and the people's names.

  Args:
    images: All images; its groups are taken as those of the result are.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    identity_meta: CSV of people's names, or None.
    missing_row: See `source.locate`.
    excluded: Identities to leave out.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: A table is missing or not in its format; as its groups are
      taken, an image has no row or none is left.
  """
  located = source.locate(
    _without(images, excluded),
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    missing_row=missing_row,
    skipped=images.skipped,
    scratch_dir=scratch_dir,
  )
  names = tables.read_identity_names(identity_meta) if identity_meta else {}
  return dataclasses.replace(images, groups=located, identity_names=names)


def _without(
  images: source.Source, excluded: Collection[str]
) -> Iterator[source.Group]:
  """Passes on the identities that are not excluded and notes the others."""
  is_empty = True
  for group in images.groups:
    if group.identity in excluded:
      images.excluded.append(group.identity)
      continue
    is_empty = False
    yield group
  if excluded:
    logging.info(
      "excluded %d of %d listed identities", len(images.excluded), len(excluded)
    )
  if is_empty:
    raise errors.DataError(f"{images.folder} has no image that is not excluded.")
