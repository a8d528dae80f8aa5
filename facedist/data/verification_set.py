"""A verification set: images, and pairs of images of one person or of two."""

import dataclasses
from collections.abc import Callable

import numpy as np

from facedist import errors
from facedist.data.readers import local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.shards import manifest, open_files, pairs


@dataclasses.dataclass(frozen=True)
class VerificationSet:
  """Pairs of images, in folds for cross-validation.

  Attributes:
    reader: The images; the pairs give their record numbers.
    first: int32[pairs], record of each pair's first image.
    second: int32[pairs], record of its second image.
    same: bool[pairs], whether the two show one person.
    folds: int32[pairs], from 0.
    name: The data set's name, such as lfw.
    alignment: How the images were cut, see `Manifest.aligned_by`.
  """

  reader: RecordReader
  first: np.ndarray
  second: np.ndarray
  same: np.ndarray
  folds: np.ndarray
  name: str
  alignment: str | None = None


def load_verification_set(
  folder: str,
  *,
  files_of: Callable[[str], open_files.ShardFiles | None] = lambda split: None,
) -> VerificationSet:
  """Opens a verification set in a local folder.

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
    reader,
    first,
    second,
    same.astype(bool),
    folds,
    content.dataset,
    content.aligned_by,
  )
