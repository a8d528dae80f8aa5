"""Sorting on disk: any number of records, in a fixed amount of memory."""

import contextlib
import heapq
import itertools
import operator
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

from facedist import storage
from tfrecords_tools import heartbeat

Record = tuple[bytes, bytes]
"""What it is sorted by, and what goes with it."""

RECORDS_A_RUN = 200_000  # some 40 MB of Python objects
MAX_RUNS = 200  # open files
_RECORDS_A_BATCH = 1024
_KEY = operator.itemgetter(0)


def sorted_by_key(
  records: Iterable[Record],
  *,
  scratch_dir: str | None = None,
  records_a_run: int | None = None,
) -> Iterator[Record]:
  """Yields the records in ascending order of their keys; equal keys as they came.

  Nothing is written where all records fit into one run. The files have no name, so
  that a process that is killed leaves none behind.

  Args:
    records: Taken before the first is yielded.
    scratch_dir: Where to write; None is the system's temporary folder.
    records_a_run: Records that are held in memory and sorted at a time; None is
      RECORDS_A_RUN.
  """
  records_a_run = records_a_run or RECORDS_A_RUN
  records = iter(records)
  runs: list[IO[bytes]] = []
  shown, count = heartbeat.Heartbeat("sorting on disk: %s rows so far"), 0
  try:
    while True:
      run = sorted(itertools.islice(records, records_a_run), key=_KEY)
      if len(run) < records_a_run:
        break
      runs.append(_write(run, scratch_dir))
      count += len(run)
      shown.beat(count)
      if len(runs) == MAX_RUNS:
        merged = _write(heapq.merge(*map(_read, runs), key=_KEY), scratch_dir)
        _close(runs)
        runs = [merged]
    yield from heapq.merge(*map(_read, runs), run, key=_KEY) if runs else run
  finally:
    _close(runs)


def _write(records: Iterable[Record], scratch_dir: str | None) -> IO[bytes]:
  """Writes sorted records to a new file without a name."""
  records = iter(records)
  with storage.scratch(scratch_dir), contextlib.ExitStack() as undo:
    stream = undo.enter_context(tempfile.TemporaryFile(dir=scratch_dir))
    while batch := list(itertools.islice(records, _RECORDS_A_BATCH)):
      pickle.dump(batch, stream)
    stream.flush()
    undo.pop_all()
  return stream


def _read(stream: IO[bytes]) -> Iterator[Record]:
  """Yields the records of a file that `_write` made."""
  stream.seek(0)
  while True:
    try:
      batch = pickle.load(stream)
    except EOFError:
      return
    yield from batch


def _close(streams: Iterable[IO[bytes]]) -> None:
  """Closes the files, which then are gone."""
  for stream in streams:
    stream.close()
