"""Exact search, against a sort of all cosines."""

import tracemalloc

import numpy as np
import pytest

from facedist.evaluation import search

X, Y = [1.0, 0.0], [0.0, 1.0]
TIES = np.array([Y, [-1, 0], X, Y, X, [0, -1], X, [-0.0, 1]], np.float32)


def _unit(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Returns float32[count, size] of length 1."""
  vectors = rng.standard_normal((count, size), dtype=np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("num_matches", [1, 7, 100])
def test_the_best_are_those_of_a_sort_of_all_cosines(monkeypatch, num_matches):
  monkeypatch.setattr(search, "_QUERIES_AT_ONCE", 4)
  monkeypatch.setattr(search, "_GALLERY_AT_ONCE", 9)
  rng = np.random.default_rng(0)
  queries, gallery = _unit(rng, 10, 8), _unit(rng, 50, 8)
  found = list(search.search(queries, gallery, num_matches=num_matches))
  assert len(found) == 10
  for query, matches in zip(queries, found, strict=True):
    cosines = gallery @ query
    expected = np.argsort(-cosines)[:num_matches]
    np.testing.assert_array_equal(matches.places, expected)
    np.testing.assert_allclose(matches.cosines, cosines[expected], atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_of_equal_cosines_the_first_of_the_gallery_comes_first(monkeypatch, block):
  monkeypatch.setattr(search, "_GALLERY_AT_ONCE", block)
  queries = np.array([X, [-1, 0]], np.float32)
  first, second = search.search(queries, TIES, num_matches=6)
  assert first.places.tolist() == [2, 4, 6, 0, 3, 5]
  assert first.cosines.tolist() == [1, 1, 1, 0, 0, 0]
  # what is 0 or -0 here is equal too
  assert second.places.tolist() == [1, 0, 3, 5, 7, 2]
  assert second.cosines.tolist() == [1, 0, 0, 0, 0, -1]


def test_memory_does_not_grow_with_the_gallery(monkeypatch):
  monkeypatch.setattr(search, "_GALLERY_AT_ONCE", 500)
  rng = np.random.default_rng(0)
  queries, gallery = _unit(rng, 50, 4), _unit(rng, 20_000, 4)
  peaks = []
  for size in (1000, 20_000):
    tracemalloc.start()
    list(search.search(queries, gallery[:size], num_matches=5))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.2 * peaks[0]  # all cosines would be 4 MB, and a block is 0.1 MB


def _check_both(queries: np.ndarray, gallery: np.ndarray, num_matches: int) -> None:
  """Searches with the blocks and with Faiss, which must find the same."""
  one, other = (
    list(find(queries, gallery, num_matches=num_matches))
    for find in (search.search, search.search_with_faiss)
  )
  for mine, theirs in zip(one, other, strict=True):
    np.testing.assert_array_equal(mine.places, theirs.places)
    np.testing.assert_allclose(mine.cosines, theirs.cosines, atol=1e-6)


@pytest.mark.parametrize("num_queries", [3, 30])  # faiss calls BLAS from 20 on
def test_faiss_finds_what_the_blocks_find_and_breaks_ties_so(num_queries):
  pytest.importorskip("faiss")
  rng = np.random.default_rng(1)
  for num_matches in (1, 7, 200):
    _check_both(_unit(rng, num_queries, 16), _unit(rng, 100, 16), num_matches)
  for num_matches in range(1, 10):
    queries = np.array([X, Y] * 15, np.float32)[:num_queries]
    _check_both(queries, TIES, num_matches)
