"""Images of shards to embed, in their order, a shard after the other.

Shards of a bucket come ahead of time and are let go when they have been read, so the
cache need not hold the set.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator

import numpy as np

from facedist import errors
from facedist.data import damage, images, indexes, manifest, open_files, reader, records
from facedist.data.sources import Face, Loader, Unreadable
from facedist.data.staging import StagedSet


@dataclasses.dataclass(frozen=True)
class _Shard:
  """An open shard.

  Attributes:
    path: Where the user has it.
    number: Its number in the split.
    file: It, kept for as long as a loader needs it.
    copies: Where another copy of it comes from; none where it is read in its place.
  """

  path: str
  number: int
  file: open_files.OpenFile
  copies: open_files.RemoteFiles | None


def loaders(data: StagedSet, split: str, *, image_size: int) -> Iterator[Loader]:
  """Yields a loader for each record of a split, with the path that the record names.

  Where it names none, that is its shard and place there, as in `NAME.tfrecord/7`.
  The identity is the manifest's for the record's label, as a selection may rename.

  Raises:
    errors.DataError: There is no such split, or a shard or its index is missing or not
      the manifest's; where the set is local, before the first is yielded.
  """
  content = manifest.load(data.folder)
  load = functools.partial(
    indexes.load_labelled, data.folder, num_identities=content.num_identities
  )
  shards = content.split(split, data.folder).shards
  copies = data.files(split)
  files = copies or reader.open_shards(data.folder, shards)
  if copies is None:
    for described in shards:
      load(described)
    for number in range(len(shards)):
      files.get(number)
  data.follow_shards(split)
  done = 0
  for number, described in enumerate(shards):
    path = copies.source(number) if copies else described.path(data.folder)
    shard = _Shard(path, number, files.get(number), copies)
    for place, row in enumerate(load(described)):
      data.reached(done + place)
      yield functools.partial(
        _load,
        shard,
        place,
        identity=content.identities[row["label"]],
        offset=int(row["offset"]),
        length=int(row["length"]),
        image_size=image_size,
      )
    done += described.records
    del shard  # the next one may need its room


def _load(
  shard: _Shard,
  number: int,
  *,
  identity: str,
  offset: int,
  length: int,
  image_size: int,
) -> Face | Unreadable:
  """Reads one record of a shard; a damaged one goes by its place in the shard.

  Raises:
    errors.DataError: The shard was replaced since it was opened.
  """
  file = shard.file
  while True:
    try:
      content = os.pread(file.descriptor, length, offset)
      record = records.parse(records.unframe(content))
      image = np.empty((image_size, image_size, 3), np.uint8)
      images.decode_record(record.jpeg, image)
      name = record.filename or f"{os.path.basename(shard.path)}/{number}"
      return Face(name, identity, image)
    except (OSError, errors.DataError) as error:
      if shard.copies is None:
        damage.check_unchanged(shard.path, file.token)
      elif shard.copies.renew(shard.number):
        file = shard.copies.get(shard.number)
        continue
      place = f"{os.path.basename(shard.path)}, record {number} at byte {offset}"
      return Unreadable(place, str(error))
