"""Sorting more rows than fit into memory, in a temporary SQLite database."""

import contextlib
import errno
import itertools
import sqlite3
from collections.abc import Iterable, Iterator

from facedist import progress, storage

Record = tuple[bytes, bytes]
"""The key that it is sorted by, and a value."""

ROWS_A_BATCH = 10_000  # that are inserted between two lines of progress
CACHE_KIB = 32 << 10
_PAGE_BYTES = 16 << 10


def sorted_by_key(
  records: Iterable[Record], *, scratch_dir: str | None = None
) -> Iterator[Record]:
  """Yields the records in ascending order of their keys; equal keys as they came.

  Args:
    records: Taken before the first is yielded.
    scratch_dir: See `open_database`.

  Raises:
    errors.DataError: The disk of `scratch_dir` is full.
  """
  records = iter(records)
  shown, count = progress.CountLogger("sorting on disk: %s rows so far"), 0
  with contextlib.closing(open_database(scratch_dir)) as database:
    database.execute("CREATE TABLE records (key BLOB, value BLOB)")
    while batch := list(itertools.islice(records, ROWS_A_BATCH)):
      with full_disk_as_data_error(scratch_dir):
        database.executemany("INSERT INTO records VALUES (?, ?)", batch)
      count += len(batch)
      shown.update(count)
    with full_disk_as_data_error(scratch_dir):
      yield from database.execute("SELECT key, value FROM records ORDER BY key, rowid")


def open_database(scratch_dir: str | None) -> sqlite3.Connection:
  """Opens an empty database with a transaction, in memory up to 32 MiB, then on disk.

  Its files have no name, so a process that is killed leaves none behind.

  Args:
    scratch_dir: Where the files lie; None is the system's temporary folder.

  Raises:
    errors.UsageError: The folder cannot be made or written.
  """
  with storage.scratch(scratch_dir) as folder:
    # A generator that is left may be closed by a collection in any thread.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    quoted = folder.replace("'", "''")
    try:
      database.execute(f"PRAGMA temp_store_directory = '{quoted}'")
    except sqlite3.OperationalError as error:
      database.close()
      raise PermissionError(errno.EACCES, str(error), folder) from error
  database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
  database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
  database.execute("PRAGMA journal_mode = OFF")
  database.execute("BEGIN")
  return database


@contextlib.contextmanager
def full_disk_as_data_error(scratch_dir: str | None) -> Iterator[None]:
  """Turns SQLite's error for a full disk into the DataError that names the folder."""
  with storage.scratch(scratch_dir):
    try:
      yield
    except sqlite3.OperationalError as error:
      if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
        raise
      raise OSError(errno.ENOSPC, str(error)) from error
