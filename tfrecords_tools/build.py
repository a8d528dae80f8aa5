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

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator

from absl import logging

from facedist import config, errors, storage
from facedist.data import manifest
from tfrecords_tools import (
  assembly,
  faces,
  ledger,
  lfw,
  options,
  overlap,
  parallel,
  plan,
  progress,
  source,
  tables,
  vggface2,
  writing,
)

_IMAGES_WORTH_A_PROCESS = 500  # below, starting one takes longer than the images


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
  overlapping = _report_overlap(settings, shards.identities, images.identity_names)
  described = assembly.describe(settings, images, shards)
  with ledger.only_builder(settings.output_dir):
    book = ledger.Ledger(settings.output_dir, described)
    book.open()
    finished = book.finished([shard.name for shard in shards.shards])
    manifest_path = storage.join(settings.output_dir, manifest.MANIFEST_NAME)
    if len(finished) == len(shards.shards) and storage.exists(manifest_path):
      logging.info("%s is finished; nothing to do", settings.output_dir)
      return
    started = time.monotonic()
    finished = write_shards(settings, images, shards, book, finished)
    made = assembly.assemble(images, shards, finished, described, overlapping)
    assembly.save(made, images, settings.output_dir)
  seconds = time.monotonic() - started
  logging.info(
    "wrote %s to %s in %s",
    ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items()),
    settings.output_dir,
    progress.duration(seconds),
  )


def read_vggface2(
  settings: options.BuildConfig,
) -> tuple[source.Source, plan.Plan]:
  """Reads and plans a training set in VGGFace2's layout."""
  excluded = settings.exclude_identities
  images = vggface2.read(
    settings.input_dir,
    image_list=_find(settings, "image_list", vggface2.LIST_FILES),
    landmarks=_find(settings, "landmarks", source.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", source.BOX_FILES),
    identity_meta=_find(settings, "identity_meta", vggface2.META_FILES),
    missing_row=settings.missing_row or "skip",
    excluded=frozenset(tables.read_lines(excluded)) if excluded else frozenset(),
  )
  return images, plan.plan_training_set(
    images,
    seed=settings.seed,
    num_shards=settings.num_shards,
    val_fraction=settings.val_fraction,
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
  pairs = _find(settings, "pairs", lfw.PAIRS_FILES)
  if pairs is None:
    raise errors.UsageError(
      f"--pairs is required: there is no pairs.txt beside {settings.input_dir}."
    )
  images = lfw.read(
    settings.input_dir,
    pairs=pairs,
    landmarks=_find(settings, "landmarks", source.LANDMARK_FILES),
    bounding_boxes=_find(settings, "bounding_boxes", source.BOX_FILES),
    missing_row=settings.missing_row or "fail",
  )
  return images, plan.plan_verification_set(images, num_shards=settings.num_shards)


READERS = {"vggface2": read_vggface2, "lfw": read_lfw}


def write_shards(
  settings: options.BuildConfig,
  images: source.Source,
  shards: plan.Plan,
  book: ledger.Ledger,
  finished: dict[str, ledger.FinishedShard],
) -> dict[str, ledger.FinishedShard]:
  """Writes the shards that are not finished, in order; returns all of them.

  Raises:
    errors.DataError: More images are unreadable than may be.
  """
  todo = [shard for shard in shards.shards if shard.name not in finished]
  remaining = sum(len(shard.rows) for shard in todo)
  tolerance = _Tolerance(0 if images.pairs is not None else settings.max_bad)
  for entry in finished.values():
    tolerance.count(entry.skipped)
  face = faces.FaceSettings(settings.image_size, settings.quality, settings.margin)
  chunks = itertools.chain.from_iterable(
    writing.chunks_of(images, shards.labels, shard.rows, face) for shard in todo
  )
  written = parallel.ordered_map(
    writing.make_records,
    chunks,
    num_processes=settings.num_processes or _num_processes(remaining),
  )
  done = shards.num_images - remaining
  if done:
    logging.info("going on: %s images are done", f"{done:,}")
  shown = progress.Progress("built", total=shards.num_images, done=done)
  result = dict(finished)
  with contextlib.closing(written), shown:
    for shard in todo:
      parts = itertools.islice(written, writing.num_chunks(len(shard.rows)))
      entry = writing.write_shard(
        settings.output_dir, shard.name, _watched(parts, shown, tolerance)
      )
      book.note(entry)
      result[shard.name] = entry
  return result


class _Tolerance:
  """Counts unreadable images, names each, and gives up past `max_bad`."""

  def __init__(self, max_bad: int) -> None:
    self._max_bad = max_bad
    self._num_bad = 0

  def count(self, skipped: Iterable[dict[str, str]]) -> None:
    """Counts some; DataError once there are too many."""
    for entry in skipped:
      self._num_bad += 1
      logging.warning("skipped %s: %s", entry["path"], entry["reason"])
      if self._num_bad > self._max_bad:
        raise errors.DataError(
          f"{entry['path']}: {entry['reason']}. It is unreadable image number "
          f"{self._num_bad}, and {self._max_bad} may be; repair the images, or raise "
          "--max_bad, and start again to go on."
        )


def _watched(
  parts: Iterator[writing.Written], shown: progress.Progress, tolerance: _Tolerance
) -> Iterator[writing.Written]:
  """Passes chunks on, shows progress and counts unreadable images."""
  for part in parts:
    tolerance.count(part.skipped)
    shown.advance(part.num_images)
    yield part


def _num_processes(num_images: int) -> int:
  """Returns a process for each core, fewer for a few images."""
  return min(parallel.available_cores(), 1 + num_images // _IMAGES_WORTH_A_PROCESS)


def _find(
  settings: options.BuildConfig, flag: str, names: tuple[str, ...]
) -> str | None:
  """Returns the table that a flag names or that lies beside the images."""
  given = getattr(settings, flag)
  path = tables.find_beside(settings.input_dir, given, flag=flag, names=names)
  logging.info("--%s=%s", flag, path or tables.NONE)
  return path


def _report_overlap(
  settings: options.BuildConfig,
  identities: tuple[str, ...],
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
  logging.info(
    "%d of %d identities are also in LFW; a fair score leaves them out with "
    "--exclude_identities",
    len(found),
    len(identities),
  )
  return found


def run() -> None:
  """Runs the command; the console script's entry."""
  config.run_command(main, options.BuildConfig)


if __name__ == "__main__":
  run()
