"""Exact search of embeddings in a gallery, in blocks of a bounded size."""

import dataclasses
from collections.abc import Iterator

import numpy as np

_QUERIES_AT_ONCE = 256
_GALLERY_AT_ONCE = 16_384  # 256 queries with them: 17 MB of cosines, 34 MB of keys


@dataclasses.dataclass(frozen=True)
class Matches:
  """The best images of the gallery for one query.

  Attributes:
    places: int64[k], places in the gallery, best first.
    cosines: float32[k], their cosines with the query.
  """

  places: np.ndarray
  cosines: np.ndarray


def search(
  queries: np.ndarray, gallery: np.ndarray, *, num_matches: int
) -> Iterator[Matches]:
  """Yields the images of the gallery with the highest cosines, for query after query.

  Every pair is compared. Of equal cosines the first of the gallery comes first. Memory
  beside the arrays depends on the size of a block and on `num_matches` only.

  Args:
    queries: float32[queries, embedding] of length 1.
    gallery: float32[images, embedding] of length 1; fewer than 2**32.
    num_matches: Images for each query; all of them if the gallery has fewer.
  """
  for top in range(0, len(queries), _QUERIES_AT_ONCE):
    some = queries[top : top + _QUERIES_AT_ONCE]
    best = np.empty((len(some), 0), np.int64)
    for left in range(0, len(gallery), _GALLERY_AT_ONCE):
      cosines = some @ gallery[left : left + _GALLERY_AT_ONCE].T
      best = np.hstack([best, _highest(_keys(cosines, left), num_matches)])
      best = _highest(best, num_matches)
    best = np.sort(best, axis=1)[:, ::-1]
    for places, cosines in zip(*_places_and_cosines(best), strict=True):
      yield Matches(places, cosines)


def _keys(cosines: np.ndarray, first_place: int) -> np.ndarray:
  """Returns int64 keys: all different, and ordered by cosine, then by falling place.

  The upper 32 bits are the cosine's, as an integer of the same order; so the highest
  keys are the same ones however the gallery is cut into blocks.

  Args:
    cosines: float32[queries, images].
    first_place: Place in the gallery of the first image.
  """
  bits = (cosines + 0.0).view(np.int32)  # the sum makes 0 of -0
  ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
  places = np.arange(first_place, first_place + cosines.shape[1])
  return (ordered.astype(np.int64) << 32) | (0xFFFFFFFF - places)


def _places_and_cosines(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64 places and float32 cosines of keys."""
  ordered = (keys >> 32).astype(np.int32)
  bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
  return 0xFFFFFFFF - (keys & 0xFFFFFFFF), bits.view(np.float32)


def _highest(keys: np.ndarray, count: int) -> np.ndarray:
  """Returns the `count` highest keys of each row, in any order."""
  if keys.shape[1] <= count:
    return keys
  return np.partition(keys, -count, axis=1)[:, -count:]
