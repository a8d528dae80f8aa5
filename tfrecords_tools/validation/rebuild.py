"""A manifest from shards alone; what the shards do not say is `UNKNOWN`."""

import collections
import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Mapping

import numpy as np

from facedist import __version__, errors, storage
from facedist.data.shards import manifest, shard_index, tfrecord
from tfrecords_tools.validation import scan

UNKNOWN = "unknown"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.tfrecord")
_SHOWN = 8  # sizes that an error names
_SPLITS = ("train", "val", "images")  # in the builder's order


class NewManifest:
  """Collects what the shards of a folder hold.

  Args:
    folder: Where the shards and their indexes are.
    dataset: The data set's name.
  """

  def __init__(self, folder: str, *, dataset: str) -> None:
    self._folder, self._dataset = folder, dataset
    self._shards: dict[str, dict[int, scan.Walked]]
    self._shards = collections.defaultdict(dict)
    self._counts: dict[str, set[int]] = collections.defaultdict(set)
    self._texts: dict[int, str] = {}
    self._problems: list[str] = []

  def add(self, walked: scan.Walked) -> None:
    """Adds a shard."""
    named = _NAME.fullmatch(walked.name)
    if named is None:
      self._problems.append(
        f"{walked.name} does not have the name of a shard; rename it to "
        "SPLIT-00000-of-00008.tfrecord, with train or val for SPLIT, its number from 0 "
        "and how many there are"
      )
      return
    split, number, count = named[1], int(named[2]), int(named[3])
    self._counts[split].add(count)
    self._shards[split][number] = walked
    for label, text in walked.identities.items():
      known = self._texts.setdefault(label, text)
      if known != text:
        self._problems.append(
          f"{walked.name} calls label {label} {text!r}, others call it {known!r}"
        )

  def problems(self) -> Iterator[str]:
    """Yields why there can be no manifest."""
    yield from self._problems
    for split, counts in self._counts.items():
      if len(counts) > 1:
        yield f"the shards of {split} are of {sorted(counts)} in all; remove the others"
        continue
      for number in sorted(set(range(*counts)) - self._shards[split].keys()):
        yield f"{shard_index.shard_name(split, number, *counts)} is missing"
    sizes = {size for walked in self._all for size in walked.image_sizes}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
      some = [f"{width}x{height}" for height, width in sorted(sizes)[:_SHOWN]]
      shown = ", ".join(some + ["..."] * (len(sizes) > _SHOWN))
      yield f"the images are not squares of one size, but {shown}"
    if self._all and not any(len(one.rows) or one.problems for one in self._all):
      yield "the shards have no records"
    names = collections.Counter(self._names.values())
    for name, labels in names.items():
      if labels > 1:
        yield f"{labels} labels would both be called {name}; give them other texts"

  @property
  def num_identities(self) -> int:
    """Number of labels that records have."""
    return len(self._texts)

  @property
  def is_renumbered(self) -> bool:
    """Whether labels differ from those in the records."""
    return any(old != new for old, new in self._new_labels.items())

  def indexes(self) -> Iterator[tuple[str, bytes, bytes]]:
    """Yields each shard's name and its index, last with the labels of its records."""
    for walked in self._all:
      with_new = shard_index.to_bytes(_with_labels(walked.rows, self._new_labels))
      yield walked.name, with_new, shard_index.to_bytes(walked.rows)

  def manifest(self) -> manifest.Manifest:
    """Returns the manifest; there must be no problems."""
    splits = {}
    for split in sorted(self._shards, key=_place):
      shards = tuple(
        _described(walked, self._new_labels)
        for _, walked in sorted(self._shards[split].items())
      )
      splits[split] = manifest.Split(sum(shard.records for shard in shards), shards)
    ((height, _),) = {size for walked in self._all for size in walked.image_sizes}
    pairs = _pairs(self._folder)
    source = {"rebuilt_from": "shards"}
    if self.is_renumbered:
      source["labels"] = manifest.RENUMBERED
    return manifest.Manifest(
      kind="classification" if pairs is None else "verification",
      dataset=self._dataset,
      tool_version=__version__,
      image_size=height,
      quality=0,
      alignment={"method": UNKNOWN},
      source=source,
      identities=tuple(sorted(self._names.values())),
      identity_names={},
      splits=splits,
      pairs=pairs,
    )

  @property
  def _all(self) -> list[scan.Walked]:
    """The shards of all splits."""
    return [one for shards in self._shards.values() for one in shards.values()]

  @functools.cached_property
  def _names(self) -> dict[int, str]:
    """What each label of the records is called; once all shards are there."""
    counts = collections.Counter(self._texts.values())
    return {
      label: text if text and counts[text] == 1 else tfrecord.named_by(text, label)
      for label, text in self._texts.items()
    }

  @functools.cached_property
  def _new_labels(self) -> dict[int, int]:
    """New labels by those of the records: an identity's place in sorted order."""
    in_order = sorted(self._names, key=self._names.__getitem__)
    return {old: new for new, old in enumerate(in_order)}


def relabelled(walked: scan.Walked, label_of: Mapping[str, int]) -> scan.Walked:
  """Returns a shard with the labels that a manifest gives to its identities.

  Args:
    walked: The shard, with the labels of its records.
    label_of: The manifest's labels by name.

  Raises:
    errors.DataError: The manifest does not have one of them.
  """
  labels = {}
  for label, text in walked.identities.items():
    known = [
      name for name in (text, tfrecord.named_by(text, label)) if name in label_of
    ]
    if not known:
      raise errors.DataError(
        f"{walked.name} has label {label} ({text or 'no text'}), which "
        f"{manifest.MANIFEST_NAME} does not have; add --manifest --overwrite"
      )
    labels[label] = label_of[known[0]]
  rows = _with_labels(walked.rows, labels)
  return dataclasses.replace(walked, rows=rows)


def _described(walked: scan.Walked, labels: Mapping[int, int]) -> manifest.Shard:
  """Returns the manifest's entry of a shard, with new labels by old ones."""
  index = shard_index.to_bytes(_with_labels(walked.rows, labels))
  return manifest.Shard(
    name=walked.name,
    records=len(walked.rows),
    bytes=walked.size,
    crc32c=walked.crc32c,
    index_name=shard_index.index_name(walked.name),
    index_crc32c=storage.crc32c_of(index),
  )


def _with_labels(rows: np.ndarray, labels: Mapping[int, int]) -> np.ndarray:
  """Returns INDEX_DTYPE[records] with new labels by old ones."""
  old, places = np.unique(rows["label"], return_inverse=True)
  new = np.array([labels[label] for label in old.tolist()], rows["label"].dtype)
  changed = rows.copy()
  changed["label"] = new[places]
  return changed


def _place(split: str) -> tuple[int, str]:
  """Returns the key by which splits are sorted."""
  known = _SPLITS.index(split) if split in _SPLITS else len(_SPLITS)
  return known, split


def _pairs(folder: str) -> manifest.Pairs | None:
  """Describes the pairs of a verification set, if there are any."""
  path = storage.join(folder, manifest.PAIRS_NAME)
  if not storage.exists(path):
    return None
  content = storage.read_bytes(path)
  try:
    pairs = np.load(io.BytesIO(content), allow_pickle=False)
    folds = int(pairs[:, 3].max()) + 1
  except (ValueError, EOFError, IndexError) as error:
    storage.refuse_kind(content, path)
    raise errors.DataError(f"{path} holds no pairs ({error}); build again.") from error
  return manifest.Pairs(
    manifest.PAIRS_NAME, len(pairs), folds, storage.crc32c_of(content)
  )
