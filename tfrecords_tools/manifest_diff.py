"""How two manifests differ, but for the images themselves."""

import collections
import dataclasses
from typing import Any

from facedist.data import manifest
from tfrecords_tools import statistics_of_set


def compare(old: manifest.Manifest, new: manifest.Manifest) -> dict[str, Any]:
  """Returns what differs as JSON: by kind, empty or none where nothing does."""
  before, after = map(statistics_of_set.settings_of, (old, new))
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
