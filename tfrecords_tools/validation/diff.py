"""How two sets differ: their manifests, and their images joined by file name."""

import collections
import dataclasses
import itertools
import json
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from facedist import errors, storage
from facedist.data.shards import manifest, tfrecord
from tfrecords_tools import external_sort, parallel, reports
from tfrecords_tools.validation import scan, stats

_KINDS = ("same", "added", "removed", "content", "identity", "split")
_MAX_PRINTED = 10  # of a kind


class Image(NamedTuple):
  """What is compared of two images; the last three of _KINDS name its parts."""

  jpeg_crc32c: int
  identity: str
  split: str


def show(
  old_dir: str,
  new_dir: str,
  *,
  report: str | None,
  num_processes: int | None,
  scratch_dir: str | None,
) -> int:
  """Prints how two sets differ, writes the report and returns the exit code.

  Raises:
    errors.DataError: One of them is corrupt.
  """
  old, new = manifest.load(old_dir), manifest.load(new_dir)
  same = _shards(old) & _shards(new) if old.identities == new.identities else set()
  counts = collections.Counter(same=sum(records for *_, records in same))
  before, after = _facts(old), _facts(new)
  changes = [
    {"name": name, "old": before.get(name), "new": after.get(name)}
    for name in before | after
    if before.get(name) != after.get(name)
  ]
  shown = changes[:_MAX_PRINTED]
  lines = [f"{one['name']}: {one['old']} -> {one['new']}" for one in shown]
  head = {"format": "facedist-diff", "format_version": 2, "old": old_dir}
  head |= {"new": new_dir}
  with reports.new_report(report, head, name="images") as written:
    records = itertools.chain(
      ((key, b"old") for key in _keys(old_dir, old, same, num_processes)),
      ((key, b"new") for key in _keys(new_dir, new, same, num_processes)),
    )
    ordered = external_sort.sorted_by_key(records, scratch_dir=scratch_dir)
    for filename, *images in _joined(ordered):
      kinds = _kinds(*images)
      counts.update(kinds)
      if kinds != ["same"]:
        first, second = (image and image._asdict() for image in images)
        written.add({"filename": filename, "old": first, "new": second})
        if written.num_entries <= _MAX_PRINTED:
          lines.append(f"{filename}: {', '.join(kinds)}")
    is_same = not changes and not written.num_entries
    of_images = {kind: counts[kind] for kind in _KINDS}
    written.close({"same": is_same, "counts": of_images, "changes": changes})
  print(f"{new_dir} and {old_dir} {'are the same' if is_same else 'differ'}")
  print("  images:", ", ".join(f"{of_images[kind]:,} {kind}" for kind in _KINDS))
  print("  entries of the manifest that differ:", len(changes))
  print(*(f"    {line}" for line in lines), sep="\n")
  return errors.ExitCode.DONE if is_same else errors.ExitCode.SETS_DIFFER


def _facts(made: manifest.Manifest) -> dict[str, Any]:
  """Returns what a manifest says, but for its shards, by dotted names."""
  facts = stats.settings_of(made) | {"fingerprint": made.fingerprint}
  facts["pairs"] = dataclasses.asdict(made.pairs) if made.pairs else None
  facts |= {f"identities.{one}": label for label, one in enumerate(made.identities)}
  facts |= {f"identity_names.{one}": name for one, name in made.identity_names.items()}
  return facts | {f"skipped.{one['path']}": one["reason"] for one in made.skipped}


def _shards(made: manifest.Manifest) -> set[tuple[str, int, int, int, int]]:
  """Returns what tells shards apart; those that both sets have are not read."""
  return {
    (name, number, shard.crc32c, shard.index_crc32c, shard.records)
    for name, split in made.splits.items()
    for number, shard in enumerate(split.shards)
  }


def _keys(
  folder: str, made: manifest.Manifest, same: set[Any], num_processes: int | None
) -> Iterator[bytes]:
  """Yields [file name, *Image] of each record that is not in `same` shards, as JSON."""
  known = {(split, number) for split, number, *_ in same}
  tasks = (
    (part, one.split, {label: made.identities[label] for label in part.rows["label"]})
    for one in scan.walk_index(folder, made)
    if (one.split, one.number) not in known
    for part in scan.cut_parts(one.shard.path(folder), one.rows, size=one.shard.bytes)
  )
  processes = num_processes or parallel.available_cores()
  parts = parallel.ordered_map(_list_part, tasks, num_processes=processes)
  return itertools.chain.from_iterable(parts)


def _list_part(task: tuple[scan.ShardPart, str, dict[int, str]]) -> list[bytes]:
  """Returns the keys of a part's records; a process's unit of work."""
  part, split, identities = task
  keys = []
  for row, framed in zip(part.rows, part.framed(part.read()), strict=True):
    try:
      record = tfrecord.parse(tfrecord.unframe(framed))
    except errors.DataError as error:
      place = f"{part.path}, record at byte {row['offset']}"
      raise errors.DataError(f"{place}: {error}") from error
    image = Image(storage.crc32c_of(record.jpeg), identities[row["label"]], split)
    filename = record.filename or f"{image.identity}/{image.jpeg_crc32c:08x}"
    keys.append(json.dumps([filename, *image]).encode())
  return keys


def _joined(
  records: Iterator[external_sort.Record],
) -> Iterator[tuple[str, Image | None, Image | None]]:
  """Yields the old and the new image of each file name; merged sets repeat names."""
  found = ((*json.loads(key), which) for key, which in records)
  for filename, group in itertools.groupby(found, key=operator.itemgetter(0)):
    old, new = collections.Counter[Image](), collections.Counter[Image]()
    for _, *image, which in group:
      (old if which == b"old" else new)[Image(*image)] += 1
    yield from ((filename, one, one) for one in (old & new).elements())
    rest = (sorted(one.elements()) for one in (old - new, new - old))
    yield from ((filename, *images) for images in itertools.zip_longest(*rest))


def _kinds(old: Image | None, new: Image | None) -> list[str]:
  """Returns what became of an image, in the words of _KINDS."""
  if old is None or new is None:
    return ["removed" if new is None else "added"]
  parts = zip(_KINDS[3:], old, new, strict=True)
  return [kind for kind, before, after in parts if before != after] or ["same"]
