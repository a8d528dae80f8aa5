"""Digits in MNIST's format: a file like Keras' mnist.npz, or scikit-learn's digits.

Each class is an identity, named by its number. A file's test images become the split
val; scikit-learn's 1,797 images of 8×8 pixels have no test images.
"""

import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from facedist import errors, storage
from tfrecords_tools.sources import base

KEYS = ("x_train", "y_train", "x_test", "y_test")
"""Arrays of the file: uint8[images, height, width], and whole numbers [images]."""
_TEST = "test"
_MAX_INK = 16  # scikit-learn's digits count ink from 0 to 16


def read_npz(path: str) -> base.Source:
  """Reads a file of four arrays as `KEYS` names them, local or in a bucket.

  Raises:
    errors.DataError: The file is missing or has other arrays.
  """
  found = _arrays(storage.read_bytes(path), path)
  labels = {
    part: _checked(found[f"x_{part}"], found[f"y_{part}"], part=part, origin=path)
    for part in ("train", _TEST)
  }
  unknown = np.setdiff1d(labels[_TEST], labels["train"])
  if len(unknown):
    raise errors.DataError(
      f"{path}: y_test has the class {unknown[0]}, which y_train has not; remove its "
      "images or add some to x_train."
    )
  images = {part: found[f"x_{part}"] for part in labels}
  return _source(path, images, labels)


def _arrays(content: bytes, path: str) -> dict[str, np.ndarray]:
  """Returns the arrays of an .npz file, without unpickling anything."""
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
      missing = [key for key in KEYS if key not in archive]
      if missing:
        held = ", ".join(sorted(archive)) or "nothing"
        raise errors.DataError(
          f"{path} has no {missing[0]}, only {held}; save the arrays "
          f"{', '.join(KEYS)}, as Keras' mnist.npz has them."
        )
      return {key: _array(archive[key], key) for key in KEYS}
  except errors.DataError:
    raise
  except Exception as error:  # a corrupt archive fails anywhere in its parsers
    storage.refuse_kind(content, path)
    raise errors.DataError(
      f"{path} is no .npz file of arrays ({error}); write it with numpy.savez."
    ) from error


def _array(found: Any, key: str) -> np.ndarray:
  """Returns an array; ValueError for bytes, which NumPy returns for another member."""
  if not isinstance(found, np.ndarray):
    raise ValueError(f"{key} is something else")
  return found


def _checked(
  images: np.ndarray, labels: np.ndarray, *, part: str, origin: str
) -> np.ndarray:
  """Returns the labels as int64[images].

  Raises:
    errors.DataError: The arrays are no such images, or there is not a label for each.
  """
  if images.dtype != np.uint8 or images.ndim != 3 or not images.size:
    raise errors.DataError(
      f"{origin}: x_{part} is {images.dtype}{list(images.shape)}; it must be "
      "uint8[images, height, width], grey from 0 to 255."
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise errors.DataError(
      f"{origin}: y_{part} is {labels.dtype}{list(labels.shape)}; it must be "
      f"int[{len(images)}], the class of each of x_{part}."
    )
  if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
    raise errors.DataError(
      f"{origin}: y_{part} has the class {labels[labels.argmin()]}; number the classes "
      "from 0."
    )
  return labels.astype(np.int64)


def read_bundled() -> base.Source:
  """Reads the digits that come with scikit-learn (UCI's optical recognition set)."""
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / _MAX_INK)).astype(np.uint8)
  return _source("scikit-learn's digits", {"train": images}, {"train": digits.target})


def is_test(path: str) -> bool:
  """Says whether an image's path is that of a test image."""
  return path.partition("/")[2].startswith(f"{_TEST}-")


def _source(
  name: str, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> base.Source:
  """Returns the images by class, each as a PNG file, which is lossless."""
  return base.Source(
    name,
    _groups(labels),
    [name],
    contents=[_png(image) for part in images.values() for image in part],
    is_held_out=is_test if _TEST in images else None,
  )


def _groups(labels: dict[str, np.ndarray]) -> Iterator[base.IdentityGroup]:
  """Yields the classes; an image's start is its index in `base.Source.contents`."""
  every = np.concatenate(list(labels.values()))
  names = [
    f"{part}-{number:05d}.png"
    for part, part_labels in labels.items()
    for number in range(len(part_labels))
  ]
  digits = len(str(every.max()))
  for label in np.unique(every):
    identity = f"{label:0{digits}d}"
    of_path = {f"{identity}/{names[n]}": n for n in np.flatnonzero(every == label)}
    paths = sorted(of_path)
    yield base.new_group(identity, paths, starts=[of_path[path] for path in paths])


def _png(image: np.ndarray) -> bytes:
  """Encodes uint8[height, width]."""
  return cv2.imencode(".png", image)[1].tobytes()
