"""Damage of a cached copy, told from damage at the source; only the latter is told.

A copy may rot on the disk, and a run that skips damaged records keeps a damaged copy
whose source may be mended later. So where a record is damaged the whole copy is
compared: with the manifest, then with what the bucket says of its object. A copy that
is neither of both is fetched anew.
"""

import collections
import threading
from collections.abc import Callable
from typing import NamedTuple

from absl import logging

from facedist import errors, storage
from facedist.data import damage
from facedist.data.open_files import OpenFile
from facedist.data.shard_fetcher import ShardFetcher

_MOST_RENEWALS = 2  # of a shard; then it is the disk that damages it


class Mender:
  """Replaces damaged copies of shards; safe from many threads.

  Args:
    fetcher: The shards.
    check_unchanged: Raises DataError if the set was replaced since it was opened.
  """

  def __init__(
    self, fetcher: ShardFetcher, check_unchanged: Callable[[], None]
  ) -> None:
    self.fetcher = fetcher
    self._check_unchanged = check_unchanged
    self._lock = threading.Lock()
    self._as_at_source: set[damage.Token] = set()
    self._renewals: collections.Counter[int] = collections.Counter()

  def renew(self, number: int) -> bool:
    """Looks after the copy of a shard in which damage was met.

    Returns:
      Whether to read it again: False where it was found to be as it is at its source.

    Raises:
      errors.DataError: The set was replaced, or every new copy is damaged too.
    """
    with self._lock:  # one of several threads that meet the same damage
      file = self.fetcher.get(number)
      if file.token in self._as_at_source:
        return False
      if self._is_as_at_source(number, file):
        self._as_at_source.add(file.token)
      else:
        self._replace(number, file)
      return True

  def _is_as_at_source(self, number: int, file: OpenFile) -> bool:
    """Compares a copy with the manifest, and if it differs with its source."""
    shard = self.fetcher.shards[number]
    found = storage.crc32c(f"/proc/self/fd/{file.descriptor}")  # it may have no name
    if found == shard.crc32c:
      return True
    self._check_unchanged()
    with damage.missing_is_named(shard.source):
      return found == damage.stored_crc32c(shard.source)

  def _replace(self, number: int, file: OpenFile) -> None:
    """Fetches a shard anew; DataError where that has not helped before."""
    shard = self.fetcher.shards[number]
    if self._renewals[number] == _MOST_RENEWALS:
      raise errors.DataError(
        f"{shard.path} is again not what {shard.source} is; the disk of --cache_dir "
        "damages files, name a folder on another one."
      )
    logging.warning("%s differs from %s; it is fetched anew", shard.path, shard.source)
    self._renewals[number] += 1
    self.fetcher.replace(number, file)


class StagedFiles(NamedTuple):
  """The shards of a split as files of the cache; they begin with number `first`."""

  mender: Mender
  first: int

  def get(self, number: int) -> OpenFile:
    """Returns a shard; hold it while you read."""
    return self.mender.fetcher.get(self.first + number)

  def source(self, number: int) -> str:
    """Returns where a shard comes from."""
    return self.mender.fetcher.shards[self.first + number].source

  def renew(self, number: int) -> bool:
    """Looks after the copy of a shard in which damage was met; see `Mender`."""
    return self.mender.renew(self.first + number)
