"""Exact search of embeddings in a gallery, in blocks of a bounded size."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from facedist import errors

BACKENDS = ("auto", "numpy", "faiss")
LARGE_GALLERY = 1_000_000
"""Images above which 'auto' takes faiss, if it is installed."""

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


def search_with_faiss(
  queries: np.ndarray, gallery: np.ndarray, *, num_matches: int
) -> Iterator[Matches]:
  """Yields what `search` yields, found by faiss' exact search with all cores.

  The cosines may differ from those of `search` in their last bit, as sums in another
  order do. The gallery is not copied.

  Raises:
    errors.UsageError: faiss is not installed.
  """
  faiss = import_faiss()
  count = min(num_matches + 1, len(gallery))
  for top in range(0, len(queries), _QUERIES_AT_ONCE):
    some = np.ascontiguousarray(queries[top : top + _QUERIES_AT_ONCE], np.float32)
    metric = faiss.METRIC_INNER_PRODUCT
    cosines, places = faiss.knn(some, gallery, count, metric=metric)
    for query, values, found in zip(some, cosines, places, strict=True):
      if count > num_matches and values[-2] == values[-1]:
        # faiss drops any of the equal ones, `search` all but the gallery's first
        yield from search(query[None], gallery, num_matches=num_matches)
        continue
      order = np.lexsort((found, -values))[:num_matches]
      yield Matches(found[order], values[order])


def import_faiss() -> Any:
  """Returns faiss.

  Raises:
    errors.UsageError: It is not installed.
  """
  try:
    import faiss
  except ImportError as error:
    raise errors.UsageError(
      f"--backend=faiss needs faiss ({error}); pip install 'facedist[faiss]', or say "
      "--backend=numpy."
    ) from error
  return faiss


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
