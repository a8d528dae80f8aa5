"""A verification set: images, and pairs of them that show one person or two."""

import dataclasses
from collections.abc import Callable

import numpy as np

from facedist import errors, storage
from facedist.data.cache import staged_dataset
from facedist.data.readers import local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.shards import manifest, open_files, shard_index


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
    folder: A local folder with a manifest; `staged_dataset` brings one from a bucket.
    files_of: Returns the shards of a split where they are cached copies.

  Raises:
    errors.DataError: The folder holds no verification set, or a damaged one.
  """
  content = manifest.load(folder)
  if content.kind != "verification" or content.pairs is None:
    raise errors.DataError(
      f"{folder} holds a {content.kind} set, not a verification set; build one with "
      "python -m tfrecords_tools.build --dataset=lfw."
    )
  reader = local_reader.open_reader(folder, "images", files=files_of("images"))
  pairs = _load_pairs(folder, content.pairs)
  _check_pairs(pairs, content.pairs, num_records=reader.num_records, folder=folder)
  first, second, same, folds = np.ascontiguousarray(pairs.T)
  return VerificationSet(
    reader,
    first,
    second,
    same.astype(bool),
    folds,
    content.dataset,
    content.aligned_by,
  )


def _load_pairs(folder: str, described: manifest.Pairs) -> np.ndarray:
  """Reads int32[pairs, 4] and compares it with the manifest's description."""
  path = storage.join(folder, described.name)
  content = staged_dataset.read_pairs(folder, described)
  try:
    pairs = shard_index.parse_array(content)
  except ValueError as error:
    raise errors.DataError(f"{path} holds no pairs ({error}); rebuild.") from error
  if pairs.dtype != np.int32 or pairs.shape != (described.pairs, 4):
    raise errors.DataError(
      f"{path} is {pairs.dtype}{list(pairs.shape)}, the manifest says "
      f"int32[{described.pairs}, 4]; rebuild."
    )
  return pairs


def _check_pairs(
  pairs: np.ndarray, described: manifest.Pairs, *, num_records: int, folder: str
) -> None:
  """Raises DataError, naming the first pair at fault, where a column is off."""
  folds_used = np.unique(pairs[:, 3])
  rules = (
    (pairs[:, :2] < 0).any(1) | (pairs[:, :2] >= num_records).any(1),
    ~np.isin(pairs[:, 2], (0, 1)),
    (pairs[:, 3] < 0) | (pairs[:, 3] >= described.folds),
  )
  texts = (
    f"names a record outside [0, {num_records})",
    "is neither 'same' (1) nor 'different' (0)",
    f"lies in a fold outside [0, {described.folds})",
  )
  for broken, text in zip(rules, texts, strict=True):
    if broken.any():
      pair = int(np.argmax(broken))
      raise errors.DataError(
        f"{storage.join(folder, described.name)}, pair {pair} "
        f"{pairs[pair].tolist()} {text}; rebuild."
      )
  if len(folds_used) != described.folds:
    raise errors.DataError(
      f"{storage.join(folder, described.name)} has pairs in {len(folds_used)} folds, "
      f"the manifest says {described.folds}; rebuild."
    )
