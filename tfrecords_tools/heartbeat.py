"""A sign of life from work whose end is not known."""

import time

from absl import logging

from facedist import progress


class Heartbeat:
  """Logs how far something is, a line every ten seconds.

  Args:
    text: What is counted, with a %s for the count, such as 'planned %s images'.
  """

  def __init__(self, text: str) -> None:
    self._text = text
    self._last_line = time.monotonic()

  def beat(self, count: int) -> None:
    """Logs the count if it is time to."""
    if time.monotonic() - self._last_line >= progress.SECONDS_BETWEEN_LINES:
      self._last_line = time.monotonic()
      logging.info(self._text, f"{count:,}")
