"""Selects from built shards, or merges several, without writing a shard again.

Only identities with enough images, at most 200 of each, and nobody who is in LFW:

  python -m tfrecords_tools.select --input_dirs=/data/shards/vggface2 \\
    --min_images_per_identity=20 --max_images_per_identity=200 \\
    --exclude_identities=in_lfw.txt --output_dir=/data/shards/vggface2_fair

Two sets merged; images that are in both are taken from the first set only:

  python -m tfrecords_tools.select --duplicates=drop --across_identities=keep_first \\
    --input_dirs=gs://faces/vggface2,gs://faces/glint360k \\
    --output_dir=gs://faces/both

--output_dir gets only index files and a manifest; the shards stay where they were
built. The manifest names them, by relative paths if possible. Train and embed from a
selection as from a build. (A program that reads the shards themselves, such as one with
TFRecordDataset, sees all records, under their old labels.)

The steps, in this order: rename identities, apply the lists, drop duplicates, drop
identities with too few images, drop images above the maximum. Labels are renumbered by
sorted name. An image never moves between train and val. The same settings and inputs
give the same bytes.

--relabel=FILE renames: a line `n000021,n000734` makes the two one identity if both are
there. To change lists or names later, select again to a new folder.

--duplicates=drop hashes the bytes of every JPEG. Of copies under one identity the
first is kept; train comes before val. Of copies under several identities at least one
label is wrong, and it is not known which: all are dropped, or the first is kept with
--across_identities=keep_first, which suits sets of the same people. Each image that
occurs twice has a line in duplicates.jsonl, with the paths of the source images. The
hashes are kept in .digests, so a run that was stopped continues; you may delete them at
any time.

Check a selection, including the new names of its records, with

  python -m tfrecords_tools.verify /data/shards/vggface2_fair
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from facedist import config, errors, storage
from facedist.config import setting
from facedist.data.shards import manifest
from tfrecords_tools import reports
from tfrecords_tools.selection import dedup, filters, merge
from tfrecords_tools.sources import tables


@dataclasses.dataclass(frozen=True)
class SelectConfig:
  """The flags of this command."""

  input_dirs: str = setting(
    help="Folders of training shards, built or selected, separated by commas.",
    paths=True,
  )
  output_dir: str = setting(
    help="New folder for the selection, local or gs://.", path=True
  )
  identities: str | None = setting(
    None,
    help="File of the identities to take, one per line.",
    heading="Which",
    path=True,
  )
  exclude_identities: str | None = setting(
    None,
    help="File of identities to leave out, one per line.",
    path=True,
  )
  min_images_per_identity: int = setting(
    1,
    help="Smallest number of images of an identity, in train and val together.",
    at_least=1,
  )
  max_images_per_identity: int | None = setting(
    None, help="Largest number of images of an identity in train.", at_least=1
  )
  seed: int | None = setting(
    None,
    help="Decides which images --max_images_per_identity takes; not given: the first "
    "ones in the shards, which are those that the build takes with the same flag "
    "and its --seed.",
    at_least=0,
  )
  same_names: str = setting(
    "separate",
    help="With several folders: whether identities with the same name are different "
    "people (their names get prefixes) or the same person.",
    choices=merge.SAME_NAMES,
    heading="Names",
  )
  prefixes: str | None = setting(
    None,
    help="A prefix for the identities of each folder, separated by commas; the "
    "folders' own names if not given.",
  )
  relabel: str | None = setting(
    None,
    help="CSV of new names: `name,new name` per line, with the prefix.",
    path=True,
  )
  duplicates: str = setting(
    "keep",
    help="What to do with images that occur twice.",
    choices=("keep", "drop"),
    heading="Duplicates",
  )
  across_identities: str = setting(
    "drop_all",
    help="Of copies under several identities, whether all are dropped or the first is "
    "kept.",
    choices=filters.ACROSS,
  )
  num_processes: int | None = setting(
    None,
    help="Processes that hash; one for each core if not given.",
    at_least=1,
    at_most=1024,
  )


def main(settings: SelectConfig) -> None:
  """Selects and writes the folder, unless it holds that very selection."""
  inputs = merge.open_inputs(
    settings.input_dirs.split(","),
    prefixes=settings.prefixes.split(",") if settings.prefixes else None,
    same_names=settings.same_names,
    renamed=tables.read_renamings(settings.relabel) if settings.relabel else {},
  )
  parts = merge.parts_of(inputs)
  lists = {
    flag: set(tables.read_lines(path))
    for flag in ("identities", "exclude_identities")
    if (path := getattr(settings, flag)) is not None
  }
  source = selection_source(settings, inputs, lists)
  folders = merge.origins_of(parts, settings.output_dir)
  if is_finished(settings.output_dir, source):
    logging.info("%s is finished; nothing to do", settings.output_dir)
    return
  storage.check_folder(settings.output_dir, flag="output_dir")
  table = filters.open_table(inputs, parts, lists=lists)
  logging.info(
    "%s images of %s identities in %d shards",
    f"{len(table.labels):,}",
    f"{len(table.names):,}",
    len(parts),
  )
  if settings.duplicates == "drop":
    drop_duplicates(settings, table)
  table.keep_identities(settings.min_images_per_identity)
  if settings.max_images_per_identity is not None:
    table.keep_images(settings.max_images_per_identity, seed=settings.seed)
  made = filters.write_selection(
    table, inputs, output_dir=settings.output_dir, source=source, folders=folders
  )
  manifest.save(made, settings.output_dir)
  for reason, count in table.left_out.items():
    logging.info("left out by %s: %s images", reason, f"{count:,}")
  logging.info(
    "wrote %s: %s identities, %s",
    settings.output_dir,
    f"{made.num_identities:,}",
    ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items()),
  )


def drop_duplicates(settings: SelectConfig, table: filters.Table) -> None:
  """Takes copies out of the table and reports each."""
  digests = dedup.digest_parts(
    table.parts, settings.output_dir, num_processes=settings.num_processes
  )
  groups = list(
    dedup.groups_of(digests, table.labels, across=settings.across_identities)
  )
  copies = [np.zeros(0, np.int64), *(group.records for group in groups)]
  filenames = dedup.filenames_of(table.parts, np.concatenate(copies))
  dropped = np.zeros(len(digests), bool)
  path = storage.join(settings.output_dir, dedup.REPORT_NAME)
  with reports.new_text(path) as stream:
    report = dedup.DuplicateReport(
      stream,
      table.parts,
      labels=table.labels,
      names=table.names,
      filenames=filenames,
    )
    for group in groups:
      report.add(group)
      dropped[group.records] = True
      if group.kept is not None:
        dropped[group.kept] = False
  table.leave_out(dropped, f"--duplicates=drop, {settings.across_identities}")
  logging.info(
    "%s images are there more than once, %s under several identities; see %s",
    f"{report.counts['images']:,}",
    f"{report.counts['across_identities']:,}",
    path,
  )


def selection_source(
  settings: SelectConfig,
  inputs: Sequence[merge.MergeInput],
  lists: dict[str, set[str]],
) -> dict[str, Any]:
  """Returns all that decides the selection: settings, lists and inputs."""
  values = dataclasses.asdict(settings)
  for flag in ("input_dirs", "output_dir", "prefixes", "num_processes", *lists):
    del values[flag]
  described = {name: value for name, value in values.items() if value is not None}
  if settings.relabel:
    content = repr(sorted(tables.read_renamings(settings.relabel).items()))
    described["relabel"] = f"{storage.crc32c_of(content.encode()):08x}"
  for flag, lines in lists.items():
    content = "\n".join(sorted(lines))
    described[flag] = f"{storage.crc32c_of(content.encode()):08x}"
  described["inputs"] = [
    {"fingerprint": each.manifest.fingerprint, "prefix": each.prefix} for each in inputs
  ]
  return described


def is_finished(output_dir: str, source: dict[str, Any]) -> bool:
  """Says whether the folder holds this selection already.

  Raises:
    errors.ConfigError: It holds shards, or another selection.
  """
  rule = f"--output_dir={output_dir} holds {{}}; name another folder or delete it."
  if not storage.exists(storage.join(output_dir, manifest.MANIFEST_NAME)):
    if any(name.endswith(".tfrecord") for name in storage.list_names(output_dir)):
      raise errors.ConfigError(rule.format("shards"))
    return False
  before = manifest.load(output_dir)
  if before.selection is None:
    raise errors.ConfigError(rule.format("shards"))
  names = sorted(before.source.keys() | source.keys())
  differing = [name for name in names if before.source.get(name) != source.get(name)]
  if differing:
    raise errors.ConfigError(
      rule.format(f"a selection with other {', '.join(differing)}")
    )
  return True


def run() -> None:
  """Runs the command; the console script's entry."""
  config.run_command(main, SelectConfig)


if __name__ == "__main__":
  run()
