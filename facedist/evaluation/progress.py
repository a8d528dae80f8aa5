"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging
from tqdm import tqdm

Item = TypeVar("Item")
LINE_SECONDS = 10.0


def shown(
  items: Iterable[Item],
  *,
  total: int,
  unit: str,
  size: Callable[[Item], int],
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
  """Yields `items`, showing how much is done, the rate and the time left.

  Args:
    items: The work, such as batches.
    total: Sum of the sizes of all items.
    unit: What is counted, such as 'images'.
    size: How much of the total an item is.
    clock: Seconds that never go back.
  """
  if sys.stderr.isatty():
    with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) as bar:
      for item in items:
        yield item
        bar.update(size(item))
    return
  started = said = clock()
  done = 0
  for item in items:
    yield item
    done += size(item)
    now = clock()
    if now - said >= LINE_SECONDS:
      said = now
      rate = done / (now - started)
      left = (total - done) / rate if rate else 0.0
      logging.info(
        "%s of %s %s, %.0f/s, %.0f s left", f"{done:,}", f"{total:,}", unit, rate, left
      )
