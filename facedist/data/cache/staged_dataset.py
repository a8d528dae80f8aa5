"""Copies a set of shards from a bucket to a local cache, where it is read.

`stage` copies the whole set and waits for it. `open_set` copies the manifest, the
indexes and the pairs and returns; threads then copy the shards in the order in which
the steps need them, and a read waits only for its own shard. Single records in random
order need nearly every shard within the first few steps, so training starts when nearly
the whole set is copied. Blocks of records (--shuffle_block) need few shards at a time,
so training starts early and the set may be larger than the cache.

All processes of a host share the cache (`shard_cache.py`). It persists after them and
stays within --cache_gb. Each file is compared with the manifest.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NamedTuple

from absl import logging

from facedist import errors, progress, storage
from facedist.data.cache import prefetch, shard_cache
from facedist.data.cache.prefetch import ShardFetcher
from facedist.data.cache.shard_cache import Remote, ShardCache
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.shards import integrity, manifest, pairs, shard_index
from facedist.data.shards.open_files import OpenFile

_DOWNLOADS = 8
_CHECKED_BYTES = 256 << 20  # indexes up to this size are read whole anyway
_SIMULATED_RANGES = 1024
_MAX_TRAFFIC = 4.0  # bytes fetched for each byte read


class CopyChecker:
  """Finds out whether a shard is corrupt only in the cache, or also at its source.

  A copy may become corrupt on the disk, and a run that skips corrupt records keeps a
  copy whose source may be repaired later. So a copy with a corrupt record is compared
  with the manifest, and then with the bucket's checksum. A copy that equals neither is
  removed. Safe from many threads.

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
    self._as_at_source: set[integrity.Token] = set()

  def check(self, number: int, file: OpenFile) -> None:
    """Checks that the copy `file` of a shard equals the shard at its source.

    Raises:
      errors.CorruptCopyError: It does not, and was removed from the cache.
      errors.DataError: The set was replaced.
    """
    with self._lock:  # several threads may read the same bad record
      if file.token in self._as_at_source:
        return
      shard = self.fetcher.shards[number]
      found = storage.crc32c(f"/proc/self/fd/{file.descriptor}")  # may have no name
      if found != shard.crc32c:
        self._check_unchanged()
        with integrity.missing_is_named(shard.source):
          at_source = integrity.stored_crc32c(shard.source)
        if found != at_source:
          self.fetcher.discard(number, file)
          raise errors.CorruptCopyError(
            f"{shard.path} differed from {shard.source} and has been removed; a "
            "restart fetches it again. If this happens again, the disk of --cache_dir "
            "corrupts files: name a folder on another disk."
          )
      self._as_at_source.add(file.token)


class StagedFiles(NamedTuple):
  """The shards of a split as files of the cache; `first` is the first one's number."""

  copies: CopyChecker
  first: int

  def get(self, number: int) -> OpenFile:
    """Returns a shard; hold it while you read."""
    return self.copies.fetcher.get(self.first + number)

  def path(self, number: int) -> str:
    """Returns a shard's path at its source."""
    return self.copies.fetcher.shards[self.first + number].source

  def check(self, number: int, file: OpenFile) -> None:
    """Checks a copy in which a bad record was read; see `CopyChecker`."""
    self.copies.check(self.first + number, file)


class StagedSet:
  """A set of shards, with local copies of its files if they lie in a bucket.

  A set on a disk, or one without a cache, is read in place: then nothing is fetched.

  Use it in a `with` statement, which stops the fetching at the end.

  Attributes:
    folder: The folder to read from, with manifest and indexes.
  """

  def __init__(
    self, folder: str, cache: ShardCache | None, *, keep: bool = True
  ) -> None:
    """Copies the manifest, the indexes and the pairs.

    Args:
      folder, keep: See `open_set`.
      cache: Where files of a bucket are copied to; None to read them in place.

    Raises:
      errors.DataError: A file is missing, or is not the one the manifest describes.
    """
    self.folder = folder
    self._fetcher: ShardFetcher | None = None
    if cache is None:
      return
    self._source, self._cache = folder, cache
    path = storage.join(folder, manifest.MANIFEST_NAME)
    self._token = storage.generation(path) if storage.exists(path) else ""
    self._manifest = manifest.load(folder)
    self._copies = manifest.gathered(self._manifest)
    paths = [shard.path(folder) for shard in self._manifest.shards]
    if not any(map(storage.is_bucket, [folder, *paths])):
      return
    name = f"{self._manifest.dataset}-{self._manifest.fingerprint}"
    self.folder, self._lock = cache.use(name)
    with cache.disk_errors():
      copy_small_files(folder, self.folder, self._manifest)
      shard_cache.count_again(cache.folder)
    fetcher = ShardFetcher(
      cache,
      [
        Remote(path, copy.path(self.folder), copy.bytes, copy.crc32c)
        for path, copy in zip(paths, self._copies.shards, strict=True)
      ],
      check_unchanged=self._check_unchanged,
      keep=keep,
    )
    self._fetcher = fetcher
    self._copy_checker = CopyChecker(fetcher, self._check_unchanged)
    logging.info(
      "%s: %d shards of %s GB in all are copied to %s, %s",
      folder,
      len(paths),
      _gigabytes(fetcher.total_bytes),
      self.folder,
      "and stay there" if fetcher.is_whole else "and removed after their steps",
    )

  def __enter__(self) -> "StagedSet":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Stops fetching, and allows other processes to remove this set's files."""
    if self._fetcher is not None:
      self._fetcher.close()
      self._fetcher = None
      os.close(self._lock)

  def files(self, split: str) -> StagedFiles | None:
    """Returns the shards of a split for a reader; None if they are read in place."""
    if self._fetcher is None:
      return None
    return StagedFiles(self._copy_checker, self._first_shard(split))

  def follow(
    self,
    split: str,
    sampler: EpochSampler,
    *,
    start_step: int,
    worker: int,
    num_workers: int,
  ) -> None:
    """Fetches the shards of a split in the order in which a worker needs them.

    Args:
      split: The split.
      sampler: Which records make up which step.
      start_step: The first step.
      worker: The worker's number, from 0.
      num_workers: Workers that share each global batch evenly.

    Raises:
      errors.DataError: The set does not fit into the cache, and in this order its
        shards would be fetched many times.
    """
    if self._fetcher is None:
      return
    coming = functools.partial(
      prefetch.prefetch_order,
      sampler,
      shard_index.Numbering(self._copies.splits[split].shards).first_ids,
      start_step=start_step,
      worker=worker,
      num_workers=num_workers,
    )
    first = self._first_shard(split)
    if not self._fetcher.is_whole:
      self._check_traffic(split, coming())
    self._fetcher.follow(steps.moved(first) for steps in coming())

  def follow_shards(self, split: str, records: range) -> None:
    """Fetches the shards of these records in order; `reached` then counts records."""
    if self._fetcher is not None:
      first = self._first_shard(split)
      first_ids = shard_index.Numbering(self._copies.splits[split].shards).first_ids
      self._fetcher.follow(
        shard.moved(first)
        for shard in prefetch.sequential_order(first_ids)
        if shard.first_step < records.stop and shard.end_step > records.start
      )

  def reached(self, step: int) -> None:
    """Reports the step being read, so that shards of earlier steps may be removed."""
    if self._fetcher is not None:
      self._fetcher.reached(step)

  def wait(self) -> None:
    """Waits until all shards are copied.

    Raises:
      errors.DataError: They do not fit into the cache, or cannot be fetched.
    """
    if self._fetcher is None:
      return
    if not self._fetcher.is_whole:
      raise errors.DataError(
        f"--cache_gb={_gigabytes(self._cache.limit_bytes or 0)} does not hold the "
        f"{_gigabytes(self._fetcher.total_bytes)} GB of {self._source}, which is read "
        f"as a whole; give --cache_gb={self._needed_gb()}."
      )
    total = sum(shard.records for shard in self._copies.shards)
    with progress.Progress("staged", total=total) as shown:
      for number, shard in enumerate(self._copies.shards):
        self._fetcher.get(number)
        shown.advance(shard.records)

  def _check_unchanged(self) -> None:
    """Raises DataError if the set was replaced since it was opened."""
    path = storage.join(self._source, manifest.MANIFEST_NAME)
    if storage.generation(path) != self._token:
      raise errors.DataError(
        f"{self._source} was replaced while it was being read: its manifest is another "
        "one now; start again, with a new --workdir if the images are others."
      )

  def _first_shard(self, split: str) -> int:
    """Returns the number, among all shards of the set, of the split's first one."""
    self._copies.split(split, self.folder)
    names = itertools.takewhile(lambda name: name != split, self._copies.splits)
    return sum(len(self._copies.splits[name].shards) for name in names)

  def _check_traffic(self, split: str, plan: Iterator[prefetch.StepRange]) -> None:
    """Raises DataError if shards would be fetched many times."""
    shards = self._copies.splits[split].shards
    sizes = [shard.bytes for shard in shards]
    room = self._cache.limit_bytes or 0
    records = max(1, sum(shard.records for shard in shards))
    coming = itertools.islice(plan, _SIMULATED_RANGES)
    fetched, samples = prefetch.count_fetched(coming, sizes, room=room)
    traffic = (fetched - room) / (samples * sum(sizes) / records)
    if traffic > _MAX_TRAFFIC:
      raise errors.DataError(
        f"--cache_gb={_gigabytes(room)} holds too little of the "
        f"{_gigabytes(sum(sizes))} GB of {self._source}: in this order each byte would "
        f"be fetched {traffic:.0f} times; give --cache_gb={self._needed_gb()}, a "
        f"--shuffle_block of {records // len(shards)} records (a shard's) or more, or "
        "--read_mode=stream."
      )

  def _needed_gb(self) -> int:
    """Returns the --cache_gb that holds the whole set."""
    return math.ceil(1.01 * (f.total_bytes if (f := self._fetcher) else 0) / 1e9)


def copy_small_files(source: str, folder: str, content: manifest.Manifest) -> None:
  """Copies all files of a set except its shards to a local folder, the manifest last.

  One process of a host copies, and the others wait for it. An existing corrupt copy is
  replaced; an index of a very large set only if its length is wrong.

  Args:
    source: A folder with a manifest, in a bucket or with shards in one.
    folder: The local folder.
    content: The manifest of `source`.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  copies = manifest.gathered(content)
  sizes = [shard_index.num_bytes(shard.records) for shard in content.shards]
  with_crc = sum(sizes) <= _CHECKED_BYTES
  path = os.path.join(folder, "small_files")
  lock = shard_cache.open_locked(path, shard_cache.ALONE, wait=True)
  try:
    with futures.ThreadPoolExecutor(_DOWNLOADS) as pool:
      jobs = [
        pool.submit(
          _copy,
          copy.index_path(folder),
          functools.partial(shard_index.content, source, shard),
          size=size,
          crc32c=shard.index_crc32c if with_crc else None,
        )
        for size, shard, copy in zip(sizes, content.shards, copies.shards, strict=True)
      ]
      if content.pairs is not None:
        read = functools.partial(pairs.read, source, content.pairs)
        local = storage.join(folder, content.pairs.name)
        jobs.append(pool.submit(_copy, local, read, crc32c=content.pairs.crc32c))
      for job in jobs:
        job.result()
    manifest.save(copies, folder)
  finally:
    if lock is not None:
      os.close(lock)


def _copy(
  path: str,
  fetch: Callable[[], bytes],
  *,
  size: int | None = None,
  crc32c: int | None,
) -> None:
  """Fetches a file unless a copy with that size and checksum, if given, exists."""
  if (
    os.path.exists(path)
    and (size is None or storage.size(path) == size)
    and (crc32c is None or storage.crc32c(path) == crc32c)
  ):
    return
  storage.write_bytes(path, fetch())


def open_set(
  folder: str,
  cache_dir: str,
  *,
  cache_gb: float = 0.0,
  accept_corrupt: bool = False,
  keep: bool = True,
) -> StagedSet:
  """Opens a set of shards; those in a bucket are copied in the background.

  Args:
    folder: A folder with a manifest, local or gs://.
    cache_dir: Folder on a local disk for copies from a bucket.
    cache_gb: Limit of the cache in GB (1e9 bytes); 0 is no limit.
    accept_corrupt: Whether a shard with a wrong checksum is kept, for readers that
      check each record.
    keep: Whether a set that fits into the cache is copied whole and kept.

  Raises:
    errors.DataError: A file is missing, or is not the one the manifest describes.
  """
  limit = round(cache_gb * 1e9) or None
  cache = ShardCache(cache_dir, limit_bytes=limit, accept_corrupt=accept_corrupt)
  return StagedSet(folder, cache, keep=keep)


def stage(folder: str, cache_dir: str, *, cache_gb: float = 0.0) -> StagedSet:
  """Opens a set as `open_set` does, and waits until it is copied.

  Raises:
    errors.DataError: As `open_set`, or the set does not fit into the cache.
  """
  staged = open_set(folder, cache_dir, cache_gb=cache_gb)
  try:
    staged.wait()
  except BaseException:
    staged.close()
    raise
  return staged


def _gigabytes(size: int) -> str:
  return f"{size / 1e9:.3g}"
