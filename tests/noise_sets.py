"""Shards of a few small random patterns."""

import os

from facedist.data import noise
from facedist.data.shards import manifest


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
