"""One policy of trying again: jittered back-off, within a deadline."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from facedist import errors

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 32.0
_SILENT_ATTEMPTS = 4  # a share of requests always fails; only a row of them is news


def keep_trying(
  request: Callable[[float], Result],
  *,
  what: str,
  is_transient: Callable[[Exception], bool],
  describe: Callable[[Exception], str],
  deadline_seconds: float,
) -> Result:
  """Returns what `request` returns, called until it does not fail transiently.

  Args:
    request: Takes the seconds that are left until the deadline.
    what: The path, for messages.
    is_transient: Says whether an exception may be gone at the next attempt; any
      other is raised at once.
    describe: Returns an exception in a few words without secrets.
    deadline_seconds: How long to go on; the time of the attempts counts.

  Raises:
    errors.UnreachableError: The deadline passed and every attempt had failed.
  """
  jitter = random.SystemRandom()  # forked processes must not try in step
  started = time.monotonic()
  attempts = 0
  while True:
    left = started + deadline_seconds - time.monotonic()
    try:
      return request(max(left, 0.0))
    except Exception as error:
      if not is_transient(error):
        raise
      attempts += 1
      longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempts)
      pause = jitter.uniform(0, longest)
      left = started + deadline_seconds - time.monotonic()
      if pause >= left:
        raise errors.UnreachableError(
          f"{what}: no success in {deadline_seconds:g} s and {attempts} attempts "
          f"(last: {describe(error)}); check the network and the bucket's state, "
          "or raise --storage_deadline_seconds."
        ) from error
      if attempts >= _SILENT_ATTEMPTS:
        logging.warning(
          "%s: %s; attempt %d in %.1f s, %.0f s left",
          what,
          describe(error),
          attempts + 1,
          pause,
          left,
        )
    time.sleep(pause)
