"""Makes the indexes of shards, and their manifest, from the shards alone.

  python -m tfrecords_tools.rebuild_index /data/shards/vggface2

Every shard of the folder (local or gs://) is read as a TFRecord file, with all CRCs
checked, and gets the index that the builder would write, to the byte. A correct index
is kept; a wrong one is replaced only with --overwrite. Corruption is named by shard,
record and byte; a corrupt shard gets no index.

--manifest also writes a missing manifest.json, or with --overwrite a new one:

- known from the shards: splits (from the names, train-00017-of-00256.tfrecord), counts,
  sizes, checksums, identities and labels, the images' size. So the fingerprint is that
  of the lost manifest if each identity has an image, and a run continues from its
  checkpoints.
- unknown, and written as such: the data set's name (--dataset), JPEG quality (0),
  alignment, the builder's settings, people's names, and which images were skipped.

Shards that other programs wrote work too if they are not compressed, have the names
that the builder gives, and each tf.train.Example has a JPEG in image/encoded (or image,
or image_raw) and a whole number in image/class/label (or label, or image/source_id);
other features may be there. The name of an identity is image/class/text, its label
if that is missing, and both if two labels have the same text. Labels may begin at any
number and have gaps: if they are not the identities' positions in sorted order,
--manifest renumbers them in the indexes, and the log says so; the shards are unchanged.
It holds 24 bytes per record in memory.
"""

import dataclasses
import re
import sys
from collections.abc import Collection, Iterable, Iterator

from absl import logging

from facedist import config, errors, storage
from facedist.data.shards import manifest, shard_index
from tfrecords_tools import parallel, verify
from tfrecords_tools.validation import rebuild, scan

_SHARD_NAME = "SPLIT-00000-of-00008.tfrecord"
_LIKE_A_SHARD = re.compile(r"-of-\d+$|\.tfrecords?\b|\.tfrec\b")


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """The flags of this command."""

  data_dir: str = config.setting(
    help="Folder of shards; may be given without the flag, as the first argument.",
    path=True,
  )
  overwrite: bool = config.setting(
    False,
    help="Whether to replace an index (with --manifest: a manifest) that is wrong.",
  )
  manifest: bool = config.setting(
    False, help="Whether to write manifest.json with what is known from the shards."
  )
  dataset: str = config.setting("unknown", help="Name of the data set, for --manifest.")
  num_processes: int | None = config.setting(
    None, help="Processes; one for each core if not given.", at_least=1, at_most=1024
  )


def main(settings: IndexConfig) -> None:
  """Writes what is missing and names what is wrong.

  Raises:
    errors.DataError: There are no shards, or something was wrong.
    errors.UsageError: The folder cannot be fixed this way.
  """
  folder = settings.data_dir
  found = storage.list_names(folder)
  names = [name for name in found if name.endswith(".tfrecord")]
  if not names:
    raise errors.DataError(_no_shards(folder))
  _check_manifest_flag(settings)
  indexes = {shard_index.index_name(name) for name in names}
  if settings.manifest or settings.overwrite or not indexes <= set(found):
    storage.check_folder(folder, flag="data_dir")
  walked = _walk_shards(folder, names, settings.num_processes)
  make = _make_set if settings.manifest else _make_indexes
  problems = 0
  for problem in make(settings, walked):
    logging.error("%s", problem)
    problems += 1
  if problems:
    raise errors.DataError(f"{folder} has {problems} problems, each named above.")
  logging.info("%s: %d shards have their index", folder, len(names))


def _no_shards(folder: str) -> str:
  """Says that there are no shards, and which files may be some of another name."""
  others = [name for name in storage.list_names(folder) if _LIKE_A_SHARD.search(name)]
  if not others:
    return f"{folder} has no shards (*.tfrecord); check its spelling."
  return (
    f"{folder} has no shards called {_SHARD_NAME}, but {len(others)} files like "
    f"{others[0]}; rename them so, and write compressed ones again without compression."
  )


def _make_indexes(
  settings: IndexConfig, walked: Iterable[scan.Walked]
) -> Iterator[str]:
  """Writes the indexes that are missing, as a shard is read; yields what is wrong."""
  folder = settings.data_dir
  made = _load_manifest(folder)
  shards, label_of = {}, {}
  if made is not None:
    shards = {shard.name: shard for shard in made.shards}
    label_of = {name: label for label, name in enumerate(made.identities)}
  for one in walked:
    yield from one.problems
    if one.problems:
      yield f"{one.name} gets no index; copy it again, or build it with --only_shards"
      continue
    if made is not None:
      yield from _differences(one, shards.get(one.name))
      if made.is_relabelled:
        try:
          one = rebuild.relabelled(one, label_of)
        except errors.DataError as error:
          yield str(error)
          continue
    content = shard_index.to_bytes(one.rows)
    yield from _write(folder, one.name, content, overwrite=settings.overwrite)


def _make_set(settings: IndexConfig, walked: Iterable[scan.Walked]) -> Iterator[str]:
  """Writes all indexes and the manifest, or yields why there can be none."""
  folder = settings.data_dir
  made = rebuild.NewManifest(folder, dataset=settings.dataset)
  problems = 0
  for one in walked:
    made.add(one)
    problems += len(one.problems)
    yield from one.problems
  others = list(made.problems())
  yield from others
  if problems or others:
    return
  for name, content, as_in_records in made.indexes():
    known = () if content == as_in_records else (as_in_records,)
    wrong = list(
      _write(folder, name, content, overwrite=settings.overwrite, replaces=known)
    )
    problems += len(wrong)
    yield from wrong
  if not problems:
    manifest.save(made.manifest(), folder)
    logging.info("wrote %s", storage.join(folder, manifest.MANIFEST_NAME))
    if made.is_renumbered:
      logging.warning(
        "%s: the labels in the records are not the identities' places in sorted order; "
        "the %d labels are renumbered from 0 in the indexes, and the records keep "
        "theirs",
        folder,
        made.num_identities,
      )


def _load_manifest(folder: str) -> manifest.Manifest | None:
  """Returns the manifest; none where there is none."""
  if not storage.exists(storage.join(folder, manifest.MANIFEST_NAME)):
    logging.warning(
      "%s has no %s; add --manifest to make one", folder, manifest.MANIFEST_NAME
    )
    return None
  content = manifest.load(folder)
  if content.selection is not None:
    raise errors.UsageError(
      f"--data_dir={folder} is a selection, whose indexes leave records out; make it "
      "again with python -m tfrecords_tools.select."
    )
  return content


def _check_manifest_flag(settings: IndexConfig) -> None:
  """Raises UsageError if --manifest would replace a manifest unasked."""
  path = storage.join(settings.data_dir, manifest.MANIFEST_NAME)
  if settings.manifest and not settings.overwrite and storage.exists(path):
    raise errors.UsageError(
      f"{path} is there; leave --manifest out, or add --overwrite to replace it."
    )


def _walk_shards(
  folder: str, names: list[str], num_processes: int | None
) -> Iterator[scan.Walked]:
  """Yields what the shards hold, read in many processes."""
  yield from parallel.ordered_map(
    scan.walk_shard,
    (storage.join(folder, name) for name in names),
    num_processes=num_processes or min(parallel.available_cores(), len(names)),
  )


def _write(
  folder: str,
  shard: str,
  content: bytes,
  *,
  overwrite: bool,
  replaces: Collection[bytes] = (),
) -> Iterator[str]:
  """Writes a shard's index if it is missing; yields what is wrong with one that is not.

  Args:
    folder: Where the shard is.
    shard: Its name.
    content: The index file's content.
    overwrite: Whether to replace any that is there.
    replaces: Contents that are replaced in any case.
  """
  name = shard_index.index_name(shard)
  path = storage.join(folder, name)
  if not storage.exists(path):
    storage.write_bytes(path, content)
    logging.info("wrote %s", name)
    return
  found = storage.read_bytes(path)
  if found == content:
    return
  if overwrite or found in replaces:
    storage.write_bytes(path, content)
    logging.info("replaced %s", name)
  else:
    yield f"{name} is not the index of its shard; --overwrite replaces it"


def _differences(walked: scan.Walked, shard: manifest.Shard | None) -> Iterator[str]:
  """Yields how a valid shard differs from the manifest's entry."""
  if shard is None:
    yield f"{walked.name} is not in {manifest.MANIFEST_NAME}"
    return
  found = (len(walked.rows), walked.size, walked.crc32c)
  if found != (shard.records, shard.bytes, shard.crc32c):
    yield (
      f"{walked.name} is valid but of another build than {manifest.MANIFEST_NAME}: "
      f"{found[0]} records in {found[1]} bytes, not {shard.records} in {shard.bytes} "
      f"(CRC {found[2]:08x}, not {shard.crc32c:08x})"
    )


def run() -> None:
  """Runs the command; the console script's entry."""
  sys.argv[1:] = verify.with_folder_as_flag(sys.argv[1:])
  config.run_command(main, IndexConfig)


if __name__ == "__main__":
  run()
