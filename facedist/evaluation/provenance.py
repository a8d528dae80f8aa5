"""What a score was computed from and with, for its row of `metrics.jsonl`.

Two results can differ only where their provenance does, see `explain`. Hashes are
CRC-32C as eight hex digits, as in manifests and checkpoints.
"""

import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import numpy as np

from facedist import __version__, storage
from facedist.evaluation.embedder import Batch

_EMBEDDINGS_AT_ONCE = 4096


class PixelChecksum:
  """The CRC-32C of all pixels of the images that pass through `over`, in their order.

  It takes 0.1 ms for an image of 112 x 112 pixels at most, while the network works.
  """

  def __init__(self) -> None:
    self._crc32c = 0

  def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yields the same batches."""
    for images, names in batches:
      self._crc32c = storage.extend_crc32c(self._crc32c, images.tobytes())
      yield images, names

  def text(self) -> str:
    """Returns eight hex digits; of the images that have passed so far."""
    return f"{self._crc32c:08x}"


def pairs_crc32c(
  first: np.ndarray, second: np.ndarray, same: np.ndarray, folds: np.ndarray
) -> str:
  """Returns the hash of a list of pairs: int32[pairs, 4] of these columns, in C order.

  Args:
    first: int[pairs], number of each pair's first image.
    second: int[pairs], number of its second image.
    same: bool[pairs].
    folds: int[pairs].
  """
  table = np.stack([first, second, same, folds], axis=1).astype("<i4")
  return f"{storage.crc32c_of(table.tobytes()):08x}"


def identities_crc32c(labels: np.ndarray | None) -> str | None:
  """Returns the hash of int[images] labels as int32; None where none are known."""
  if labels is None:
    return None
  return f"{storage.crc32c_of(labels.astype('<i4').tobytes()):08x}"


def groups_crc32c(groups: np.ndarray | None) -> str | None:
  """Returns the hash of str[images] groups, a line each; None without groups."""
  if groups is None:
    return None
  return f"{storage.crc32c_of(chr(10).join(groups).encode()):08x}"


def embeddings_crc32c(embeddings: np.ndarray) -> str:
  """Returns the hash of float32[images, embedding] embeddings, block by block."""
  crc32c = 0
  for start in range(0, len(embeddings), _EMBEDDINGS_AT_ONCE):
    some = embeddings[start : start + _EMBEDDINGS_AT_ONCE].astype("<f4")
    crc32c = storage.extend_crc32c(crc32c, some.tobytes())
  return f"{crc32c:08x}"


def environment() -> dict[str, Any]:
  """Returns `versions` of what computes a score, and the `device` that embeds."""
  import tensorflow as tf  # the functions above do without it

  gpus = tf.config.list_physical_devices("GPU")
  details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
  return {
    "versions": {
      "facedist": __version__,
      "tensorflow": tf.__version__,
      "python": platform.python_version(),
      "numpy": np.__version__,
      "simplejpeg": metadata.version("simplejpeg"),  # decodes the images
    },
    "device": details.get("device_name", "GPU") if gpus else "CPU",
  }
