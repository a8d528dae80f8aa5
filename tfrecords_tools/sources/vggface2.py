"""VGGFace2's layout: a folder for each identity, and tables beside the folders.

The archives unpack to `train/n000002/0001_01.jpg` and to `bb_landmark/` with
`loose_landmark_train.csv` and `loose_bb_train.csv`; `train_list.txt` and
`identity_meta.csv` come beside them.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator

from absl import logging

from facedist import errors
from tfrecords_tools.sources import base, tables

LIST_FILES = ("{}_list.txt",)
META_FILES = ("identity_meta.csv", "meta/identity_meta.csv")


def read(
  images: base.Source,
  *,
  landmarks: str | None,
  bounding_boxes: str | None,
  identity_meta: str | None,
  missing_row: str,
  wanted: Collection[str] | None = None,
  excluded: Collection[str] = (),
  min_images: int = 1,
  scratch_dir: str | None = None,
) -> base.Source:
  """Leaves out identities, and looks up faces and the people's names.

  Args:
    images: All images; its groups are iterated when the result's groups are.
    landmarks: CSV of five landmarks an image, or None.
    bounding_boxes: CSV of a face box an image, or None.
    identity_meta: CSV of people's names, or None.
    missing_row: See `base.locate`.
    wanted: Identities to take; None takes all.
    excluded: Identities to leave out.
    min_images: Images an identity needs, without those that `missing_row` leaves out.
    scratch_dir: See `external_sort.sorted_by_key`.

  Raises:
    errors.DataError: A table is missing or malformed; or, while the groups are
      iterated, an image has no row or no image is left.
  """
  located = base.locate(
    _listed(images, wanted=wanted, excluded=excluded),
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    missing_row=missing_row,
    skipped=images.skipped,
    scratch_dir=scratch_dir,
  )
  if min_images > 1:
    located = _large_enough(images, located, minimum=min_images)
  names = tables.read_identity_names(identity_meta) if identity_meta else {}
  return dataclasses.replace(images, groups=located, identity_names=names)


def _listed(
  images: base.Source, *, wanted: Collection[str] | None, excluded: Collection[str]
) -> Iterator[base.IdentityGroup]:
  """Yields the identities that the lists keep, and records the others."""
  is_empty, rule = True, "--identities"
  if wanted is not None:
    images.left_out[rule] = 0
  for group in images.groups:
    if wanted is not None and group.identity not in wanted:
      images.left_out[rule] += len(group.paths)
      continue
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
    raise errors.DataError(
      f"{images.folder} has no image that --identities and --exclude_identities leave "
      "in; check the lists."
    )


def _large_enough(
  images: base.Source, groups: Iterable[base.IdentityGroup], *, minimum: int
) -> Iterator[base.IdentityGroup]:
  """Yields the identities with enough images, and counts the others' images."""
  is_empty, rule = True, f"--min_images_per_identity={minimum}"
  images.left_out[rule] = 0
  for group in groups:
    if len(group.paths) < minimum:
      images.left_out[rule] += len(group.paths)
      continue
    is_empty = False
    yield group
  if is_empty:
    raise errors.DataError(
      f"{rule} leaves no identity of {images.folder}; take a smaller one."
    )
