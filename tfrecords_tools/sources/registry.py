"""The data sets that can be built, by name: each is read and planned."""

import dataclasses
import os

from absl import logging

from facedist import errors, storage
from tfrecords_tools.builder import options, plan
from tfrecords_tools.sources import (
  base,
  drawn_pairs,
  insightface_bin,
  lfw,
  listing,
  mnist,
  mxnet_rec,
  pair_list,
  tables,
  vggface2,
  webdataset,
)

_LISTS = (
  *("identities", "exclude_identities", "min_images_per_identity"),
  *("list_labels", "make_pairs"),
)
_TABLES = (
  *("input_list", "list_labels", "image_list", "landmarks", "bounding_boxes"),
  *("missing_row", "identity_meta", "pairs"),
)


def split_into_sets(settings: options.BuildConfig) -> list[options.BuildConfig]:
  """Returns the flags of each set that is to be built.

  Each of several .bin files, or of a folder of them, is a set, in a folder of
  --output_dir with the file's name without its ending. Everything else is one set.

  Raises:
    errors.UsageError: Two files would have the same folder.
    errors.DataError: A file does not exist, or a folder has none.
  """
  if settings.dataset != "bin" or settings.input_dir is None or settings.input_list:
    return [settings]
  files = insightface_bin.files_of(settings.input_dir)
  if files == [settings.input_dir]:
    return [settings]
  file_of: dict[str, str] = {}
  for path in files:
    stem = os.path.splitext(os.path.basename(path))[0]
    if stem in file_of:
      raise errors.UsageError(
        f"--input_dir: {file_of[stem]} and {path} would both be built into "
        f"{storage.join(settings.output_dir, stem)}; rename one or build it alone."
      )
    file_of[stem] = path
  return [
    dataclasses.replace(
      settings, input_dir=path, output_dir=storage.join(settings.output_dir, stem)
    )
    for stem, path in file_of.items()
  ]


def read_vggface2(
  settings: options.BuildConfig,
) -> tuple[base.Source, plan.Plan]:
  """Reads and plans a training set in VGGFace2's layout."""
  image_list = None
  if settings.input_list is None:
    image_list = _find(settings, "image_list", names=vggface2.LIST_FILES)
  elif settings.image_list:
    raise errors.UsageError("--input_list and --image_list exclude each other.")
  landmarks = _find(settings, "landmarks", names=base.LANDMARK_FILES)
  boxes = _find(settings, "bounding_boxes", names=base.BOX_FILES)
  _check_labels(settings, landmarks=landmarks, bounding_boxes=boxes)
  return _plan_labelled(
    settings,
    _open(settings, image_list),
    landmarks=landmarks,
    bounding_boxes=boxes,
    identity_meta=_find(settings, "identity_meta", names=vggface2.META_FILES),
  )


def read_rec(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans one of InsightFace's training sets.

  Raises:
    errors.UsageError: There is no --input_dir, or a flag does not go with it.
  """
  _refuse(settings, _TABLES, "is not for --dataset=rec, whose faces are aligned")
  if settings.input_dir is None:
    raise errors.UsageError("--dataset=rec needs --input_dir=train.rec or its folder.")
  images = mxnet_rec.read(
    settings.input_dir,
    image_size=settings.image_size,
    scratch_dir=settings.scratch_dir,
  )
  return _plan_labelled(settings, images)


def read_webdataset(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans a set in WebDataset's tar files.

  Raises:
    errors.UsageError: There is no --input_dir, or a flag does not go with it.
  """
  reason = "is not for --dataset=webdataset, whose faces must be aligned"
  _refuse(settings, _TABLES, reason)
  if settings.input_dir is None:
    raise errors.UsageError(
      "--dataset=webdataset needs --input_dir, such as train-{000000..000099}.tar."
    )
  images = webdataset.read(settings.input_dir, scratch_dir=settings.scratch_dir)
  return _plan_labelled(settings, images)


def _plan_labelled(
  settings: options.BuildConfig,
  images: base.Source,
  *,
  landmarks: str | None = None,
  bounding_boxes: str | None = None,
  identity_meta: str | None = None,
) -> tuple[base.Source, plan.Plan]:
  """Chooses identities, looks up faces and names, and plans the set.

  It is a training set, or with --make_pairs a verification set.
  """
  if settings.make_pairs is not None:
    _refuse(settings, ("val_fraction", "max_images_per_identity"), "is for training")
    if settings.make_pairs % drawn_pairs.STEP:
      fitting = max(1, settings.make_pairs // drawn_pairs.STEP) * drawn_pairs.STEP
      raise errors.UsageError(
        f"--make_pairs={settings.make_pairs} is no multiple of {drawn_pairs.STEP}, as "
        f"ten folds with two kinds of pairs need; try --make_pairs={fitting}."
      )
  wanted, excluded = settings.identities, settings.exclude_identities
  images = vggface2.read(
    images,
    landmarks=landmarks,
    bounding_boxes=bounding_boxes,
    identity_meta=identity_meta,
    missing_row=settings.missing_row or "skip",
    wanted=frozenset(tables.read_lines(wanted)) if wanted else None,
    excluded=frozenset(tables.read_lines(excluded)) if excluded else frozenset(),
    min_images=settings.min_images_per_identity,
    scratch_dir=settings.scratch_dir,
  )
  if settings.make_pairs is not None:
    images = drawn_pairs.draw_set(
      images, num_pairs=settings.make_pairs, seed=settings.seed
    )
    return images, _plan_verification_set(settings, images)
  return images, plan.plan_training_set(
    images.groups,
    seed=settings.seed,
    num_shards=settings.num_shards,
    val_fraction=settings.val_fraction,
    max_images=settings.max_images_per_identity,
    scratch_dir=settings.scratch_dir,
    counts_only=settings.finalize,
  )


def read_lfw(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans a verification set in LFW's layout.

  Raises:
    errors.UsageError: There is no list of pairs, --missing_row=skip, or a flag that
      chooses identities.
  """
  _refuse_choice(settings)
  pairs = _find(settings, "pairs", names=lfw.PAIRS_FILES)
  if pairs is None:
    raise errors.UsageError(
      f"--pairs is required: there is no pairs.txt beside {settings.input_dir}."
    )
  images = None
  if settings.input_dir is not None and settings.input_list is None:
    images = lfw.open_images(settings.input_dir, pairs=pairs)
  images = lfw.read(
    images or _open(settings),
    pairs=pairs,
    landmarks=_find(settings, "landmarks", names=base.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", names=base.BOX_FILES),
    missing_row=settings.missing_row or "fail",
  )
  return images, _plan_verification_set(settings, images)


def read_pairs(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans a verification set of the pairs in a CSV file.

  Raises:
    errors.UsageError: There is no folder or no list of pairs, --missing_row=skip, or a
      flag that chooses identities.
  """
  _refuse_choice(settings)
  _refuse(settings, ("input_list",), "is not for --dataset=pairs")
  if settings.input_dir is None or settings.pairs is None:
    raise errors.UsageError("--dataset=pairs needs --input_dir and --pairs=FILE.csv.")
  images = pair_list.read_set(
    settings.input_dir,
    pairs=settings.pairs,
    landmarks=_find(settings, "landmarks", names=base.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", names=base.BOX_FILES),
    missing_row=settings.missing_row or "fail",
  )
  return images, _plan_verification_set(settings, images)


def read_bin(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans one of InsightFace's verification sets.

  Raises:
    errors.UsageError: --input_dir names no file, or a flag chooses identities.
  """
  _refuse_choice(settings)
  if settings.input_dir is None or settings.input_list is not None:
    raise errors.UsageError("--dataset=bin needs --input_dir=FILE.bin and no list.")
  images = insightface_bin.read(settings.input_dir)
  return images, _plan_verification_set(settings, images)


def _plan_verification_set(
  settings: options.BuildConfig, images: base.Source
) -> plan.Plan:
  """Plans a verification set by the flags."""
  return plan.plan_verification_set(
    images.groups,
    num_shards=settings.num_shards,
    scratch_dir=settings.scratch_dir,
    counts_only=settings.finalize,
  )


def read_npz(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans the digits of an .npz file; its test images are the split val.

  Raises:
    errors.UsageError: --input_dir names no file, or a flag does not go with it.
  """
  _refuse(settings, _LISTS, "is not for --dataset=npz")
  _refuse(settings, ("val_fraction",), "is not for --dataset=npz, whose x_test is val")
  if settings.input_dir is None or settings.input_list is not None:
    raise errors.UsageError("--dataset=npz needs --input_dir=FILE.npz and no list.")
  images = mnist.read_npz(settings.input_dir)
  return images, _plan_digits(settings, images)


def read_digits(settings: options.BuildConfig) -> tuple[base.Source, plan.Plan]:
  """Reads and plans scikit-learn's digits.

  Raises:
    errors.UsageError: There is an input, or a flag does not go with it.
  """
  reason = "is not for --dataset=digits, which are scikit-learn's own"
  _refuse(settings, (*_LISTS, "input_dir", "input_list"), reason)
  images = mnist.read_bundled()
  return images, _plan_digits(settings, images)


def _plan_digits(settings: options.BuildConfig, images: base.Source) -> plan.Plan:
  """Plans digits by the flags."""
  return plan.plan_training_set(
    images.groups,
    seed=settings.seed,
    num_shards=settings.num_shards,
    val_fraction=settings.val_fraction,
    max_images=settings.max_images_per_identity,
    is_held_out=images.is_held_out,
    scratch_dir=settings.scratch_dir,
    counts_only=settings.finalize,
  )


READERS = {
  "vggface2": read_vggface2,
  "lfw": read_lfw,
  "pairs": read_pairs,
  "bin": read_bin,
  "rec": read_rec,
  "webdataset": read_webdataset,
  "npz": read_npz,
  "digits": read_digits,
}


def _check_labels(settings: options.BuildConfig, **found: str | None) -> None:
  """Raises UsageError for --list_labels without a list, or with a table of faces."""
  if not settings.list_labels:
    return
  if settings.input_list is None:
    raise errors.UsageError("--list_labels needs the list itself; say --input_list.")
  for flag, path in found.items():
    if path is not None:
      raise errors.UsageError(
        f"--list_labels does not go with --{flag}={path}, whose rows are found by the "
        f"images' folders; say --{flag}={tables.NONE}, or build without --list_labels."
      )


def _refuse_choice(settings: options.BuildConfig) -> None:
  """Raises UsageError for flags that would leave images out of the pairs."""
  flags = (*_LISTS, "max_images_per_identity")
  _refuse(settings, flags, f"would break the pairs of --dataset={settings.dataset}")
  if settings.missing_row == "skip":
    raise errors.UsageError(
      f"--missing_row=skip would break the pairs of --dataset={settings.dataset}; say "
      "crop or fail."
    )


def _refuse(settings: options.BuildConfig, flags: tuple[str, ...], reason: str) -> None:
  """Raises UsageError for flags that do not go with --dataset."""
  for flag in flags:
    value = getattr(settings, flag)
    if value != getattr(options.BuildConfig, flag):
      raise errors.UsageError(f"--{flag}={value} {reason}; leave it out.")


def _open(settings: options.BuildConfig, image_list: str | None = None) -> base.Source:
  """Returns the images that the flags name, before any table is read."""
  return listing.list_images(
    settings.input_dir,
    input_list=settings.input_list,
    list_labels=settings.list_labels,
    chosen=image_list,
    scratch_dir=settings.scratch_dir,
  )


def _find(
  settings: options.BuildConfig, flag: str, *, names: tuple[str, ...]
) -> str | None:
  """Returns the table that a flag names or that lies beside the images."""
  given = getattr(settings, flag)
  path = tables.find_beside(settings.input_dir, given, flag=flag, names=names)
  logging.info("--%s=%s", flag, path or tables.NONE)
  return path
