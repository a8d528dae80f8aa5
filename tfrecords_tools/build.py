"""Turns face images into TFRecord shards with an index and a manifest.

VGGFace2 in its own layout; the CSVs and lists are found beside the folder:

  python -m tfrecords_tools.build --dataset=vggface2 \\
    --input_dir=/data/vggface2/train --output_dir=/data/shards/vggface2 \\
    --val_fraction=0.02 --lfw_names=/data/lfw/pairs.txt

A verification set of exactly the pairs that LFW's list names:

  python -m tfrecords_tools.build --dataset=lfw \\
    --input_dir=/data/lfw/aligned_112 --pairs=/data/lfw/pairs.txt \\
    --output_dir=/data/shards/lfw

A build that was stopped, however rudely, goes on when it is started again. The same
input and seed give the same bytes, whatever the number of processes. --output_dir may
be in a bucket (gs://...).
"""

import time

from absl import logging

from facedist import config, errors, progress, storage
from facedist.data import manifest
from tfrecords_tools import (
  assembly,
  execution,
  faces,
  ledger,
  lfw,
  listing,
  options,
  overlap,
  plan,
  source,
  tables,
  vggface2,
)


def main(settings: options.BuildConfig) -> None:
  """Builds one folder of shards, or goes on with it."""
  if storage.is_bucket(settings.input_dir):
    raise errors.UsageError(
      f"--input_dir={settings.input_dir}: images are read from a local folder; copy "
      "them there first. --output_dir may be in a bucket."
    )
  images, shards = READERS[settings.dataset](settings)
  logging.info(
    "%s images of %s identities for %d shards; the tables leave out %d images",
    f"{shards.num_images:,}",
    f"{len(shards.identities):,}",
    len(shards.shards),
    len(images.skipped),
  )
  overlapping = _report_overlap(
    settings, shards.identities, names=images.identity_names
  )
  described = assembly.describe(settings, images, shards)
  with ledger.only_builder(settings.output_dir):
    book = ledger.Ledger(settings.output_dir, described)
    book.open()
    finished = book.finished([shard.name for shard in shards.shards])
    manifest_path = storage.join(settings.output_dir, manifest.MANIFEST_NAME)
    complete = len(finished) == len(shards.shards) and storage.exists(manifest_path)
    if complete and not settings.only_shards:
      logging.info("%s is finished; nothing to do", settings.output_dir)
      return
    started = time.monotonic()
    finished = execution.write_shards(
      images,
      shards,
      book=book,
      finished=finished,
      output_dir=settings.output_dir,
      face=faces.FaceSettings(settings.image_size, settings.quality, settings.margin),
      only=parse_numbers(settings.only_shards),
      max_bad=settings.max_bad,
      num_processes=settings.num_processes,
    )
    if len(finished) < len(shards.shards):
      missing = len(shards.shards) - len(finished)
      logging.info("%d shards remain; build them without --only_shards", missing)
      return
    made = assembly.assemble(
      images, shards, finished=finished, described=described, overlapping=overlapping
    )
    assembly.save(made, settings.output_dir, pairs=images.pairs)
  logging.info(
    "wrote %s in %s: %s",
    settings.output_dir,
    progress.duration(time.monotonic() - started),
    ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items()),
  )


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
    images.groups, num_shards=settings.num_shards, scratch_dir=settings.scratch_dir
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


def parse_numbers(text: str | None) -> frozenset[int] | None:
  """Returns the numbers in `3,17`; None for no text.

  Raises:
    errors.UsageError: It is not a list of numbers.
  """
  if not text:
    return None
  words = text.split(",")
  if not all(word.strip().isdecimal() for word in words):
    raise errors.UsageError(
      f"--only_shards={text} must be numbers of shards, such as 3,17."
    )
  return frozenset(map(int, words))


def _find(
  settings: options.BuildConfig, flag: str, *, names: tuple[str, ...]
) -> str | None:
  """Returns the table that a flag names or that lies beside the images."""
  given = getattr(settings, flag)
  path = tables.find_beside(settings.input_dir, given, flag=flag, names=names)
  logging.info("--%s=%s", flag, path or tables.NONE)
  return path


def _report_overlap(
  settings: options.BuildConfig,
  identities: tuple[str, ...],
  *,
  names: dict[str, str],
) -> tuple[str, ...] | None:
  """Logs the identities that are also in LFW and returns them; None if not asked."""
  if settings.lfw_names is None:
    return None
  people = overlap.read_people(settings.lfw_names)
  named = {identity: names.get(identity, identity) for identity in identities}
  found = overlap.overlapping(named, people)
  for identity in found:
    logging.warning("%s (%s) is also in LFW", identity, named[identity])
  logging.info("%d of %d identities are also in LFW", len(found), len(identities))
  if found:
    logging.info("a fair score leaves them out with --exclude_identities=FILE")
  return found


def run() -> None:
  """Runs the command; the console script's entry."""
  config.run_command(main, options.BuildConfig)


if __name__ == "__main__":
  run()
