"""Checks a folder of shards: counts, CRCs, labels, images, index and manifest.

  python -m tfrecords_tools.verify /data/shards/vggface2

Every bad record is named by shard, number and byte, with what is wrong and how to
mend it. Ends with 0 if all is well, else with 4. The folder may be in a bucket.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from absl import logging

from facedist import config, errors, progress, storage
from facedist.data import manifest
from tfrecords_tools import checks, parallel

_RECORDS_WORTH_A_PROCESS = 4000  # below, starting one takes longer than the records


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
  """The flags of this command."""

  data_dir: str = config.setting(
    help="Folder of shards; may be given without the flag, as the first argument."
  )
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1
  )


def main(settings: VerifyConfig) -> None:
  """Checks the folder and prints each problem on stderr.

  Raises:
    errors.DataError: There was a problem.
  """
  problems = 0
  with _local(settings.data_dir) as folder:
    made = manifest.load(folder)
    for problem in verify(folder, made, num_processes=settings.num_processes):
      logging.error("%s", problem)
      problems += 1
  counts = ", ".join(f"{split.records:,} {name}" for name, split in made.splits.items())
  if problems:
    raise errors.DataError(
      f"{settings.data_dir} has {problems} problems, each named above."
    )
  logging.info("%s is sound: %s records", settings.data_dir, counts)


def verify(
  folder: str, made: manifest.Manifest, *, num_processes: int | None = None
) -> Iterator[str]:
  """Yields a line for each problem of a local folder of shards.

  Args:
    folder: The folder.
    made: Its manifest.
    num_processes: Processes to use; None is one for each core, fewer for few records.
  """
  yield from _check_manifest(made)
  yield from checks.check_pairs(folder, made)
  total = sum(split.records for split in made.splits.values())
  wanted = 1 + total // _RECORDS_WORTH_A_PROCESS
  problems: list[str] = []
  found = parallel.ordered_map(
    checks.check_records,
    _tasks(folder, made, problems=problems),
    num_processes=num_processes or min(parallel.available_cores(), wanted),
    preload=["tensorflow"],  # for the records' schema
  )
  with contextlib.closing(found), progress.Progress("checked", total=total) as shown:
    for part in found:
      shown.advance(part.records)
      yield from part.problems
  yield from problems


def _tasks(
  folder: str, made: manifest.Manifest, *, problems: list[str]
) -> Iterator[checks.Task]:
  """Yields all records to check; adds what is wrong with whole files to `problems`."""
  for split in made.splits.values():
    for number, shard in enumerate(split.shards):
      rows, has_index, of_files = checks.check_files(folder, shard, number=number)
      problems += of_files
      for first in range(0, len(rows), checks.RECORDS_A_TASK):
        yield checks.Task(
          path=os.path.join(folder, shard.name),
          number=number,
          first=first,
          rows=rows[first : first + checks.RECORDS_A_TASK],
          has_index=has_index,
          identities=made.identities,
          image_size=made.image_size,
        )


def _check_manifest(made: manifest.Manifest) -> Iterator[str]:
  """Yields a line for each contradiction within the manifest."""
  if list(made.identities) != sorted(set(made.identities)):
    yield f"{manifest.MANIFEST_NAME}: the identities are not sorted, each once"


@contextlib.contextmanager
def _local(folder: str) -> Iterator[str]:
  """Yields the folder, or a temporary copy of one that lies in a bucket."""
  if not storage.is_bucket(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="facedist-") as copy:
    made = manifest.load(folder)
    manifest.save(made, copy)
    shards = [shard for split in made.splits.values() for shard in split.shards]
    names = {name for shard in shards for name in (shard.name, shard.index_name)}
    names |= {made.pairs.name} if made.pairs else set()
    present = names.intersection(storage.list_names(folder))
    logging.info("fetching %d files of %s", len(present), folder)
    for name in sorted(present):
      storage.download(storage.join(folder, name), os.path.join(copy, name))
    yield copy


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
