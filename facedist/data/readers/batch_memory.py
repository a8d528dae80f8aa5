"""Memory for batches, used again as soon as nobody holds it.

A fresh 10 MB array costs the kernel's zeroing of its pages, a tenth of the time that
decoding into it takes.
"""

import collections
import math
import weakref

import numpy as np

ALIGNMENT_BYTES = 64
_MOST_FREE = 32


class BatchMemory:
  """Hands out uint8 arrays whose memory comes back when they are no more.

  An array is lent for as long as it, any view of it or any TensorFlow tensor that took
  it over is alive, so what is held is never overwritten. Safe from many threads.
  """

  def __init__(self) -> None:
    self._free: collections.deque[np.ndarray] = collections.deque(maxlen=_MOST_FREE)

  def empty(self, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an uninitialised uint8 array that starts at a multiple of 64 bytes.

    TensorFlow takes such an array over as it is, and copies any other.
    """
    size = math.prod(shape)
    block = self._take(size)
    # Through its buffer, not as a view: the views of an array all refer to the array
    # that owns the memory, so only an owner of its own lives as long as they do.
    lent = np.frombuffer(block.data, np.uint8)
    weakref.finalize(lent, self._free.append, block).atexit = False
    return lent.reshape(shape)

  def _take(self, size: int) -> np.ndarray:
    """Returns a free block of that size, or a new one; others are given up."""
    while self._free:
      try:
        block = self._free.pop()
      except IndexError:  # another thread was faster
        break
      if block.size == size:
        return block
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size]
