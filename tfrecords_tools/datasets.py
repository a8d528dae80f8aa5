"""The data sets that can be built, by name: reading and planning each."""

from absl import logging

from facedist import errors
from tfrecords_tools import lfw, listing, options, plan, source, tables, vggface2


def read_vggface2(
  settings: options.BuildConfig,
) -> tuple[source.Source, plan.Plan]:
  """Reads and plans a training set in VGGFace2's layout."""
  excluded = settings.exclude_identities
  images = vggface2.read(
    _open(
      settings, image_list=_find(settings, "image_list", names=vggface2.LIST_FILES)
    ),
    landmarks=_find(settings, "landmarks", names=source.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", names=source.BOX_FILES),
    identity_meta=_find(settings, "identity_meta", names=vggface2.META_FILES),
    missing_row=settings.missing_row or "skip",
    excluded=frozenset(tables.read_lines(excluded)) if excluded else frozenset(),
    scratch_dir=settings.scratch_dir,
  )
  return images, plan.plan_training_set(
    images.groups,
    seed=settings.seed,
    num_shards=settings.num_shards,
    val_fraction=settings.val_fraction,
    scratch_dir=settings.scratch_dir,
    counts_only=settings.finalize,
  )


def read_lfw(settings: options.BuildConfig) -> tuple[source.Source, plan.Plan]:
  """Reads and plans a verification set in LFW's layout.

  Raises:
    errors.UsageError: There is no list of pairs, or --missing_row=skip.
  """
  if settings.missing_row == "skip":
    raise errors.UsageError(
      "--missing_row=skip would break the pairs of --dataset=lfw; say crop or fail."
    )
  pairs = _find(settings, "pairs", names=lfw.PAIRS_FILES)
  if pairs is None:
    raise errors.UsageError(
      f"--pairs is required: there is no pairs.txt beside {settings.input_dir}."
    )
  images = lfw.read(
    _open(settings),
    pairs=pairs,
    landmarks=_find(settings, "landmarks", names=source.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", names=source.BOX_FILES),
    missing_row=settings.missing_row or "fail",
  )
  return images, plan.plan_verification_set(
    images.groups,
    num_shards=settings.num_shards,
    scratch_dir=settings.scratch_dir,
    counts_only=settings.finalize,
  )


READERS = {"vggface2": read_vggface2, "lfw": read_lfw}


def _open(
  settings: options.BuildConfig, image_list: str | None = None
) -> source.Source:
  """Returns the images of --input_dir before any table is read."""
  folder = settings.input_dir
  groups = (
    listing.in_image_list(folder, image_list, scratch_dir=settings.scratch_dir)
    if image_list
    else listing.in_folder(folder)
  )
  return source.Source(folder, groups, [folder])


def _find(
  settings: options.BuildConfig, flag: str, *, names: tuple[str, ...]
) -> str | None:
  """Returns the table that a flag names or that lies beside the images."""
  given = getattr(settings, flag)
  path = tables.find_beside(settings.input_dir, given, flag=flag, names=names)
  logging.info("--%s=%s", flag, path or tables.NONE)
  return path
