"""Checks a folder of shards: counts, CRCs, labels, images, index and manifest.

  python -m tfrecords_tools.verify /data/shards/vggface2 --report=verified.json

Every bad record is named by shard, number and byte, with what is wrong and how to
fix it. The exit code is 0 if nothing is wrong, else 4. The folder may be in a bucket
(gs://...): its shards are read by ranges, each byte once, and nothing is copied to a
disk. Memory does not grow with the set.

The report, local or in a bucket, is a JSON object:

  format, format_version   "facedist-verify-report", 1
  data_dir                 the folder
  problems                 a list, in the order found; each an object with
    kind                   "manifest", "pairs", "shard", "index" or "record"
    reason, fix            what is wrong, and what to do
    file                   file name below the folder, or null
    shard                  the shard's place in its split, as --only_shards counts
    record, byte           for a record: its place in the shard, and where it starts
  num_problems, sound      their number, and whether that is 0
  fingerprint              of the content, as in checkpoints; null without a manifest
  splits                   records by split, as the manifest has them
  records, bytes           what was read
  seconds                  how long it took
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from facedist import config, errors, progress, storage
from facedist.data.shards import manifest
from tfrecords_tools import parallel, reports
from tfrecords_tools.selection import merge
from tfrecords_tools.validation import checks
from tfrecords_tools.validation.checks import Problem

_RECORDS_WORTH_A_PROCESS = 4000  # below, starting one takes longer than the records


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
  """The flags of this command."""

  data_dir: str = config.setting(
    help="Folder of shards; may be given without the flag, as the first argument.",
    path=True,
  )
  report: str | None = config.setting(
    None,
    help="JSON file for all that was found, local or gs://.",
    path=True,
  )
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1, at_most=1024
  )


@dataclasses.dataclass
class Totals:
  """What the folder holds and how much was read; the last keys of the report."""

  fingerprint: str | None = None
  splits: dict[str, int] = dataclasses.field(default_factory=dict)
  records: int = 0
  bytes: int = 0
  seconds: float = 0.0


def main(settings: VerifyConfig) -> None:
  """Checks the folder, prints each problem on stderr and writes the report.

  Raises:
    errors.DataError: There was a problem.
  """
  started, totals, found = time.monotonic(), Totals(), 0
  folder = settings.data_dir
  storage.check_file(settings.report, flag="report")
  head = {"format": "facedist-verify-report", "format_version": 1, "data_dir": folder}
  with reports.new_report(settings.report, head, name="problems") as report:
    for problem in verify(folder, totals, num_processes=settings.num_processes):
      logging.error("%s", problem)
      report.add(dataclasses.asdict(problem))
      found += 1
    totals.seconds = round(time.monotonic() - started, 3)
    outcome = {"num_problems": found, "sound": not found}
    report.close(outcome | dataclasses.asdict(totals))
  if found:
    noun = "problem, named above" if found == 1 else "problems, each named above"
    raise errors.DataError(f"{folder} has {found} {noun}.")
  counts = ", ".join(f"{count:,} {name}" for name, count in totals.splits.items())
  logging.info(
    "%s is valid: %s records; took %s",
    folder,
    counts,
    progress.duration(totals.seconds),
  )


def verify(
  folder: str, totals: Totals, *, num_processes: int | None = None
) -> Iterator[Problem]:
  """Yields each problem of a folder of shards.

  Args:
    folder: Local or in a bucket.
    totals: Is filled in.
    num_processes: Processes to use; None is one for each core, fewer for few records.
  """
  try:
    made = manifest.load(folder)
    merge.names_of(made)
  except errors.DataError as error:
    reason, _, fix = str(error).rstrip(".").rpartition("; ")
    yield Problem("manifest", reason, fix, file=manifest.MANIFEST_NAME)
    return
  totals.fingerprint = made.fingerprint
  totals.splits = {name: split.records for name, split in made.splits.items()}
  if list(made.identities) != sorted(made.identities):
    reason = f"{manifest.MANIFEST_NAME}: the identities are not sorted"
    yield Problem("manifest", reason, checks.BUILD_AGAIN, file=manifest.MANIFEST_NAME)
  yield from checks.check_pairs(folder, made)
  yield from _problems_of_shards(folder, made, totals, num_processes=num_processes)


def _problems_of_shards(
  folder: str, made: manifest.Manifest, totals: Totals, *, num_processes: int | None
) -> Iterator[Problem]:
  """Yields what is wrong with records and shards, in order; counts what it read."""
  total = sum(totals.splits.values())
  wanted = 1 + total // _RECORDS_WORTH_A_PROCESS
  found = parallel.ordered_map(
    checks.check_shard,
    _tasks(folder, made),
    num_processes=num_processes or min(parallel.available_cores(), wanted),
  )
  with contextlib.closing(found), progress.Progress("checked", total=total) as shown:
    for shard in found:
      shown.advance(shard.records)
      totals.records += shard.records
      totals.bytes += shard.bytes
      yield from shard.problems


def _tasks(folder: str, made: manifest.Manifest) -> Iterator[checks.VerifyTask]:
  """Yields a task for each shard, with only the names that its index needs."""
  identity_of = dict(enumerate(made.identities))
  names_of = merge.names_of(made)
  for split in made.splits.values():
    for number, shard in enumerate(split.shards):
      names = names_of.get(shard.folder)
      files = checks.check_files(
        folder, shard, number=number, is_selection=made.selection is not None
      )
      labels = np.unique(files.rows["label"]).tolist()
      named = {label: identity_of[label] for label in labels if label in identity_of}
      yield checks.VerifyTask(
        path=shard.path(folder),
        shard=shard,
        number=number,
        files=files,
        is_relabelled=made.is_relabelled,
        names=names.about(named.values()) if names else None,
        identities=named if files.has_index else identity_of,
        num_identities=len(identity_of),
        image_size=made.image_size,
      )


def with_folder_as_flag(arguments: Sequence[str]) -> list[str]:
  """Turns `DIR --flag` into `--data_dir=DIR --flag`."""
  if arguments and not arguments[0].startswith("-"):
    return [f"--data_dir={arguments[0]}", *arguments[1:]]
  return list(arguments)


def run() -> None:
  """Runs the command; the console script's entry."""
  sys.argv[1:] = with_folder_as_flag(sys.argv[1:])
  config.run_command(main, VerifyConfig)


if __name__ == "__main__":
  run()
