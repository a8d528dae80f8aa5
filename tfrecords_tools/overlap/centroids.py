"""The mean embedding of each identity, from what `python -m facedist.embed` writes.

That file is JSON with a fact a line, then `"embeddings": [`, an embedding a line, `],`
and what was skipped. It is read line by line, which takes no more memory for more
images and needs no other JSON parser; the same JSON in another layout is refused.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from facedist import errors, storage

SAME = ("model", "weights_crc32c", "embedding_size", "image_size", "mirrored")
"""Facts that must be the same for two files' embeddings to be compared."""
_BEGIN, _END = '"embeddings": [', "],"
_BLOCK = 1024  # identities whose sums lie in one array


@dataclasses.dataclass(frozen=True)
class Centroids:
  """A file's identities.

  Attributes:
    path: The file.
    facts: What the file says of all embeddings.
    names: The identities, in the order of their first embeddings.
    counts: Images of each.
    blocks: float32[identities, embedding_size] in pieces: mean directions of length 1,
      or 0 where an identity's embeddings cancel out.
    halves: float32[identities of two images or more], the cosine of the mean of an
      identity's 1st, 3rd, 5th... image and the mean of the others; or none.
  """

  path: str
  facts: dict[str, Any]
  names: Sequence[str]
  counts: Sequence[int]
  blocks: Sequence[np.ndarray]
  halves: np.ndarray | None = None


def read_centroids(path: str, *, with_halves: bool = False) -> Centroids:
  """Returns the mean direction of each identity's unit embeddings.

  Memory is one float32[embedding_size] for an identity, two with halves, whatever the
  number of images.

  Args:
    path: Local or in a bucket.
    with_halves: Whether to compare each identity with itself, too.

  Raises:
    errors.DataError: The file is not as facedist.embed writes it, is cut off, or an
      embedding is not finite, is zero or has no identity.
  """
  lines = enumerate(storage.open_lines(path), 1)
  facts = _read_facts(lines, path)
  size = facts["embedding_size"]
  place_of: dict[str, int] = {}
  counts: list[int] = []
  blocks: list[np.ndarray] = []
  odd: list[np.ndarray] = []
  for identity, embedding in _embeddings(lines, path, size=size):
    place = place_of.setdefault(identity, len(place_of))
    if place == len(counts):
      counts.append(0)
      if place % _BLOCK == 0:
        blocks.append(np.zeros((_BLOCK, size), np.float32))
        odd += [np.zeros_like(blocks[-1])] * with_halves
    counts[place] += 1
    blocks[place // _BLOCK][place % _BLOCK] += embedding
    if with_halves and counts[place] % 2:
      odd[place // _BLOCK][place % _BLOCK] += embedding
  if not counts:
    raise errors.DataError(f"{path} has no embeddings; embed a folder with images.")
  blocks[-1] = blocks[-1][: (len(counts) - 1) % _BLOCK + 1]
  halves = _halves(blocks, odd, counts) if with_halves else None
  for block in blocks:
    lengths = np.linalg.norm(block, axis=1, keepdims=True)
    np.divide(block, lengths, out=block, where=lengths > 0)
  return Centroids(path, facts, tuple(place_of), counts, blocks, halves)


def check_alike(first: Centroids, second: Centroids) -> None:
  """Checks that one network made both files' embeddings.

  Raises:
    errors.DataError: Names what differs.
  """
  for fact in SAME:
    here, there = second.facts[fact], first.facts[fact]
    if here != there:
      raise errors.DataError(
        f"{second.path} has {fact} {here}, but {first.path} has {there}; embed both "
        "with the same checkpoint and flags."
      )


def _halves(
  sums: Sequence[np.ndarray], odd: Sequence[np.ndarray], counts: Sequence[int]
) -> np.ndarray:
  """Returns the cosine of each identity's two halves, where it has two images."""
  cosines = [np.zeros(0, np.float32)]
  for whole, first in zip(sums, odd, strict=True):
    first = first[: len(whole)]
    second = whole - first
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines.append((first * second).sum(axis=1) / np.maximum(lengths, 1e-12))
  return np.clip(np.concatenate(cosines)[np.array(counts) > 1], -1, 1)


def _read_facts(lines: Iterator[tuple[int, str]], path: str) -> dict[str, Any]:
  """Reads up to the first embedding."""
  facts: dict[str, Any] = {}
  for number, line in lines:
    if line == _BEGIN:
      break
    if number == 1:
      if line != "{":
        raise _bad(path, number, "is not the start of such a file")
      continue
    try:
      facts |= json.loads("{" + line.removesuffix(",") + "}")
    except (ValueError, RecursionError) as error:
      raise _bad(path, number, "is no fact before the embeddings") from error
  else:
    raise errors.DataError(f"{path} has no embeddings: it is cut off; embed again.")
  missing = [fact for fact in SAME if fact not in facts]
  if missing:
    raise errors.DataError(
      f"{path} does not say its {', '.join(missing)}; embed again with facedist.embed."
    )
  size = facts["embedding_size"]
  if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 1 << 16:
    raise errors.DataError(f"{path} has embedding_size {size}; it must be a dimension.")
  return facts


def _embeddings(
  lines: Iterator[tuple[int, str]], path: str, *, size: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields identity and float32[size] of length 1 of each image."""
  for number, line in lines:
    if line == _END:
      break
    try:
      entry = json.loads(line.removesuffix(","))
      identity, embedding = entry["identity"], np.array(entry["embedding"], np.float64)
    except (
      ArithmeticError,
      LookupError,
      RecursionError,
      TypeError,
      ValueError,
    ) as error:
      raise _bad(path, number, "is no embedding") from error
    if not isinstance(identity, str):
      raise _bad(path, number, "has no identity, the name of the image's folder")
    if embedding.shape != (size,):
      raise _bad(path, number, f"has not the embedding_size of {size} numbers")
    length = float(np.linalg.norm(embedding))
    if not 0 < length < np.inf:  # false for NaN too
      raise _bad(path, number, "has an embedding that is zero or not finite")
    yield identity, (embedding / length).astype(np.float32)
  last = collections.deque(lines, maxlen=1)
  if not last or last[0][1] != "}":
    raise errors.DataError(f"{path} is cut off at its end; embed again.")


def _bad(path: str, number: int, reason: str) -> errors.DataError:
  """Returns the error for a line."""
  return errors.DataError(
    f"{path}, line {number}, {reason}; give a file as facedist.embed writes it, an "
    "embedding a line."
  )
