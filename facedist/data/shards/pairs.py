"""A verification set's pairs file: int32[pairs, 4] of first, second, same, fold.

`first` and `second` are record numbers, `same` is 1 if they show one person and 0 if
not, and `fold` is the pair's part in cross-validation, from 0.
"""

import numpy as np

from facedist import errors, storage
from facedist.data.shards import integrity, manifest, shard_index


def load(folder: str, described: manifest.Pairs, *, num_records: int) -> np.ndarray:
  """Reads a set's pairs as int32[pairs, 4].

  Raises:
    errors.DataError: They are missing, not the manifest's, or break a rule.
  """
  content = read(folder, described)
  try:
    return parse(content, described, num_records=num_records)
  except ValueError as error:
    path = storage.join(folder, described.name)
    raise errors.DataError(f"{path} {error}; rebuild.") from error


def read(folder: str, described: manifest.Pairs) -> bytes:
  """Returns a set's pairs file; DataError unless it has the manifest's checksum."""
  path = storage.join(folder, described.name)
  with integrity.missing_is_named(path):
    content = storage.read_bytes(path)
  if storage.crc32c_of(content) != described.crc32c:
    storage.refuse_kind(content, path)
    raise errors.DataError(
      f"{path} is not the manifest's: CRC mismatch; copy the folder again or rebuild."
    )
  return content


def parse(content: bytes, described: manifest.Pairs, *, num_records: int) -> np.ndarray:
  """Returns the pairs of a file that has the manifest's checksum.

  Raises:
    ValueError: They are not what the manifest describes. The text continues a sentence
      that begins with the file's name, and names the first wrong pair.
  """
  try:
    pairs = shard_index.parse_array(content)
  except ValueError as error:
    raise ValueError(f"holds no pairs ({error})") from error
  if pairs.dtype != np.int32 or pairs.shape != (described.pairs, 4):
    raise ValueError(
      f"is {pairs.dtype}{list(pairs.shape)}, the manifest says "
      f"int32[{described.pairs}, 4]"
    )
  records, same, folds = pairs[:, :2], pairs[:, 2], pairs[:, 3]
  for broken, text in (
    (
      ((records < 0) | (records >= num_records)).any(1),
      f"names a record outside [0, {num_records})",
    ),
    (~np.isin(same, (0, 1)), "is neither 'same' (1) nor 'different' (0)"),
    (
      (folds < 0) | (folds >= described.folds),
      f"lies in a fold outside [0, {described.folds})",
    ),
  ):
    if broken.any():
      pair = int(np.argmax(broken))
      raise ValueError(f"is wrong: pair {pair} {pairs[pair].tolist()} {text}")
  if (used := len(np.unique(folds))) != described.folds:
    raise ValueError(f"has pairs in {used} folds, the manifest says {described.folds}")
  return pairs
