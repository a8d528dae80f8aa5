"""The end of a worker: its peers told, its reason said, its own exit code."""

import subprocess
import sys
import time

import pytest

PROGRAM = """
import atexit, sys, time, types
from facedist import errors
from facedist.training import guard

atexit.register(time.sleep, 120)  # as TensorFlow's threads that do not let go
lookout = types.SimpleNamespace(leave=lambda *words: print("left", *map(str, words)))
with guard._last_words(lookout, is_alone=False):
  raise {error}
"""


@pytest.mark.parametrize(
  ("error", "code", "told", "said"),
  [
    ('errors.DataError("no; mend it")', 4, "left 4 no; mend it", "error: no; mend it"),
    ('errors.PeerLostError("gone")', 144, "left 144 gone", "error: gone"),
    ('ValueError("a bug")', 1, "left 1 ValueError: a bug", "ValueError: a bug"),
  ],
)
def test_a_worker_ends_with_its_own_code_though_something_holds_the_process(
  error: str, code: int, told: str, said: str
):
  started = time.monotonic()
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(error=error)],
    capture_output=True,
    text=True,
    timeout=110,
    check=False,
  )
  assert result.returncode == code, result.stderr
  assert result.stdout.strip() == told
  assert result.stderr.strip().splitlines()[-1] == said
  assert time.monotonic() - started < 100
