"""Folders of shards whose every record is chosen by hand, and how to read them back."""

from collections.abc import Mapping, Sequence

import numpy as np
import simplejpeg

from facedist.data import noise
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, tfrecord

SIZE = 16


def face(number: int) -> bytes:
  """Returns a JPEG of SIZE pixels that differs from that of any other number."""
  pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels, quality=90)


def write(
  folder: str,
  splits: Mapping[str, Sequence[tuple[str, int]]],
  *,
  num_shards: int = 2,
  **changes: object,
) -> manifest.Manifest:
  """Writes a training set.

  Args:
    folder: Where it goes.
    splits: The records of each split in order, as identity and number of the face.
    num_shards: Shards of each split.
    **changes: Other fields of the manifest.
  """
  identities = tuple(sorted({name for faces in splits.values() for name, _ in faces}))
  written = {}
  for split, faces in splits.items():
    content = [
      tfrecord.Record(
        face(number), identities.index(name), name, f"{name}/{number}.jpg"
      )
      for name, number in faces
    ]
    written[split] = noise.write_split(folder, split, content, num_shards=num_shards)
  fields: dict[str, object] = {
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
  made = manifest.Manifest(**(fields | changes))  # type: ignore[arg-type]
  manifest.save(made, folder)
  return made


def read(folder: str, split: str = "train") -> list[tuple[str, int]]:
  """Returns identity and number of the face of each record, as training reads them."""
  opened = local_reader.open_reader(folder, split)
  jpegs, labels = opened.read(np.arange(opened.num_records))
  number_of = {face(number): number for number in range(100)}
  names = opened.manifest.identities
  return [
    (names[label], number_of[jpeg]) for jpeg, label in zip(jpegs, labels, strict=True)
  ]
