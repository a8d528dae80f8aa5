"""The manifest of a build: its settings, its shards, and what was left out."""

import collections
import io
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

import facedist
from facedist import errors, storage
from facedist.data.shards import manifest
from tfrecords_tools.builder import options, plan, state
from tfrecords_tools.sources import base, drawn_pairs, tables


def describe_manifest(
  settings: options.BuildConfig, images: base.Source, shards: plan.Plan
) -> dict[str, Any]:
  """Returns everything that decides the shards' bytes, without any machine's path.

  OpenCV's version is included: another decoder or encoder may round differently.
  """
  splits = collections.Counter(shard.split for shard in shards.shards)
  described: dict[str, Any] = {
    "dataset": settings.dataset,
    "tool_version": facedist.__version__,
    "opencv": cv2.__version__,
    "image_size": settings.image_size,
    "quality": settings.quality,
    "margin": settings.margin,
    "images": shards.num_images,
    "identities": len(shards.identities),
    "shards": dict(splits),
    "input_crc32c": shards.checksum,
  }
  if images.contents is not None:
    described["contents_crc32c"] = f"{storage.crc32c_of(b''.join(images.contents)):08x}"
  if images.pairs is not None:
    checksum = storage.crc32c_of(_pairs_bytes(images.pairs))
    if settings.make_pairs is not None:
      described |= {"make_pairs": settings.make_pairs, "seed": settings.seed}
    return described | {"pairs_crc32c": f"{checksum:08x}"}
  described |= {"seed": settings.seed, "val_fraction": settings.val_fraction}
  if settings.identities is not None:
    lines = "\n".join(sorted(set(tables.read_lines(settings.identities))))
    checksum = storage.crc32c_of(lines.encode())
    described["identities_list_crc32c"] = f"{checksum:08x}"
  if settings.min_images_per_identity > 1:
    described["min_images_per_identity"] = settings.min_images_per_identity
  if settings.max_images_per_identity is not None:
    described["max_images_per_identity"] = settings.max_images_per_identity
  return described


def assemble(
  images: base.Source,
  shards: plan.Plan,
  *,
  finished: Mapping[str, state.FinishedShard],
  described: dict[str, Any],
  overlapping: tuple[str, ...] | None,
) -> manifest.Manifest:
  """Makes the manifest from what the shards hold.

  Raises:
    errors.DataError: No image of a split could be read.
  """
  methods: collections.Counter[str] = collections.Counter()
  skipped = list(images.skipped)
  by_split: dict[str, list[manifest.Shard]] = {}
  for planned in shards.shards:
    entry = finished[planned.name]
    methods.update(entry.methods)
    skipped.extend(entry.skipped)
    by_split.setdefault(planned.split, []).append(entry.shard)
  splits = {
    name: manifest.Split(sum(shard.records for shard in entries), tuple(entries))
    for name, entries in by_split.items()
  }
  if not all(split.records for split in splits.values()):
    raise errors.DataError(f"no image below {images.folder} could be read.")
  top = ("dataset", "tool_version", "image_size", "quality")
  origin = {name: value for name, value in described.items() if name not in top}
  origin |= _left_out(images, shards, described)
  if overlapping is not None:
    origin["lfw_overlap"] = list(overlapping)
  names = images.identity_names
  return manifest.Manifest(
    kind="classification" if images.pairs is None else "verification",
    **{name: described[name] for name in top},
    alignment={
      "template": manifest.main_alignment(methods),
      "images": dict(sorted(methods.items())),
    },
    source=origin,
    identities=shards.identities,
    identity_names={one: names[one] for one in shards.identities if one in names},
    splits=splits,
    pairs=_pairs_entry(images),
    skipped=tuple(sorted(skipped, key=lambda entry: entry["path"])),
  )


def save_manifest(
  made: manifest.Manifest, output_dir: str, *, images: base.Source
) -> None:
  """Writes the pairs, if there are any, and then the manifest."""
  if images.pairs_csv is not None:
    path = storage.join(output_dir, drawn_pairs.CSV_NAME)
    storage.write_bytes(path, images.pairs_csv)
  if images.pairs is not None:
    path = storage.join(output_dir, manifest.PAIRS_NAME)
    storage.write_bytes(path, _pairs_bytes(images.pairs))
  manifest.save(made, output_dir)


def _left_out(
  images: base.Source, shards: plan.Plan, described: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the excluded identities and how many images each rule left out, if any."""
  counts = dict(sorted(images.left_out.items()))  # a disk lists files in any order
  if (maximum := described.get("max_images_per_identity")) is not None:
    counts[f"--max_images_per_identity={maximum}"] = shards.num_over
  said = {"excluded_identities": sorted(images.excluded), "left_out": counts}
  return {name: value for name, value in said.items() if value}


def _pairs_entry(images: base.Source) -> manifest.Pairs | None:
  """Returns the manifest's entry for the pairs."""
  if images.pairs is None:
    return None
  return manifest.Pairs(
    name=manifest.PAIRS_NAME,
    pairs=len(images.pairs),
    folds=images.num_folds,
    crc32c=storage.crc32c_of(_pairs_bytes(images.pairs)),
  )


def _pairs_bytes(pairs: np.ndarray) -> bytes:
  """Returns the pairs file's content: int32[pairs, 4] as NumPy saves it."""
  stream = io.BytesIO()
  np.save(stream, pairs.astype("<i4", copy=False), allow_pickle=False)
  return stream.getvalue()
