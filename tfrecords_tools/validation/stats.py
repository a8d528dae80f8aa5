"""Statistics of a set: images by identity and by size, from its indexes alone."""

import dataclasses
import math
from typing import Any

import numpy as np

from facedist.data.shards import manifest
from tfrecords_tools.validation import scan

_LARGEST_COUNTED = 1 << 20  # bytes; larger JPEGs count as this large in quantiles
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What a set's indexes say.

  Attributes:
    images: int64[identities], images of each over all splits.
    by_size: int64[...], number of images by their JPEG's bytes.
    jpeg_bytes: Bytes of all JPEGs.
  """

  images: np.ndarray
  by_size: np.ndarray
  jpeg_bytes: int

  @property
  def num_images(self) -> int:
    """Images of all identities."""
    return int(self.images.sum())

  def size_quantile(self, share: float) -> int:
    """Returns the bytes that so large a share of the JPEGs does not exceed."""
    reached = np.cumsum(self.by_size) >= share * self.by_size.sum()
    return int(np.argmax(reached))


def collect(folder: str, made: manifest.Manifest) -> Statistics:
  """Reads all indexes, one by one.

  Raises:
    errors.DataError: An index is missing, corrupt or not the manifest's.
  """
  images = np.zeros(made.num_identities, np.int64)
  by_size = np.zeros(_LARGEST_COUNTED + 1, np.int64)
  total = 0
  for one in scan.walk_index(folder, made):
    images += np.bincount(one.rows["label"], minlength=len(images))
    sizes = np.minimum(one.rows["image_length"], _LARGEST_COUNTED)
    by_size += np.bincount(sizes, minlength=len(by_size))
    total += int(one.rows["image_length"].sum(dtype=np.int64))
  return Statistics(images, by_size, total)


def edges(values: np.ndarray, most: int) -> np.ndarray:
  """Returns the edges of at most `most` bins of whole numbers that hold all values.

  Bins hold equally many numbers, so that a higher bar is of more frequent ones; where
  few values are far above the others, each holds twice as many as the one before, or
  another power of two.

  Args:
    values: int64[n], not empty, none negative.
    most: Number of bins, at least 2.

  Returns:
    int64[bins + 1]; a bin holds its lower edge and not its upper one.
  """
  low, high = int(values.min()), int(values.max()) + 1
  is_skewed = high - low > most and high > 20 * max(np.median(values), 1)
  if not is_skewed:
    step = -(-(high - low) // most)
    return np.arange(low, high + step, step)
  zero = [0] if low == 0 else []
  doublings = math.ceil(math.log2(high / max(low, 1)))
  each = -(-doublings // (most - len(zero)))  # doublings that a bin holds
  bins = -(-doublings // each)
  return np.array(zero + [max(low, 1) << each * place for place in range(bins + 1)])


def summarize(made: manifest.Manifest, found: Statistics) -> dict[str, Any]:
  """Returns all that is said of a set, but for the images of each identity, as JSON."""
  present = found.images[found.images > 0]
  return {
    "kind": made.kind,
    "dataset": made.dataset,
    "fingerprint": made.fingerprint,
    "settings": settings_of(made),
    "splits": {
      name: {
        "records": split.records,
        "shards": len(split.shards),
        "bytes": sum(shard.bytes for shard in split.shards),
      }
      for name, split in made.splits.items()
    },
    "image_size": made.image_size,
    "jpeg_bytes": {
      "total": found.jpeg_bytes,
      "mean": found.jpeg_bytes / max(found.num_images, 1),
      "quantiles": {str(share): found.size_quantile(share) for share in QUANTILES},
    },
    "num_identities": made.num_identities,
    "identities_without_images": int((found.images == 0).sum()),
    "images_of_an_identity": {
      "least": int(present.min()) if len(present) else 0,
      "median": float(np.median(present)) if len(present) else 0.0,
      "mean": float(present.mean()) if len(present) else 0.0,
      "most": int(found.images.max(initial=0)),
    },
    "pairs": dataclasses.asdict(made.pairs) if made.pairs else None,
    "skipped": len(made.skipped),
  }


def settings_of(made: manifest.Manifest) -> dict[str, Any]:
  """Returns what decided the content, flat: `source.seed` and the like."""
  flat: dict[str, Any] = {
    name: getattr(made, name)
    for name in ("kind", "dataset", "tool_version", "image_size", "quality")
  }
  for group in ("alignment", "source", "selection"):
    _flatten(group, getattr(made, group), flat)
  return flat


def _flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
  """Adds a value, or those in an object by their dotted names, to `flat`."""
  if isinstance(value, dict) and value:
    for key, inner in value.items():
      _flatten(f"{name}.{key}", inner, flat)
  elif value is not None:
    flat[name] = value
