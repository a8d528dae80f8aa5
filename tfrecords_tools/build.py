"""Turns face images into TFRecord shards with an index and a manifest.

VGGFace2 in its own layout; the CSVs and lists are found beside the folder:

  python -m tfrecords_tools.build --dataset=vggface2 \\
    --input_dir=/data/vggface2/train --output_dir=/data/shards/vggface2 \\
    --val_fraction=0.02 --lfw_names=/data/lfw/pairs.txt

A verification set of exactly the pairs that LFW's list names:

  python -m tfrecords_tools.build --dataset=lfw \\
    --input_dir=/data/lfw/aligned_112 --pairs=/data/lfw/pairs.txt \\
    --output_dir=/data/shards/lfw

Or of the pairs of a CSV file, image1,image2,same or image1,image2,same,fold, with paths
relative to --input_dir:

  python -m tfrecords_tools.build --dataset=pairs --input_dir=/data/faces \\
    --pairs=/data/pairs.csv --output_dir=/data/shards/mine

--make_pairs draws the pairs from a labelled set (vggface2, rec or webdataset), in ten
folds of distinct identities, by --seed alone. pairs.csv beside the shards lists them
for other tools, and --dataset=pairs builds them again:

  python -m tfrecords_tools.build --dataset=vggface2 --input_dir=/data/vggface2/test \\
    --make_pairs=6000 --output_dir=/data/shards/vggface2_pairs

The images may be in a bucket, in uncompressed tar files (nothing is extracted), or
where a list says (--input_list), in any format that OpenCV reads; they are turned
upright by their EXIF orientation. Hidden and system folders, and files of other
endings, are left out and counted in the log and in the manifest. With --list_labels the
labels of the list are the identities, not the images' folders. InsightFace's
verification sets are read without running code that their pickles may hold:

  python -m tfrecords_tools.build --dataset=bin --input_dir=/data/agedb_30.bin \\
    --output_dir=/data/shards/agedb_30

Each of several .bin files, separated by commas or in a folder, becomes a set: NAME.bin
in OUTPUT_DIR/NAME.

InsightFace's training sets, from train.rec, with train.idx and property beside it:

  python -m tfrecords_tools.build --dataset=rec --input_dir=/data/ms1m-retinaface-t1 \\
    --output_dir=/data/shards/ms1m

WebDataset's tar files, whose samples are KEY.jpg and KEY.cls (or a "label" in
KEY.json):

  python -m tfrecords_tools.build --dataset=webdataset \\
    --input_dir='/data/wds/train-{000000..000099}.tar' --output_dir=/data/shards/wds

Digits, to see the effect of a margin (configs/mnist_*.flags), from a file like Keras'
mnist.npz or, with --dataset=digits and no input, scikit-learn's:

  python -m tfrecords_tools.build --dataset=npz --input_dir=/data/mnist.npz \\
    --image_size=28 --output_dir=/data/shards/mnist

On many machines, each task writes some of the shards. A last command checks that all
shards exist and writes the manifest:

  python -m tfrecords_tools.build <flags as above> --num_tasks=64 --task_index=5
  python -m tfrecords_tools.build <flags as above> --num_tasks=64 --finalize

A Slurm array gives both numbers in the environment, a Kubernetes Indexed Job the index.
Tasks do not communicate: each makes the same plan. The same input and seed give the
same bytes, for any number of processes and tasks. A task that was stopped or
killed continues when it is started again; two tasks that build the same shards by
mistake do no harm. --output_dir may be in a bucket (gs://...).

If images were skipped, because they could not be read (--max_bad) or no table has a row
for them, the build, or --finalize, ends with exit code 5, and the manifest names each.
One task of many still ends with 0, so a job that waits for all tasks starts.
"""

import collections
import os
import time

from absl import logging

from facedist import config, errors, progress, storage
from facedist.data import alignment, image_names
from facedist.data.shards import manifest
from tfrecords_tools.builder import build_manifest, options, plan, state, tasks, writer
from tfrecords_tools.sources import base, lfw, registry


def main(settings: options.BuildConfig) -> errors.ExitCode:
  """Builds each set that the flags name, one after another; usually there is one.

  An error ends the command. The sets before it are finished, and the next run of the
  command skips them.

  Returns:
    PARTIAL if a finished set lacks images that were skipped, else DONE.
  """
  task = find_task(settings)
  sets = registry.split_into_sets(settings)
  codes = []
  for number, one in enumerate(sets, 1):
    if one is not settings:
      logging.info(
        "set %d of %d: %s into %s", number, len(sets), one.input_dir, one.output_dir
      )
    codes.append(build_set(one, task))
  return max(codes)


def build_set(settings: options.BuildConfig, task: tasks.BuildTask) -> errors.ExitCode:
  """Builds one folder of shards, or a task's shards of it, or continues doing so.

  Returns:
    PARTIAL if the finished set lacks images that were skipped, else DONE.
  """
  started = time.monotonic()
  storage.check_folder(settings.output_dir, flag="output_dir")
  images, shards = registry.READERS[settings.dataset](settings)
  num_shards = collections.Counter(shard.split for shard in shards.shards)
  logging.info(
    "%s images of %s identities; shards: %s; the tables leave out %d images",
    f"{shards.num_images:,}",
    f"{len(shards.identities):,}",
    ", ".join(f"{count:,} {split}" for split, count in num_shards.items()),
    len(images.skipped),
  )
  if images.left_out:
    logging.warning("left out: %s", image_names.described(images.left_out))
  overlapping = _report_overlap(
    settings, shards.identities, names=images.identity_names
  )
  described = build_manifest.describe_manifest(settings, images, shards)
  build_state = state.BuildState(settings.output_dir, described)
  state.remove_leftovers((settings.output_dir, build_state.folder))
  if settings.finalize:
    finished = state.finished_shards(
      shards.shards,
      build_state=build_state,
      num_tasks=task.count,
      max_bad=settings.max_bad,
      explain_broken=images.explain_broken,
      output_dir=settings.output_dir,
    )
  else:
    built = _build(settings, images, shards, build_state=build_state, task=task)
    if built is None and task.count == 1:
      return _exit_code(manifest.load(settings.output_dir))
    if built is None or len(built) < len(shards.shards):
      return errors.ExitCode.DONE
    finished = built
  made = build_manifest.assemble(
    images, shards, finished=finished, described=described, overlapping=overlapping
  )
  build_manifest.save_manifest(made, settings.output_dir, images=images)
  _report_alignment(made)
  logging.info(
    "wrote %s in %s: %s",
    settings.output_dir,
    progress.duration(time.monotonic() - started),
    ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items()),
  )
  return _exit_code(made)


def _report_alignment(made: manifest.Manifest) -> None:
  """Logs how many images were cut in which way; warns if faces were not found."""
  counts = made.alignment["images"]
  logging.info(
    "alignment: %s",
    ", ".join(
      f"{count:,} {alignment.IN_WORDS[name]}" for name, count in counts.items()
    ),
  )
  if made.kind == "verification" and (number := counts.get(alignment.CENTRE_CROP)):
    logging.warning(
      "%s of %s images were cut from the centre, without a landmark or a box; square "
      "ones are only resized. If they were not aligned before, a network that was "
      "trained on aligned faces scores far too low on them: give --landmarks. Images "
      "of --image_size=%d pixels are taken as they are.",
      f"{number:,}",
      f"{sum(counts.values()):,}",
      made.image_size,
    )


def _exit_code(made: manifest.Manifest) -> errors.ExitCode:
  """Returns PARTIAL, and says so, if source images of a finished set were skipped."""
  if not made.skipped:
    return errors.ExitCode.DONE
  logging.warning(
    "%d images were skipped; %s names each under skipped. Everything else is built: "
    "exit code 5",
    len(made.skipped),
    manifest.MANIFEST_NAME,
  )
  return errors.ExitCode.PARTIAL


def find_task(settings: options.BuildConfig) -> tasks.BuildTask:
  """Returns the task of this process.

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
  build_state: state.BuildState,
  task: tasks.BuildTask,
) -> dict[str, state.FinishedShard] | None:
  """Writes a task's missing shards; returns all of them, None if none was missing."""
  build_state.begin()
  mine = task.of(shards.shards)
  finished, missing = build_state.examine([shard.name for shard in mine])
  is_one_of_many = task.count > 1
  name = f"task {task.index} of {task.count}" if is_one_of_many else settings.output_dir
  manifest_path = storage.join(settings.output_dir, manifest.MANIFEST_NAME)
  is_complete = not missing and not settings.only_shards
  if is_complete and (is_one_of_many or storage.exists(manifest_path)):
    logging.info("%s is finished; nothing to do", name)
    return None
  finished = writer.write_shards(
    images,
    shards,
    mine=mine,
    build_state=build_state,
    finished=finished,
    output_dir=settings.output_dir,
    face=alignment.FaceSettings(settings.image_size, settings.quality, settings.margin),
    only=parse_numbers(settings.only_shards),
    max_bad=settings.max_bad,
    num_processes=settings.num_processes,
  )
  if is_one_of_many:
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
