"""Shards of random patterns: input for dry runs, benchmarks and tests.

An identity is a pattern of coloured waves; its images differ by brightness and pixel
noise, so that a small network can learn them.
"""

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg

from facedist import __version__, storage
from facedist.data.shards import manifest, shard_index, tfrecord

_QUALITY = 90
_WAVES = 3


def write_noise_shards(
  folder: str,
  *,
  num_identities: int,
  images_per_identity: int,
  val_images_per_identity: int,
  image_size: int,
  num_shards: int,
  seed: int,
) -> manifest.Manifest:
  """Writes a classification set; the same arguments give the same bytes.

  Args:
    folder: Where the shards go.
    num_identities: Number of classes.
    images_per_identity: Images of each in the split train.
    val_images_per_identity: Images of each in the split val; 0 leaves val out.
    image_size: Height and width in pixels.
    num_shards: Shards of the split train; val has one.
    seed: Any non-negative integer.
  """
  names = tuple(f"noise{identity:06d}" for identity in range(num_identities))
  splits = {}
  for split, first, images, shards in (
    ("train", 0, images_per_identity, num_shards),
    ("val", images_per_identity, val_images_per_identity, 1),
  ):
    content = [
      _record(identity, image, image_size=image_size, seed=seed)
      for image in range(first, first + images)
      for identity in range(num_identities)
    ]
    if content:
      splits[split] = write_split(folder, split, content, num_shards=shards)
  result = _manifest(
    "classification", image_size, seed=seed, identities=names, splits=splits
  )
  manifest.save(result, folder)
  return result


def write_noise_verification_set(
  folder: str, *, num_pairs: int, folds: int, image_size: int, seed: int
) -> manifest.Manifest:
  """Writes a verification set, alternating pairs of one identity and of two.

  Args:
    folder: Where the shard and the pairs go.
    num_pairs: Number of pairs, at least `folds`.
    folds: Number of folds, of nearly equal size.
    image_size: Height and width in pixels.
    seed: Any non-negative integer; the patterns are not those of a training set's.
  """
  pair = np.arange(num_pairs)
  same = (pair + 1) % 2
  fold = pair * folds // num_pairs
  pairs = np.stack([2 * pair, 2 * pair + 1, same, fold], axis=1).astype(np.int32)
  content = []
  for number in range(num_pairs):
    first = number + number // 2  # a pair of one identity and one of two make three
    for image, identity in enumerate((first, first + 1 - int(same[number]))):
      content.append(
        _record(identity, image, image_size=image_size, seed=seed + (1 << 32))
      )
  splits = {"images": write_split(folder, "images", content, num_shards=1)}
  names = tuple(
    f"noise{identity:06d}" for identity in range(num_pairs + num_pairs // 2)
  )
  result = _manifest(
    "verification",
    image_size,
    seed=seed,
    identities=names,
    splits=splits,
    pairs=_save_pairs(folder, pairs),
  )
  manifest.save(result, folder)
  return result


def write_split(
  folder: str, split: str, content: Sequence[tfrecord.Record], *, num_shards: int
) -> manifest.Split:
  """Writes records as they come into shards of nearly equal counts, with indexes."""
  bounds = [len(content) * shard // num_shards for shard in range(num_shards + 1)]
  shards = []
  for shard in range(num_shards):
    name = shard_index.shard_name(split, shard, num_shards)
    data, index = _encode(content[bounds[shard] : bounds[shard + 1]])
    storage.write_bytes(storage.join(folder, name), data)
    index_name = shard_index.index_name(name)
    storage.write_bytes(storage.join(folder, index_name), index)
    shards.append(
      manifest.Shard(
        name=name,
        records=bounds[shard + 1] - bounds[shard],
        bytes=len(data),
        crc32c=storage.crc32c_of(data),
        index_name=index_name,
        index_crc32c=storage.crc32c_of(index),
      )
    )
  return manifest.Split(len(content), tuple(shards))


def _encode(content: Sequence[tfrecord.Record]) -> tuple[bytes, bytes]:
  """Returns a shard's bytes and its index's."""
  framed, rows, offset = [], [], 0
  for record in content:
    framed.append(tfrecord.frame(tfrecord.serialize(record)))
    place = framed[-1].index(record.jpeg)
    rows.append((offset, len(framed[-1]), place, len(record.jpeg), record.label))
    offset += len(framed[-1])
  index = np.array(rows, shard_index.INDEX_DTYPE)
  return b"".join(framed), shard_index.to_bytes(index)


def _record(
  identity: int, image: int, *, image_size: int, seed: int
) -> tfrecord.Record:
  """Draws one image of one identity."""
  name = f"noise{identity:06d}"
  rng = np.random.default_rng([seed, identity])
  frequencies = rng.integers(-3, 4, (_WAVES, 2))
  phases = rng.uniform(0, 2 * np.pi, _WAVES)
  colours = rng.uniform(-60, 60, (_WAVES, 3))
  place = np.linspace(0, 2 * np.pi, image_size)
  angles = (
    frequencies[:, 0, None, None] * place[:, None]
    + frequencies[:, 1, None, None] * place
    + phases[:, None, None]
  )
  pattern = np.einsum("wyx,wc->yxc", np.cos(angles), colours)
  rng = np.random.default_rng([seed, identity, image + 1])
  pixels = 128 + pattern + rng.uniform(-20, 20) + rng.normal(0, 8, pattern.shape)
  pixels = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
  jpeg = simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorsubsampling="420")
  return tfrecord.Record(jpeg, identity, name, f"{name}/{image:04d}.jpg")


def _save_pairs(folder: str, pairs: np.ndarray) -> manifest.Pairs:
  """Writes int32[pairs, 4] of first record, second record, same, fold."""
  stream = io.BytesIO()
  np.save(stream, pairs, allow_pickle=False)
  storage.write_bytes(storage.join(folder, manifest.PAIRS_NAME), stream.getvalue())
  return manifest.Pairs(
    name=manifest.PAIRS_NAME,
    pairs=len(pairs),
    folds=int(pairs[:, 3].max()) + 1,
    crc32c=storage.crc32c_of(stream.getvalue()),
  )


def _manifest(
  kind: str,
  image_size: int,
  *,
  seed: int,
  identities: tuple[str, ...],
  splits: dict[str, manifest.Split],
  pairs: manifest.Pairs | None = None,
) -> manifest.Manifest:
  """Returns the manifest of a set of random patterns."""
  return manifest.Manifest(
    kind=kind,
    dataset="noise",
    tool_version=__version__,
    image_size=image_size,
    quality=_QUALITY,
    alignment={"method": "drawn"},
    source={"seed": seed},
    identities=identities,
    identity_names={},
    splits=splits,
    pairs=pairs,
  )
