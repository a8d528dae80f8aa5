"""What must be true of a verification set's pairs."""

import contextlib

import numpy as np

from facedist import errors, storage
from facedist.data import manifest, shard_index
from tfrecords_tools.problems import BUILD_AGAIN, Problem


def check_pairs(folder: str, made: manifest.Manifest) -> list[Problem]:
  """Checks a verification set's pairs file against the manifest and the labels."""
  if made.pairs is None:
    return []
  name = made.pairs.name
  try:
    path = storage.join(folder, name)
    if not storage.exists(path):
      raise errors.DataError(f"{name} is missing")
    _check_pairs(storage.read_bytes(path), made.pairs, made=made, folder=folder)
  except errors.DataError as error:
    return [Problem("pairs", str(error), BUILD_AGAIN, file=name)]
  return []


def _check_pairs(
  content: bytes, described: manifest.Pairs, *, made: manifest.Manifest, folder: str
) -> None:
  """Raises DataError for the first thing that is wrong with the pairs file."""
  name = described.name
  if storage.crc32c_of(content) != described.crc32c:
    storage.refuse_kind(content, name)
    raise errors.DataError(f"{name} is not the manifest's: CRC mismatch")
  try:
    pairs = shard_index.parse_array(content)
  except ValueError as error:
    raise errors.DataError(f"{name} holds no pairs ({error})") from error
  num_images = sum(split.records for split in made.splits.values())
  if pairs.dtype != np.int32 or pairs.shape != (described.pairs, 4):
    raise errors.DataError(
      f"{name} is {pairs.dtype}{list(pairs.shape)}, not int32[{described.pairs}, 4]"
    )
  if not np.array_equal(np.unique(pairs[:, 3]), np.arange(described.folds)):
    raise errors.DataError(f"{name} does not have {described.folds} folds")
  if ((pairs[:, :2] < 0) | (pairs[:, :2] >= num_images)).any():
    raise errors.DataError(f"{name} names records past the {num_images} there are")
  labels = _labels(folder, made)
  if len(labels) != num_images:
    return  # an index is missing or damaged, which is told elsewhere
  same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
  wrong = np.flatnonzero(same != pairs[:, 2])
  if len(wrong):
    raise errors.DataError(
      f"{name} has {len(wrong)} pairs whose 'same' contradicts the labels, such as "
      f"pair {wrong[0]}"
    )


def _labels(folder: str, made: manifest.Manifest) -> np.ndarray:
  """Returns int32[records] from the indexes that can be read."""
  labels = [np.empty(0, np.int32)]
  for split in made.splits.values():
    for shard in split.shards:
      with contextlib.suppress(errors.DataError):
        labels.append(shard_index.load(shard.index_path(folder))["label"])
  return np.concatenate(labels)
