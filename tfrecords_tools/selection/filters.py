"""Chooses the records of a selection: rules over a table of all records.

A label of LEFT_OUT marks a record that is out. Memory for each record is 16 bytes for
labels and counts, 60 while images are drawn and 40 while duplicates are searched.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

import facedist
from facedist import errors, storage
from facedist.data import hashing
from facedist.data.shards import manifest, shard_index
from tfrecords_tools.selection import merge

LEFT_OUT = -1
ACROSS = ("drop_all", "keep_first")
"""What becomes of copies under different identities."""


def listed(names: tuple[str, ...], own: tuple[str, ...], lines: set[str]) -> np.ndarray:
  """Says which identities a list names, by the selection's name or by their own.

  Args:
    names: What the selection calls each identity.
    own: What the input calls it.
    lines: The list.

  Returns:
    bool[identities].
  """
  pairs = zip(names, own, strict=True)
  return np.array([name in lines or old in lines for name, old in pairs], bool)


def draws(seed: int, shard: int, offsets: np.ndarray) -> np.ndarray:
  """Returns a number for each record that looks random.

  It depends on the seed and on the record alone, so an image that is kept stays so
  when others come or go.

  Args:
    seed: Any integer.
    shard: CRC-32C of the shard's file.
    offsets: uint64[records], bytes of the shard at which they start.

  Returns:
    uint64[records].
  """
  state = np.full(1, ((seed << 32) + shard) % 2**64, np.uint64)
  return hashing.finalize(hashing.mix(state) + offsets.astype(np.uint64))


def keep_at_least(
  labels: np.ndarray, *, num_train: int, num_identities: int, minimum: int
) -> np.ndarray:
  """Leaves out identities with too few images, or with none to train on.

  Args:
    labels: int32[records], LEFT_OUT for those that are out already.
    num_train: The first so many records are train's, the others val's.
    num_identities: Labels are below it.
    minimum: Images, those of train and val together.

  Returns:
    bool[identities], true for those that stay.
  """
  counts = _counts(labels, num_identities)
  train_counts = _counts(labels[:num_train], num_identities)
  return (counts >= minimum) & (train_counts > 0)


def keep_at_most(
  labels: np.ndarray, drawn: np.ndarray, *, num_identities: int, maximum: int
) -> np.ndarray:
  """Keeps of each identity the images with the smallest draws.

  Args:
    labels: int32[records] of train, LEFT_OUT for those that are out already.
    drawn: uint64[records] from `draws`.
    num_identities: Labels are below it.
    maximum: Images of an identity.

  Returns:
    bool[records], true for those that stay.
  """
  counts = _counts(labels, num_identities)
  crowded = np.append(counts > maximum, False)  # the last place is LEFT_OUT's
  candidates = np.flatnonzero(crowded[labels])
  order = candidates[np.lexsort((drawn[candidates], labels[candidates]))]
  _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
  rank = np.arange(len(order)) - np.repeat(first, sizes)
  stays = labels != LEFT_OUT
  stays[order[rank >= maximum]] = False
  return stays


def renumber(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns labels without gaps, in the same order; LEFT_OUT where not kept.

  Args:
    labels: int32[records].
    kept: bool[identities].
  """
  new = np.append(np.cumsum(kept, dtype=np.int32) - 1, LEFT_OUT).astype(np.int32)
  new[:-1][~kept] = LEFT_OUT
  return new[labels]


def _counts(labels: np.ndarray, num_identities: int) -> np.ndarray:
  """Returns int64[identities], images of each."""
  return np.bincount(labels[labels != LEFT_OUT], minlength=num_identities)


@dataclasses.dataclass
class Table:
  """Every record of the inputs: first all of train, then all of val.

  Attributes:
    parts: The shards, in the records' order.
    names: All identities, sorted; the place is a record's label here.
    labels: int32[records], LEFT_OUT for those that are out.
    left_out: How many records each rule has left out, in the order of the rules.
  """

  parts: Sequence[merge.MergePart]
  names: tuple[str, ...]
  labels: np.ndarray
  left_out: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def num_train(self) -> int:
    """Number of records of train."""
    return sum(part.shard.records for part in self.parts if part.split == "train")

  def leave_out(self, gone: np.ndarray, rule: str) -> None:
    """Takes records out, bool[records], and counts them for the rule."""
    gone = gone & (self.labels != LEFT_OUT)
    self.left_out[rule] = int(gone.sum())
    self.labels[gone] = LEFT_OUT

  def keep_identities(self, minimum: int) -> None:
    """Takes out identities with fewer images, or with none in train."""
    stays = keep_at_least(
      self.labels,
      num_train=self.num_train,
      num_identities=len(self.names),
      minimum=minimum,
    )
    gone = ~np.append(stays, True)[self.labels]
    self.leave_out(gone, f"--min_images_per_identity={minimum}")

  def keep_images(self, maximum: int, *, seed: int | None) -> None:
    """Takes out images of train past so many of an identity.

    Args:
      maximum: Images of an identity that stay.
      seed: Decides which; None takes those that come first in their input's shards.
        A build lays images in an order drawn by its seed and takes the first too.
    """
    drawn = [np.zeros(0, np.uint64)]
    first_of = dict.fromkeys((part.source.folder for part in self.parts), 0)
    for part in self.parts:
      if part.split != "train":
        continue
      if seed is None:
        first = first_of[part.source.folder]
        first_of[part.source.folder] += part.shard.records
        drawn.append(np.arange(first, first + part.shard.records, dtype=np.uint64))
      else:
        drawn.append(draws(seed, part.shard.crc32c, part.rows()["offset"]))
    stays = keep_at_most(
      self.labels[: self.num_train],
      np.concatenate(drawn),
      num_identities=len(self.names),
      maximum=maximum,
    )
    gone = np.zeros(len(self.labels), bool)
    gone[: self.num_train] = ~stays
    self.leave_out(gone, f"--max_images_per_identity={maximum}")


def open_table(
  inputs: Sequence[merge.MergeInput],
  parts: Sequence[merge.MergePart],
  *,
  lists: Mapping[str, set[str]],
) -> Table:
  """Reads the labels of all records and applies the lists of identities.

  Args:
    inputs: The folders.
    parts: Their shards.
    lists: Lines of `identities` and of `exclude_identities`, where given.

  Raises:
    errors.DataError: An index is missing or corrupt.
  """
  names = tuple(sorted({name for source in inputs for name in source.names}))
  place = {name: label for label, name in enumerate(names)}
  label_of: dict[str, np.ndarray] = {}
  gone_by: dict[str, dict[str, np.ndarray]] = {}
  left_out = dict.fromkeys((f"--{flag}" for flag in lists), 0)
  for source in inputs:
    labels = np.array([place[name] for name in source.names], np.int32)
    gone_by[source.folder] = {}
    for flag, lines in lists.items():
      named = listed(source.names, source.manifest.identities, lines)
      gone = (named == (flag == "exclude_identities")) & (labels != LEFT_OUT)
      labels[gone] = LEFT_OUT
      gone_by[source.folder][f"--{flag}"] = gone
    label_of[source.folder] = labels
  _warn_of_unknown(inputs, lists)
  columns = [np.zeros(0, np.int32)]
  for part in parts:
    own = part.rows()["label"]
    columns.append(label_of[part.source.folder][own])
    for rule, gone in gone_by[part.source.folder].items():
      left_out[rule] += int(gone[own].sum())
  return Table(parts, names, np.concatenate(columns), left_out)


def write_selection(
  table: Table,
  inputs: Sequence[merge.MergeInput],
  *,
  output_dir: str,
  source: dict[str, Any],
  folders: dict[str, Any],
) -> manifest.Manifest:
  """Writes an index for each shard that has records left; returns the manifest.

  Args:
    table: What is selected.
    inputs: The folders it comes from.
    output_dir: Where the indexes go.
    source: The settings, for the manifest.
    folders: Of `merge.origins_of`, for the manifest.

  Raises:
    errors.DataError: No record of train is left.
  """
  kept = np.zeros(len(table.names), bool)
  kept[table.labels[table.labels != LEFT_OUT]] = True
  if not kept.any():
    raise errors.DataError(
      "--input_dirs: no image is left for train "
      f"({'; '.join(f'{rule}: {count:,}' for rule, count in table.left_out.items())}); "
      "loosen a rule."
    )
  names = tuple(name for name, stays in zip(table.names, kept, strict=True) if stays)
  splits = _write_splits(table, renumber(table.labels, kept), output_dir)
  used = {shard.folder for split in splits.values() for shard in split.shards}
  first = inputs[0].manifest
  datasets = sorted({each.manifest.dataset for each in inputs})
  return manifest.Manifest(
    kind=first.kind,
    dataset="+".join(datasets),
    tool_version=facedist.__version__,
    image_size=first.image_size,
    quality=min(each.manifest.quality for each in inputs),
    alignment={"template": first.aligned_by},
    source=source,
    identities=names,
    identity_names=_people(inputs, names),
    splits=splits,
    selection={
      "folders": {name: folders[name] for name in folders if name in used},
      "left_out": table.left_out,
    },
  )


def _people(inputs: Sequence[merge.MergeInput], names: Sequence[str]) -> dict[str, str]:
  """Returns the people's names, where known, by the selection's identities."""
  people = {}
  for each in reversed(inputs):  # the first input's name counts
    known = each.manifest.identity_names
    for own, name in zip(each.manifest.identities, each.names, strict=True):
      if own in known:
        people[name] = known[own]
  return {name: people[name] for name in names if name in people}


def _write_splits(
  table: Table, labels: np.ndarray, output_dir: str
) -> dict[str, manifest.Split]:
  """Writes the indexes; labels are int32[records], LEFT_OUT where not kept."""
  stays = np.split(labels, np.cumsum([part.shard.records for part in table.parts])[:-1])
  splits = {}
  for split in merge.SPLITS:
    chosen = [
      (part, new)
      for part, new in zip(table.parts, stays, strict=True)
      if part.split == split and (new != LEFT_OUT).any()
    ]
    shards = []
    for number, (part, new) in enumerate(chosen):
      rows = part.rows()
      rows["label"] = new
      content = shard_index.to_bytes(rows[new != LEFT_OUT])
      name = shard_index.index_name(shard_index.shard_name(split, number, len(chosen)))
      storage.write_bytes(storage.join(output_dir, name), content)
      shards.append(
        manifest.Shard(
          name=part.shard.name,
          records=int((new != LEFT_OUT).sum()),
          bytes=part.shard.bytes,
          crc32c=part.shard.crc32c,
          index_name=name,
          index_crc32c=storage.crc32c_of(content),
          folder=merge.location(part.path, output_dir),
        )
      )
    if shards:
      count = sum(shard.records for shard in shards)
      splits[split] = manifest.Split(count, tuple(shards))
  return splits


def _warn_of_unknown(
  inputs: Sequence[merge.MergeInput], lists: Mapping[str, set[str]]
) -> None:
  """Warns of identities that a list names and no input has."""
  for flag, lines in lists.items():
    unknown = set(lines)
    for each in inputs:
      unknown.difference_update(each.names, each.manifest.identities)
    if unknown:
      logging.warning(
        "--%s lists %d identities that no input has, such as %s",
        flag,
        len(unknown),
        min(unknown),
      )
