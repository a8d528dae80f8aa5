"""Batch memory is not reused while anything refers to it."""

import concurrent.futures
import tracemalloc

import numpy as np
import pytest

from facedist.data.readers import batch_memory


def address(array: np.ndarray) -> int:
  return array.ctypes.data


def test_arrays_have_the_requested_shape_and_start_aligned():
  lender = batch_memory.BatchMemory()
  for shape in ((3, 5, 7, 3), (1,), (4, 112, 112, 3)):
    array = lender.empty(shape)
    assert array.shape == shape
    assert array.dtype == np.uint8
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert address(array) % 64 == 0


def test_an_empty_shape_is_served():
  assert batch_memory.BatchMemory().empty((0, 4, 4, 3)).shape == (0, 4, 4, 3)


def test_memory_is_reused_once_no_reference_is_left():
  lender = batch_memory.BatchMemory()
  array = lender.empty((1000,))
  first = address(array)
  del array
  assert address(lender.empty((1000,))) == first


@pytest.mark.parametrize(
  "view",
  [
    lambda array: array[2:3],
    lambda array: array.reshape(-1)[::7],
    lambda array: array.reshape(10, 10, 10).transpose()[1],
    lambda array: array[3][4:5].view(np.int8),
    lambda array: memoryview(array[1]),
    lambda array: np.asarray(memoryview(array))[1],
  ],
)
def test_memory_is_not_reused_while_a_view_of_it_is_held(view):
  lender = batch_memory.BatchMemory()
  array = lender.empty((10, 100))
  start, stop = address(array), address(array) + array.size
  held = view(array)
  del array
  others = [lender.empty((10, 100)) for _ in range(3)]
  assert not any(start <= address(other) < stop for other in others)
  del held
  assert address(lender.empty((10, 100))) == start


def test_memory_of_another_size_is_dropped():
  lender = batch_memory.BatchMemory()
  tracemalloc.start()
  for size in range(1_000_000, 1_000_020):
    assert lender.empty((size,)).size == size
  held, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert held < 2_000_000


def test_threads_never_share_memory():
  lender = batch_memory.BatchMemory()

  def is_its_own(number: int) -> bool:
    for _ in range(300):
      array = lender.empty((256,))
      array[:] = number
      if (array != number).any():
        return False
    return True

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(is_its_own, range(8)))
