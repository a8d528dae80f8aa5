"""Shards of a few small random patterns."""

import os
from collections.abc import Sequence

from facedist.data import noise
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files


def write(
  folder: str | os.PathLike[str],
  *,
  identities: int,
  images: int,
  val_images: int = 0,
  size: int = 16,
  shards: int = 1,
  seed: int = 0,
) -> manifest.Manifest:
  """Writes a classification set; `images` and `val_images` count those of each."""
  return noise.write_noise_shards(
    str(folder),
    num_identities=identities,
    images_per_identity=images,
    val_images_per_identity=val_images,
    image_size=size,
    num_shards=shards,
    seed=seed,
  )


def write_jpegs(
  folder: str | os.PathLike[str], jpegs: Sequence[bytes], *, size: int
) -> None:
  """Writes JPEGs, whatever they are, as a set whose manifest says `size`."""
  content = write(folder, identities=1, images=1, size=size)
  records = [tfrecord.Record(jpeg, 0, "n0", "n0/0.jpg") for jpeg in jpegs]
  content.splits["train"] = noise.write_split(
    str(folder), "train", records, num_shards=1
  )
  manifest.save(content, str(folder))


def corrupt(folder: str, split: str, *records: int) -> None:
  """Flips a bit in the image of each of these records, local or in a bucket."""
  first = 0
  for shard in manifest.load(folder).splits[split].shards:
    for record, row in enumerate(shard_index.open_index(folder, shard), first):
      if record in records:
        place = int(row["offset"]) + int(row["image_offset"]) + 9
        files.flip_byte(shard.path(folder), place)
    first += shard.records
