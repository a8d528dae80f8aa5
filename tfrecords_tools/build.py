"""Turns face images into TFRecord shards with an index and a manifest.

VGGFace2 in its own layout; the CSVs and lists are found beside the folder:

  python -m tfrecords_tools.build --dataset=vggface2 \\
    --input_dir=/data/vggface2/train --output_dir=/data/shards/vggface2 \\
    --val_fraction=0.02 --lfw_names=/data/lfw/pairs.txt

A verification set of exactly the pairs that LFW's list names:

  python -m tfrecords_tools.build --dataset=lfw \\
    --input_dir=/data/lfw/aligned_112 --pairs=/data/lfw/pairs.txt \\
    --output_dir=/data/shards/lfw

The images may lie in a bucket, in uncompressed tar files (nothing is extracted), or
where a list says (--input_list), in any kind of file that OpenCV reads, and are turned
upright as their EXIF data ask. Hidden and system folders, and files of other endings,
are left out and counted, in the log and in the manifest. --list_labels takes the labels
of the list, not the images' folders, for the identities. InsightFace's verification
sets are read without running what their pickles may hold:

  python -m tfrecords_tools.build --dataset=bin --input_dir=/data/agedb_30.bin \\
    --output_dir=/data/shards/agedb_30

Several .bin files with commas between them, or a folder of them, become a set each, in
OUTPUT_DIR/NAME for NAME.bin.

Digits, for a look at what a margin does (configs/mnist_*.flags), from a file like
Keras' mnist.npz or, with --dataset=digits and no input, scikit-learn's:

  python -m tfrecords_tools.build --dataset=npz --input_dir=/data/mnist.npz \\
    --image_size=28 --output_dir=/data/shards/mnist

On many machines, each task writes its share of the shards, and one more command checks
that all are there and writes the manifest:

  python -m tfrecords_tools.build <flags as above> --num_tasks=64 --task_index=5
  python -m tfrecords_tools.build <flags as above> --num_tasks=64 --finalize

In a Slurm array both numbers, in a Kubernetes Indexed Job the index, come from the
environment. Tasks need no talk, each makes the same plan. The same input and seed give
the same bytes, whatever the number of processes and tasks. A task that was stopped,
however rudely, goes on when it is started again; two tasks that build the same part by
mistake do no harm. --output_dir may be in a bucket (gs://...).

Where images were skipped, since they could not be read (--max_bad) or no table has a
row for them, the build, or --finalize, ends with exit code 5, and the manifest names
each. One task of many ends with 0 all the same, so what waits for all tasks starts.
"""

import os
import time

from absl import logging

from facedist import config, errors, progress, storage
from facedist.data import image_names
from facedist.data.shards import manifest
from tfrecords_tools import align
from tfrecords_tools.builder import build_manifest, options, plan, state, tasks, writer
from tfrecords_tools.sources import base, lfw, registry


def main(settings: options.BuildConfig) -> errors.ExitCode:
  """Builds each set that the flags ask for, one after another; mostly there is one.

  An error ends the command; the sets before it are finished, and another run of the
  command finds them so.

  Returns:
    PARTIAL if a finished set lacks images that were skipped, else DONE.
  """
  part = find_part(settings)
  sets = registry.split_into_sets(settings)
  codes = []
  for number, one in enumerate(sets, 1):
    if one is not settings:
      logging.info(
        "set %d of %d: %s into %s", number, len(sets), one.input_dir, one.output_dir
      )
    codes.append(build_set(one, part))
  return max(codes)


def build_set(settings: options.BuildConfig, part: tasks.BuildTask) -> errors.ExitCode:
  """Builds one folder of shards, a part of one, or goes on with it.

  Returns:
    PARTIAL if the finished set lacks images that were skipped, else DONE.
  """
  started = time.monotonic()
  storage.check_folder(settings.output_dir, flag="output_dir")
  images, shards = registry.READERS[settings.dataset](settings)
  logging.info(
    "%s images of %s identities for %d shards; the tables leave out %d images",
    f"{shards.num_images:,}",
    f"{len(shards.identities):,}",
    len(shards.shards),
    len(images.skipped),
  )
  if images.left_out:
    logging.warning("left out: %s", image_names.described(images.left_out))
  overlapping = _report_overlap(
    settings, shards.identities, names=images.identity_names
  )
  described = build_manifest.describe_manifest(settings, images, shards)
  book = state.BuildState(settings.output_dir, described)
  state.remove_leftovers((settings.output_dir, book.folder))
  if settings.finalize:
    finished = state.finished_shards(
      shards.shards,
      book=book,
      num_tasks=part.count,
      max_bad=settings.max_bad,
      explain_broken=images.explain_broken,
      output_dir=settings.output_dir,
    )
  else:
    built = _build(settings, images, shards, book=book, part=part)
    if built is None and part.count == 1:
      return _exit_code(manifest.load(settings.output_dir))
    if built is None or len(built) < len(shards.shards):
      return errors.ExitCode.DONE
    finished = built
  made = build_manifest.assemble(
    images, shards, finished=finished, described=described, overlapping=overlapping
  )
  build_manifest.save_manifest(made, settings.output_dir, pairs=images.pairs)
  _report_alignment(made)
  logging.info(
    "wrote %s in %s: %s",
    settings.output_dir,
    progress.duration(time.monotonic() - started),
    ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items()),
  )
  return _exit_code(made)


def _report_alignment(made: manifest.Manifest) -> None:
  """Logs how many images were cut in which way; warns where faces were not found."""
  counts = made.alignment["images"]
  logging.info(
    "alignment: %s",
    ", ".join(f"{count:,} {align.IN_WORDS[name]}" for name, count in counts.items()),
  )
  if made.kind == "verification" and (number := counts.get(align.CENTRE_CROP)):
    logging.warning(
      "%s of %s images were cut from the centre, without a landmark or a box. A "
      "network that was trained on aligned faces scores far too low on them: give "
      "--landmarks, or images that are aligned already at --image_size=%d.",
      f"{number:,}",
      f"{sum(counts.values()):,}",
      made.image_size,
    )


def _exit_code(made: manifest.Manifest) -> errors.ExitCode:
  """Returns PARTIAL, and says so, if source images of a finished set were skipped."""
  if not made.skipped:
    return errors.ExitCode.DONE
  logging.warning(
    "%d images were skipped; %s names each under skipped. All else is built: "
    "exit code 5",
    len(made.skipped),
    manifest.MANIFEST_NAME,
  )
  return errors.ExitCode.PARTIAL


def find_part(settings: options.BuildConfig) -> tasks.BuildTask:
  """Returns what of the build this process is asked for.

  Raises:
    errors.UsageError: The flags contradict each other or the environment.
  """
  num_tasks_flag = f"--num_tasks={settings.num_tasks}"
  if settings.finalize:
    if settings.only_shards or settings.task_index is not None:
      raise errors.UsageError(
        "--finalize concerns all shards; leave out --task_index and --only_shards."
      )
    return tasks.BuildTask(0, settings.num_tasks or 1)
  if settings.only_shards:
    if settings.num_tasks is not None:
      raise errors.UsageError(f"{num_tasks_flag} and --only_shards exclude each other.")
    return tasks.BuildTask()
  return tasks.find_task(settings.num_tasks, settings.task_index, os.environ)


def _build(
  settings: options.BuildConfig,
  images: base.Source,
  shards: plan.Plan,
  *,
  book: state.BuildState,
  part: tasks.BuildTask,
) -> dict[str, state.FinishedShard] | None:
  """Writes what is missing of a part; returns all of it, or none if nothing was."""
  book.begin()
  mine = part.of(shards.shards)
  finished, missing = book.examine([shard.name for shard in mine])
  is_part = part.count > 1
  name = f"task {part.index} of {part.count}" if is_part else settings.output_dir
  manifest_path = storage.join(settings.output_dir, manifest.MANIFEST_NAME)
  is_whole = not missing and not settings.only_shards
  if is_whole and (is_part or storage.exists(manifest_path)):
    logging.info("%s is finished; nothing to do", name)
    return None
  finished = writer.write_shards(
    images,
    shards,
    mine=mine,
    book=book,
    finished=finished,
    output_dir=settings.output_dir,
    face=align.FaceSettings(settings.image_size, settings.quality, settings.margin),
    only=parse_numbers(settings.only_shards),
    max_bad=settings.max_bad,
    num_processes=settings.num_processes,
  )
  if is_part:
    logging.info("%s is finished; after the last one say --finalize", name)
    return None
  if len(finished) < len(mine):
    remaining = len(mine) - len(finished)
    logging.info("%d shards remain; build them without --only_shards", remaining)
  return finished


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


def _report_overlap(
  settings: options.BuildConfig,
  identities: tuple[str, ...],
  *,
  names: dict[str, str],
) -> tuple[str, ...] | None:
  """Logs the identities that are also in LFW and returns them; None if not asked."""
  if settings.lfw_names is None:
    return None
  people = lfw.read_people(settings.lfw_names)
  named = {identity: names.get(identity, identity) for identity in identities}
  found = lfw.overlapping(named, people)
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
