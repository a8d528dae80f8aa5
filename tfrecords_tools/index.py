"""Makes the indexes of shards, and their manifest, from the shards alone.

  python -m tfrecords_tools.index /data/shards/vggface2

Every shard of the folder (local or gs://) is read as a TFRecord file, with all CRCs
checked, and gets the index that the builder would write, to the byte. An index that is
there and right stays; one that is not its shard's is replaced with --overwrite only.
Damage is named by shard, record and byte; a damaged shard gets no index.

--manifest writes a manifest.json that is missing, too, or a new one with --overwrite:

- known from the shards: splits (from the names, train-00017-of-00256.tfrecord), counts,
  sizes, checksums, identities and labels, the images' size. So the fingerprint is that
  of the lost manifest if each identity has an image, and a run goes on from its
  checkpoints.
- unknown, and written as such: the data set's name (--dataset), JPEG quality (0),
  alignment, the builder's settings, people's names, and which images were skipped.

Shards of others will do if their tf.train.Examples have image/encoded (a JPEG) and
image/class/label; other features may be there. Where image/class/text is missing,
identities are called by their labels.
"""

import dataclasses
import sys
from collections.abc import Iterator

from absl import logging

from facedist import config, errors, storage
from facedist.data import manifest, shard_index
from tfrecords_tools import new_manifest, parallel, shard_walk, verify


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """The flags of this command."""

  data_dir: str = config.setting(
    help="Folder of shards; may be given without the flag, as the first argument."
  )
  overwrite: bool = config.setting(
    False,
    help="Whether to replace an index (with --manifest: a manifest) that is wrong.",
  )
  manifest: bool = config.setting(
    False, help="Whether to write manifest.json, as far as the shards tell it."
  )
  dataset: str = config.setting("unknown", help="Name of the data set, for --manifest.")
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1
  )


def main(settings: IndexConfig) -> None:
  """Writes what is missing and names what is wrong.

  Raises:
    errors.DataError: There are no shards, or something was wrong.
    errors.UsageError: The folder cannot be mended this way.
  """
  folder = settings.data_dir
  names = [name for name in storage.list_names(folder) if name.endswith(".tfrecord")]
  if not names:
    raise errors.DataError(f"{folder} has no shards (*.tfrecord); check its spelling.")
  described = None if settings.manifest else _described(folder)
  _check_manifest_flag(settings)
  problems = 0
  made = new_manifest.NewManifest(folder, dataset=settings.dataset)
  for walked in _walked(folder, names, settings.num_processes):
    for problem in _mend(folder, walked, described, overwrite=settings.overwrite):
      logging.error("%s", problem)
      problems += 1
    made.add(walked)
  if settings.manifest:
    for problem in made.problems():
      logging.error("%s", problem)
      problems += 1
    if not problems:
      manifest.save(made.manifest(), folder)
      logging.info("wrote %s", storage.join(folder, manifest.MANIFEST_NAME))
  if problems:
    raise errors.DataError(f"{folder} has {problems} problems, each named above.")
  logging.info("%s: %d shards have their index", folder, len(names))


def _described(folder: str) -> dict[str, manifest.Shard]:
  """Returns what the manifest says of each shard; nothing where there is none."""
  if not storage.exists(storage.join(folder, manifest.MANIFEST_NAME)):
    logging.warning(
      "%s has no %s; add --manifest to make one", folder, manifest.MANIFEST_NAME
    )
    return {}
  content = manifest.load(folder)
  if content.selection is not None:
    raise errors.UsageError(
      f"--data_dir={folder} is a selection, whose indexes leave records out; make it "
      "again with python -m tfrecords_tools.select."
    )
  return {shard.name: shard for shard in content.shards}


def _check_manifest_flag(settings: IndexConfig) -> None:
  """Raises UsageError if --manifest would replace a manifest unasked."""
  path = storage.join(settings.data_dir, manifest.MANIFEST_NAME)
  if settings.manifest and not settings.overwrite and storage.exists(path):
    raise errors.UsageError(
      f"{path} is there; leave --manifest out, or add --overwrite to replace it."
    )


def _walked(
  folder: str, names: list[str], num_processes: int | None
) -> Iterator[shard_walk.Walked]:
  """Yields what the shards hold, read in many processes."""
  yield from parallel.ordered_map(
    shard_walk.walk,
    (storage.join(folder, name) for name in names),
    num_processes=num_processes or min(parallel.available_cores(), len(names)),
    preload=["tensorflow"],
  )


def _mend(
  folder: str,
  walked: shard_walk.Walked,
  described: dict[str, manifest.Shard] | None,
  *,
  overwrite: bool,
) -> Iterator[str]:
  """Writes a shard's index if it is missing; yields what is wrong."""
  yield from walked.problems
  if not walked.problems and described:
    yield from _differences(walked, described)
  if walked.problems:
    yield f"{walked.name} gets no index; copy it again, or build it with --only_shards"
    return
  name = shard_index.index_name(walked.name)
  path, content = storage.join(folder, name), shard_index.to_bytes(walked.rows)
  if not storage.exists(path):
    storage.write_bytes(path, content)
    logging.info("wrote %s, %d records", name, len(walked.rows))
  elif storage.read_bytes(path) != content:
    if overwrite:
      storage.write_bytes(path, content)
      logging.info("replaced %s, %d records", name, len(walked.rows))
    else:
      yield f"{name} is not the index of its shard; --overwrite replaces it"


def _differences(
  walked: shard_walk.Walked, described: dict[str, manifest.Shard]
) -> Iterator[str]:
  """Yields how a sound shard differs from the manifest."""
  shard = described.get(walked.name)
  if shard is None:
    yield f"{walked.name} is not in {manifest.MANIFEST_NAME}"
    return
  found = (len(walked.rows), walked.size, walked.crc32c)
  if found != (shard.records, shard.bytes, shard.crc32c):
    yield (
      f"{walked.name} is sound but of another build than {manifest.MANIFEST_NAME}: "
      f"{found[0]} records in {found[1]} bytes, not {shard.records} in {shard.bytes} "
      f"(CRC {found[2]:08x}, not {shard.crc32c:08x})"
    )


def run() -> None:
  """Runs the command; the console script's entry."""
  sys.argv[1:] = verify.with_folder_as_flag(sys.argv[1:])
  config.run_command(main, IndexConfig)


if __name__ == "__main__":
  run()
