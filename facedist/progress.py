"""Progress of a long job: a bar on a terminal, else a log line every ten seconds.

`Progress` is for a known number of items; `CountLogger` for an unknown one.
"""

import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """Counts what is done and shows rate and time left.

  Args:
    verb: What happens, such as 'built'.
    total: Number of items of the whole job.
    done: Items that an earlier run did; they do not count for the rate.
  """

  def __init__(self, verb: str, *, total: int, done: int = 0) -> None:
    self._verb, self._total, self._done, self._before = verb, total, done, done
    self._bar = (
      tqdm.tqdm(total=total, initial=done, desc=verb, unit=" images", unit_scale=True)
      if sys.stderr.isatty()
      else None
    )
    self._started = self._last_line = time.monotonic()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.close()

  def advance(self, items: int) -> None:
    """Counts `items` more and shows them if it is time to."""
    self._done += items
    if self._bar is not None:
      self._bar.update(items)
    elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
      self._last_line = time.monotonic()
      logging.info("%s", self.line())

  def line(self) -> str:
    """Returns `built 1,200 of 4,800 images (25 %), 300 images/s, 12 s left`."""
    seconds = max(time.monotonic() - self._started, 1e-9)
    rate = (self._done - self._before) / seconds
    left = duration((self._total - self._done) / rate) if rate else "unknown time"
    percent = 100 * self._done / max(self._total, 1)
    return (
      f"{self._verb} {self._done:,} of {self._total:,} images ({percent:.0f} %), "
      f"{rate:,.0f} images/s, {left} left"
    )


def over(
  items: Iterable[Item], verb: str, *, total: int, size: Callable[[Item], int]
) -> Iterator[Item]:
  """Yields `items`, showing the progress of work on them.

  Args:
    items: The work, such as batches of images.
    verb: What happens, such as 'embedded'.
    total: Number of images in all items.
    size: How many of them an item holds.
  """
  with Progress(verb, total=total) as shown:
    for item in items:
      yield item
      shown.advance(size(item))


def duration(seconds: float) -> str:
  """Returns seconds as people say them: `45 s`, `12 min`, `3 h 20 min`."""
  minutes = round(seconds / 60)
  if seconds < 99.5:
    return f"{seconds:.0f} s"
  return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class CountLogger:
  """Logs a growing count, at most once every ten seconds.

  Args:
    text: What is counted, with a %s for the count, such as 'planned %s images'.
  """

  def __init__(self, text: str) -> None:
    self._text = text
    self._last_line = time.monotonic()

  def update(self, count: int) -> None:
    """Logs the count if ten seconds have passed."""
    if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
      self._last_line = time.monotonic()
      logging.info(self._text, f"{count:,}")
