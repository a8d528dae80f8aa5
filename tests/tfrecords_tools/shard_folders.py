"""Folders of shards whose every record is chosen by hand, and how to read them back."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg

from facedist.data import noise
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, tfrecord

SIZE = 16


def face(number: int) -> bytes:
  """Returns a JPEG of SIZE pixels, another for each number."""
  pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels, quality=90)


def write(
  folder: str | os.PathLike[str],
  splits: Mapping[str, Sequence[tuple[str, int]]],
  *,
  num_shards: int = 2,
  **changes: Any,
) -> str:
  """Writes a training set, of each split (identity, number of the face) in order."""
  identities = tuple(sorted({name for faces in splits.values() for name, _ in faces}))
  written = {}
  for split, faces in splits.items():
    content = [
      tfrecord.Record(
        face(number), identities.index(name), name, f"{name}/{number}.jpg"
      )
      for name, number in faces
    ]
    written[split] = noise.write_split(
      str(folder), split, content, num_shards=num_shards
    )
  fields: dict[str, Any] = {
    "kind": "classification",
    "dataset": "vggface2",
    "tool_version": "1.0",
    "image_size": SIZE,
    "quality": 90,
    "alignment": {"template": "arcface", "images": {}},
    "source": {},
    "identities": identities,
    "identity_names": {},
    "splits": written,
  }
  manifest.save(manifest.Manifest(**(fields | changes)), str(folder))
  return str(folder)


def images(
  folder: str | os.PathLike[str], split: str = "train"
) -> list[tuple[str, bytes]]:
  """Returns identity and JPEG of each record, as training reads them."""
  opened = local_reader.open_reader(str(folder), split)
  jpegs, labels = opened.read(np.arange(opened.num_records))
  names = opened.manifest.identities
  return [(names[label], bytes(one)) for one, label in zip(jpegs, labels, strict=True)]


def read(folder: str | os.PathLike[str], split: str = "train") -> list[tuple[str, int]]:
  """Returns identity and number of the face of each record."""
  number_of = {face(number): number for number in range(100)}
  return [(name, number_of[jpeg]) for name, jpeg in images(folder, split)]
