"""A verification set: images, and pairs of images of one person or of two."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from facedist import errors
from facedist.config import paths
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.shards import manifest, open_files, pairs


@dataclasses.dataclass(frozen=True)
class VerificationSet:
  """Pairs of images, in folds for cross-validation.

  Attributes:
    name: The name of its scores, such as lfw.
    fingerprint: Hex digits that change with any image or pair.
    image_size: Height and width of every image in pixels.
    num_images: Number of images.
    read: Takes int64[n] image numbers; returns uint8[n, S, S, 3] RGB images.
    read_names: Returns the name of each image, empty where it has none.
    first: int32[pairs], number of each pair's first image.
    second: int32[pairs], number of its second image.
    same: bool[pairs], whether the two show one person.
    folds: int32[pairs], from 0.
    labels: int[images], the identity of each image; None if not known.
    groups: str[images], the group of each image, empty where it has none; None: no
      results by group.
    alignment: How the images were cut, see `Manifest.aligned_by`; None if not known.
  """

  name: str
  fingerprint: str
  image_size: int
  num_images: int
  read: Callable[[np.ndarray], np.ndarray]
  read_names: Callable[[], list[str]]
  first: np.ndarray
  second: np.ndarray
  same: np.ndarray
  folds: np.ndarray
  labels: np.ndarray | None = None
  groups: np.ndarray | None = None
  alignment: str | None = None

  def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yields all images in order, with a name of each for errors."""
    for start in range(0, self.num_images, batch_size):
      numbers = np.arange(start, min(start + batch_size, self.num_images))
      yield self.read(numbers), [f"image {n} of {self.name}" for n in numbers]


def load_verification_sets(
  folders: str, cache_dir: str, *, cache_gb: float
) -> tuple[VerificationSet, ...]:
  """Opens the verification sets of --verification_data; copies those in buckets.

  A set has the name of NAME=FOLDER or else that of its data set; sets of the same data
  set have those of their folders.

  Raises:
    errors.UsageError: No folder, or two sets of one name.
    errors.DataError: A folder has no verification set.
  """
  opened: list[tuple[VerificationSet, str | None, str]] = []
  for part in paths.split_list(folders):
    name, folder = paths.split_name(part)
    staged = staged_dataset.stage(folder, cache_dir, cache_gb=cache_gb)
    each = load_verification_set(staged.folder, files_of=staged.files)
    opened.append((each, name, os.path.basename(os.path.abspath(folder))))
  counts = Counter(each.name for each, name, _ in opened if name is None)
  sets = tuple(
    dataclasses.replace(
      each, name=name or (each.name if counts[each.name] == 1 else last_part)
    )
    for each, name, last_part in opened
  )
  if not sets or len({each.name for each in sets}) < len(sets):
    raise errors.UsageError(
      f"--verification_data={folders} must be one or more folders, with commas between "
      "them, of different names; to name a set, write NAME=FOLDER."
    )
  return sets


def load_verification_set(
  folder: str,
  *,
  files_of: Callable[[str], open_files.ShardFiles | None] = lambda split: None,
) -> VerificationSet:
  """Opens a verification set in a local folder; it has its data set's name.

  Args:
    folder: A local folder with a manifest; `staged_dataset` copies one from a bucket.
    files_of: Returns the shards of a split if they are cached copies.

  Raises:
    errors.DataError: The folder holds no verification set, or a corrupt one.
  """
  content = manifest.load(folder)
  if content.kind != "verification" or content.pairs is None:
    raise errors.DataError(
      f"{folder} holds a {content.kind} set, not a verification set; build one with "
      "python -m tfrecords_tools.build --dataset=lfw."
    )
  reader = local_reader.open_reader(folder, "images", files=files_of("images"))
  table = pairs.load(folder, content.pairs, num_records=reader.num_records)
  first, second, same, folds = np.ascontiguousarray(table.T)
  return VerificationSet(
    name=content.dataset,
    fingerprint=content.fingerprint,
    image_size=reader.image_size,
    num_images=reader.num_records,
    read=lambda numbers: reader.read_batch(numbers)[0],
    read_names=functools.cache(reader.filenames),
    first=first,
    second=second,
    same=same.astype(bool),
    folds=folds,
    labels=reader.labels(),
    alignment=content.aligned_by,
  )
