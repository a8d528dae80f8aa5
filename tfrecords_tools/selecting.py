"""A selection in the making: the table of all records, and what is written of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

import facedist
from facedist import errors, storage
from facedist.data import manifest, shard_index
from tfrecords_tools import merging, origins, selection


@dataclasses.dataclass
class Table:
  """Every record of the inputs: first all of train, then all of val.

  Attributes:
    parts: The shards, in the records' order.
    names: All identities, sorted; the place is a record's label here.
    labels: int32[records], LEFT_OUT for those that are out.
    left_out: How many records each rule has left out, in the order of the rules.
  """

  parts: Sequence[merging.Part]
  names: tuple[str, ...]
  labels: np.ndarray
  left_out: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def num_train(self) -> int:
    """Number of records of train."""
    return sum(part.shard.records for part in self.parts if part.split == "train")

  def leave_out(self, gone: np.ndarray, rule: str) -> None:
    """Takes records out, bool[records], and counts them for the rule."""
    gone = gone & (self.labels != selection.LEFT_OUT)
    self.left_out[rule] = int(gone.sum())
    self.labels[gone] = selection.LEFT_OUT

  def keep_identities(self, minimum: int) -> None:
    """Takes out identities with fewer images, or with none in train."""
    stays = selection.keep_at_least(
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
    seen = dict.fromkeys((part.source.folder for part in self.parts), 0)
    for part in self.parts:
      if part.split != "train":
        continue
      if seed is None:
        first = seen[part.source.folder]
        seen[part.source.folder] += part.shard.records
        drawn.append(np.arange(first, first + part.shard.records, dtype=np.uint64))
      else:
        drawn.append(selection.draws(seed, part.shard.crc32c, part.rows()["offset"]))
    stays = selection.keep_at_most(
      self.labels[: self.num_train],
      np.concatenate(drawn),
      num_identities=len(self.names),
      maximum=maximum,
    )
    gone = np.zeros(len(self.labels), bool)
    gone[: self.num_train] = ~stays
    self.leave_out(gone, f"--max_images_per_identity={maximum}")


def open_table(
  inputs: Sequence[merging.Input],
  parts: Sequence[merging.Part],
  *,
  lists: Mapping[str, set[str]],
) -> Table:
  """Reads the labels of all records and applies the lists of identities.

  Args:
    inputs: The folders.
    parts: Their shards.
    lists: Lines of `identities` and of `exclude_identities`, where given.

  Raises:
    errors.DataError: An index is missing or damaged.
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
      named = selection.listed(source.names, source.manifest.identities, lines)
      gone = (named == (flag == "exclude_identities")) & (labels != selection.LEFT_OUT)
      labels[gone] = selection.LEFT_OUT
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


def write(
  table: Table,
  inputs: Sequence[merging.Input],
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
    folders: Of `origins.describe`, for the manifest.

  Raises:
    errors.DataError: No record of train is left.
  """
  kept = np.zeros(len(table.names), bool)
  kept[table.labels[table.labels != selection.LEFT_OUT]] = True
  if not kept.any():
    raise errors.DataError(
      "--input_dirs: no image is left for train "
      f"({'; '.join(f'{rule}: {count:,}' for rule, count in table.left_out.items())}); "
      "loosen a rule."
    )
  names = tuple(name for name, stays in zip(table.names, kept, strict=True) if stays)
  splits = _write_splits(table, selection.renumber(table.labels, kept), output_dir)
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


def _people(inputs: Sequence[merging.Input], names: Sequence[str]) -> dict[str, str]:
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
  for split in merging.SPLITS:
    chosen = [
      (part, new)
      for part, new in zip(table.parts, stays, strict=True)
      if part.split == split and (new != selection.LEFT_OUT).any()
    ]
    shards = []
    for number, (part, new) in enumerate(chosen):
      rows = part.rows()
      rows["label"] = new
      content = shard_index.to_bytes(rows[new != selection.LEFT_OUT])
      name = shard_index.index_name(shard_index.shard_name(split, number, len(chosen)))
      storage.write_bytes(storage.join(output_dir, name), content)
      shards.append(
        manifest.Shard(
          name=part.shard.name,
          records=int((new != selection.LEFT_OUT).sum()),
          bytes=part.shard.bytes,
          crc32c=part.shard.crc32c,
          index_name=name,
          index_crc32c=storage.crc32c_of(content),
          folder=origins.location(part.path, output_dir),
        )
      )
    if shards:
      count = sum(shard.records for shard in shards)
      splits[split] = manifest.Split(count, tuple(shards))
  return splits


def _warn_of_unknown(
  inputs: Sequence[merging.Input], lists: Mapping[str, set[str]]
) -> None:
  """Names what a list has and no input does."""
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
