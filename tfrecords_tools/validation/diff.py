"""How two sets differ: settings, identities, labels, pairs and images.

How two manifests differ, but for the images themselves.
"""

import collections
import dataclasses
import functools
import os
import tempfile
from typing import Any

from facedist import errors, storage
from facedist.data.shards import manifest
from tfrecords_tools import reports
from tfrecords_tools.sources import listing
from tfrecords_tools.validation import stats


def compare_manifests(old: manifest.Manifest, new: manifest.Manifest) -> dict[str, Any]:
  """Returns what differs as JSON: by kind, empty or none where nothing does."""
  before, after = map(stats.settings_of, (old, new))
  settings = _changes(before, after, sorted(before.keys() | after.keys()), of="name")
  old_labels = {name: label for label, name in enumerate(old.identities)}
  new_labels = {name: label for label, name in enumerate(new.identities)}
  stayed = [name for name in old_labels if name in new_labels]
  only_one = old_labels.keys() ^ new_labels.keys()
  named = (old.identity_names.keys() | new.identity_names.keys()) - only_one
  pairs = [
    dataclasses.asdict(made.pairs) if made.pairs else None for made in (old, new)
  ]
  skipped = [
    collections.Counter((one["path"], one["reason"]) for one in made.skipped)
    for made in (old, new)
  ]
  return {
    "settings": settings,
    "identities_added": sorted(new_labels.keys() - old_labels.keys()),
    "identities_removed": sorted(old_labels.keys() - new_labels.keys()),
    "labels_moved": _changes(old_labels, new_labels, stayed, of="identity"),
    "names_changed": _changes(
      old.identity_names, new.identity_names, sorted(named), of="identity"
    ),
    "skipped_added": _entries(skipped[1] - skipped[0]),
    "skipped_removed": _entries(skipped[0] - skipped[1]),
    "pairs": None if pairs[0] == pairs[1] else {"old": pairs[0], "new": pairs[1]},
  }


def _changes(
  old: dict[str, Any], new: dict[str, Any], keys: list[str], *, of: str
) -> list[dict[str, Any]]:
  """Returns an object for each key whose value is another; `of` is what a key is."""
  return [
    {of: key, "old": old.get(key), "new": new.get(key)}
    for key in keys
    if old.get(key) != new.get(key)
  ]


def _entries(skipped: collections.Counter[tuple[str, str]]) -> list[dict[str, str]]:
  """Returns source images that were left out, as a manifest lists them."""
  return [{"path": path, "reason": reason} for path, reason in skipped.elements()]


COUNTS = ("same", "added", "removed", "content", "identity", "split")
_MOST_PRINTED = 10  # of a kind


@dataclasses.dataclass
class ImageDiff:
  """What became of the images.

  Attributes:
    counts: Images by COUNTS; one of another content and split counts in both.
    by_identity: The same counts, but for 'same', by the identity's name.
    examples: The first few that differ.
  """

  counts: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  by_identity: dict[str, collections.Counter[str]] = dataclasses.field(
    default_factory=dict
  )
  examples: list[str] = dataclasses.field(default_factory=list)

  def add(self, found: listing.Difference) -> None:
    """Counts an image that differs."""
    kinds = kinds_of(found)
    self.counts.update(kinds)
    names = {image.identity for image in (found.old, found.new) if image}
    for name in names:
      self.by_identity.setdefault(name, collections.Counter()).update(kinds)
    if len(self.examples) < _MOST_PRINTED:
      self.examples.append(f"{found.filename}: {_sentence(found)}")


def show(
  old_dir: str,
  new_dir: str,
  *,
  report: str | None,
  num_processes: int | None,
  scratch_dir: str | None,
) -> int:
  """Prints how two sets differ and writes the report.

  Returns:
    The exit code: that of success if they are the same, else SETS_DIFFER.

  Raises:
    errors.DataError: One of them is damaged.
  """
  old, new = manifest.load(old_dir), manifest.load(new_dir)
  found = ImageDiff()
  head = {"format": "facedist-diff", "format_version": 1}
  head |= {"old": old_dir, "new": new_dir}
  with (
    storage.scratch(scratch_dir) as inside,
    tempfile.TemporaryDirectory(prefix="facedist-", dir=inside) as scratch,
    reports.new_report(report, head, name="images") as written,
  ):
    cut_into = listing.num_files(max(_num_images(old), _num_images(new)))
    write = functools.partial(
      listing.write_list, cut_into=cut_into, num_processes=num_processes
    )
    known, lists = _known(old, new), []
    for name, folder, made in (("old", old_dir, old), ("new", new_dir, new)):
      lists.append(os.path.join(scratch, name))
      with storage.scratch(scratch_dir):
        write(folder, made, shards=_unknown(folder, made, known), into=lists[-1])
    found.counts["same"] = _records_of(old, known)
    for alike, difference in listing.compare_lists(*lists, cut_into=cut_into):
      found.counts["same"] += alike
      if difference.old or difference.new:
        found.add(difference)
        written.add(dataclasses.asdict(difference) | _as_objects(difference))
    outcome = summarize(old, new, found)
    written.close(outcome)
  print(describe(old_dir, new_dir, outcome, examples=found.examples))
  return errors.ExitCode.DONE if outcome["same"] else errors.ExitCode.SETS_DIFFER


def summarize(
  old: manifest.Manifest, new: manifest.Manifest, found: ImageDiff
) -> dict[str, Any]:
  """Returns the differences, but for the single images, as JSON."""
  of_manifests = compare_manifests(old, new)
  outcome = {
    "counts": {kind: found.counts[kind] for kind in COUNTS},
    **of_manifests,
    "fingerprints": {"old": old.fingerprint, "new": new.fingerprint},
    "images_by_identity": {
      name: dict(kinds) for name, kinds in sorted(found.by_identity.items())
    },
  }
  is_same_order = old.fingerprint == new.fingerprint
  differs = any(of_manifests.values()) or bool(found.by_identity)
  return {"same": is_same_order and not differs} | outcome


def describe(
  old_dir: str, new_dir: str, outcome: dict[str, Any], *, examples: list[str]
) -> str:
  """Returns what is printed of two sets."""
  lines = [
    f"{new_dir} and {old_dir} " + ("are the same" if outcome["same"] else "differ")
  ]
  for one in outcome["settings"]:
    lines.append(f"  {one['name']}: {_short(one['old'])} -> {_short(one['new'])}")
  for key in ("identities_added", "identities_removed"):
    lines += _listed(key.replace("_", " "), outcome[key])
  for key in ("labels_moved", "names_changed"):
    changes = (
      f"{one['identity']}: {one['old']} -> {one['new']}" for one in outcome[key]
    )
    lines += _listed(key.replace("_", " "), list(changes))
  for key, text in (("added", "more"), ("removed", "fewer")):
    paths = [f"{one['path']} ({one['reason']})" for one in outcome[f"skipped_{key}"]]
    lines += _listed(f"{text} source images left out", paths)
  if outcome["pairs"] is not None:
    lines.append("  the pairs differ")
  counts = outcome["counts"]
  texts = (
    "alike", "added", "removed", "of other content", "under another identity",
    "in another split",
  )  # fmt: skip
  named = (f"{counts[key]:,} {text}" for key, text in zip(COUNTS, texts, strict=True))
  lines.append(f"  images: {', '.join(named)}")
  prints = outcome["fingerprints"]
  if prints["old"] != prints["new"] and not outcome["images_by_identity"]:
    lines.append("  the same images lie in another order, or in other shards")
  lines += [f"    {example}" for example in examples]
  return "\n".join(lines)


def kinds_of(found: listing.Difference) -> list[str]:
  """Returns what became of an image, in the words of COUNTS."""
  if found.old is None:
    return ["added"]
  if found.new is None:
    return ["removed"]
  differs = (found.old[place] != found.new[place] for place in range(3))
  return [kind for kind, is_other in zip(COUNTS[3:], differs, strict=True) if is_other]


def _sentence(found: listing.Difference) -> str:
  """Says what became of an image."""
  if found.old is None or found.new is None:
    return kinds_of(found)[0]
  changes = {
    "content": "other content",
    "identity": f"identity {found.old.identity} -> {found.new.identity}",
    "split": f"split {found.old.split} -> {found.new.split}",
  }
  return ", ".join(changes[kind] for kind in kinds_of(found))


def _known(
  old: manifest.Manifest, new: manifest.Manifest
) -> frozenset[tuple[int, int]]:
  """Returns the CRCs of shards that both have alike, which need not be read."""
  if old.identities != new.identities or old.splits.keys() != new.splits.keys():
    return frozenset()
  alike: set[tuple[int, int]] = set()
  for name in old.splits:
    first, second = (
      {(one.crc32c, one.index_crc32c) for one in made.splits[name].shards}
      for made in (old, new)
    )
    alike |= first & second
  return frozenset(alike)


def _unknown(
  folder: str, made: manifest.Manifest, known: frozenset[tuple[int, int]]
) -> frozenset[str]:
  """Returns the paths of the shards that have to be read."""
  return frozenset(
    one.path(folder)
    for one in made.shards
    if (one.crc32c, one.index_crc32c) not in known
  )


def _records_of(made: manifest.Manifest, known: frozenset[tuple[int, int]]) -> int:
  """Returns the records in shards that need not be read."""
  return sum(
    one.records for one in made.shards if (one.crc32c, one.index_crc32c) in known
  )


def _num_images(made: manifest.Manifest) -> int:
  """Returns the records of all splits."""
  return sum(split.records for split in made.splits.values())


def _as_objects(found: listing.Difference) -> dict[str, Any]:
  """Returns both images as JSON objects."""
  return {
    "old": found.old._asdict() if found.old else None,
    "new": found.new._asdict() if found.new else None,
  }


def _listed(title: str, names: list[str]) -> list[str]:
  """Returns the line of a list: how many, and the first few."""
  if not names:
    return []
  shown = ", ".join(names[:_MOST_PRINTED]) + (", ..." if names[_MOST_PRINTED:] else "")
  return [f"  {len(names):,} {title}: {shown}"]


def _short(value: Any) -> str:
  """Returns a setting as it is printed."""
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
