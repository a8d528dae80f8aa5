"""The cache that processes of a host share: fetched once, resumed, within its limit."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.cache import prefetch, shard_cache, staged_dataset
from facedist.data.readers import local_reader, record_reader
from facedist.data.samplers import block_sampler, epoch_sampler
from facedist.data.shards import integrity, manifest
from tests import files, noise_sets

NUM_SHARDS = 10
NUM_TRAIN = 100
MIDDLE = 5000  # a byte of an image in every shard


def write(folder: str, *, seed: int = 0) -> manifest.Manifest:
  return noise_sets.write(
    folder, identities=10, images=10, val_images=1, shards=NUM_SHARDS, seed=seed
  )


def shards_in(cache: pathlib.Path) -> dict[str, int]:
  """Returns the sizes of the shards in a cache, by their names."""
  return {path.name: path.stat().st_size for path in cache.rglob("*.tfrecord")}


def bytes_in(cache: pathlib.Path) -> int:
  """Returns the bytes of all files; one that gets its name meanwhile counts once."""
  found = {}
  for path in cache.rglob("*"):
    with contextlib.suppress(FileNotFoundError):
      status = path.stat()
      if path.is_file():
        found[status.st_ino] = status.st_size
  return sum(found.values())


def staging_process(folder: str, cache: pathlib.Path) -> subprocess.Popen:
  """Starts a process that stages a set in pieces of 500 bytes."""
  code = (
    "import sys; from facedist.data.cache import shard_cache, staged_dataset;"
    "shard_cache._CHUNK_BYTES = 500; staged_dataset.stage(*sys.argv[1:])"
  )
  return subprocess.Popen([sys.executable, "-c", code, folder, str(cache)])


def acquire(cache: shard_cache.ShardCache, source: str, path: pathlib.Path) -> object:
  content = storage.read_bytes(source)
  checksum = storage.crc32c_of(content)
  shard = shard_cache.Remote(source, str(path), len(content), checksum)
  return cache.acquire(shard, stop=threading.Event())


def train_of(opened: staged_dataset.StagedSet) -> record_reader.RecordReader:
  files = opened.files("train")
  return local_reader.open_reader(opened.folder, "train", files=files)


def blocks_of_ten() -> block_sampler.BlockSampler:
  return block_sampler.make_block_sampler(
    NUM_TRAIN, 4, 0, shuffle_block=10, streams=1, window_blocks=1
  )


@pytest.mark.slow
def test_several_processes_fetch_each_file_once(bucket, tmp_path):
  made = write(f"{bucket}/faces")
  bucket.faults.rate(0.3, kinds=("delay",))
  processes = [staging_process(f"{bucket}/faces", tmp_path) for _ in range(3)]
  try:
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  for shard in made.shards:
    source = f"{bucket}/faces/{shard.name}"
    assert bucket.traffic.bytes_read(source) == shard.bytes
    source = f"{bucket}/faces/{shard.index_name}"
    assert bucket.traffic.requests(source, "GET") <= 2


@pytest.mark.slow
def test_a_download_of_a_killed_process_is_resumed(bucket, tmp_path):
  made = write(f"{bucket}/faces")
  bucket.faults.always("delay", matching="*.tfrecord", method="GET", delay_seconds=0.1)
  process = staging_process(f"{bucket}/faces", tmp_path)
  while sum(path.stat().st_size for path in tmp_path.rglob("*.partial")) < 9000:
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  kept = sum(path.stat().st_size for path in tmp_path.rglob("*.partial"))
  bucket.faults.clear()
  bucket.traffic.clear()
  local = staged_dataset.stage(f"{bucket}/faces", str(tmp_path)).folder
  whole = sum(path.stat().st_size for path in pathlib.Path(local).glob("*.tfrecord"))
  assert whole == sum(shard.bytes for shard in made.shards)
  assert 9000 <= kept < whole
  assert bucket.traffic.bytes_read("*.tfrecord") < whole - 9000 + 1
  assert not list(tmp_path.rglob("*.partial"))
  assert local_reader.open_reader(local, "train").read(np.arange(NUM_TRAIN))[0]


@pytest.mark.parametrize(("partial", "fetched"), [(b"9876", 16), (b"0123", 6)])
def test_a_partial_file_is_completed_if_it_fits_and_else_fetched_again(
  bucket, tmp_path, partial, fetched
):
  content = b"0123456789"
  storage.write_bytes(f"{bucket}/x.tfrecord", content)
  cache = shard_cache.ShardCache(str(tmp_path), limit_bytes=None)
  path = pathlib.Path(cache.use("set")[0]) / "x.tfrecord"
  path.with_name("x.tfrecord.10.partial").write_bytes(partial)
  checksum = storage.crc32c_of(content)
  shard = shard_cache.Remote(f"{bucket}/x.tfrecord", str(path), 10, checksum)
  cache.acquire(shard, stop=threading.Event())
  assert path.read_bytes() == content
  assert bucket.traffic.bytes_read() == fetched


def test_a_shard_of_another_length_than_it_should_have_is_fetched_again(
  bucket, tmp_path
):
  write(f"{bucket}/faces")
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    opened.wait()
  path = next(tmp_path.rglob("train-00003-*.tfrecord"))
  whole = path.read_bytes()
  path.write_bytes(whole[:100])
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    opened.wait()
    assert path.read_bytes() == whole


@pytest.fixture
def get(bucket, tmp_path):
  """Takes a file of 300 bytes into a cache of 1000, by its letter."""
  cache = shard_cache.ShardCache(str(tmp_path), limit_bytes=1000)
  folder, lock = cache.use("set")
  for name in "abcd":
    storage.write_bytes(f"{bucket}/{name}.tfrecord", name.encode() * 300)

  def acquire_one(name: str) -> object:
    path = pathlib.Path(folder) / f"{name}.tfrecord"
    return acquire(cache, f"{bucket}/{name}.tfrecord", path)

  yield acquire_one
  os.close(lock)


def test_the_least_recently_used_shard_is_evicted(get, tmp_path):
  for name in "abcad":
    get(name)
  assert sorted(shards_in(tmp_path)) == ["a.tfrecord", "c.tfrecord", "d.tfrecord"]


def test_a_file_in_use_is_never_evicted(get, tmp_path):
  held = [get(name) for name in "abc"]
  with pytest.raises(
    shard_cache.NoRoomError,
    match=r"files of 9e-07 GB are in use at once, 3e-07 GB more are needed, --cache_gb",
  ):
    get("d")
  del held[1]
  get("d")
  assert sorted(shards_in(tmp_path)) == ["a.tfrecord", "c.tfrecord", "d.tfrecord"]


def test_an_unused_set_is_evicted_for_another(bucket, tmp_path):
  made = [write(f"{bucket}/{seed}", seed=seed) for seed in range(2)]
  total = max(sum(shard.bytes for shard in one.shards) for one in made)
  limit = 1.3 * total + 30_000  # indexes and manifests count too
  for seed in range(2):
    with staged_dataset.open_set(
      f"{bucket}/{seed}", str(tmp_path), cache_gb=limit / 1e9
    ) as opened:
      opened.wait()
      assert bytes_in(tmp_path) <= limit
  second = f"noise-{made[1].fingerprint}"
  here = {path.name for path in (tmp_path / second).glob("*.tfrecord")}
  assert here == {shard.name for shard in made[1].shards}


@pytest.mark.parametrize("range_samples", [8, 512])
def test_a_set_larger_than_the_cache_is_fetched_and_evicted_in_block_order(
  bucket, tmp_path, monkeypatch, range_samples
):
  monkeypatch.setattr(prefetch, "_RANGE_SAMPLES", range_samples)
  made = write(f"{bucket}/faces")
  write(str(tmp_path / "original"))
  original = local_reader.open_reader(str(tmp_path / "original"), "train")
  total = sum(shard.bytes for shard in made.shards)
  cache = tmp_path / "cache"
  limit = 0.55 * total + 30_000
  sample_order = blocks_of_ten()
  with staged_dataset.open_set(
    f"{bucket}/faces", str(cache), cache_gb=limit / 1e9
  ) as opened:
    opened.follow("train", sample_order, start_step=0, worker=0, num_workers=1)
    staged = train_of(opened)
    for step in range(75):  # three epochs
      opened.reached(step)
      ids = sample_order.batch_at(step).records
      assert staged.read(ids)[0] == original.read(ids)[0]
      # a file that goes while others are counted may be counted with what follows it
      assert min(bytes_in(cache) for _ in range(3)) <= limit
    val = local_reader.open_reader(opened.folder, "val", files=opened.files("val"))
    assert val.read(np.arange(10))[1].shape == (10,)


def test_a_cache_too_small_for_single_records_is_refused_with_the_numbers(
  bucket, tmp_path, monkeypatch
):
  monkeypatch.setattr(prefetch, "_RANGE_SAMPLES", 8)
  made = write(f"{bucket}/faces")
  total = sum(shard.bytes for shard in made.shards)
  with (
    staged_dataset.open_set(
      f"{bucket}/faces", str(tmp_path), cache_gb=0.3 * total / 1e9
    ) as opened,
    pytest.raises(
      errors.DataError,
      match=r"--cache_gb=\S+ holds too little of the \S+ GB of gs://faces/faces: in "
      r"this order each byte would be fetched \d+ times; give --cache_gb=1, a "
      r"--shuffle_block of 10 records \(a shard's\) or more, or --read_mode=stream",
    ),
  ):
    opened.follow(
      "train",
      epoch_sampler.EpochSampler(NUM_TRAIN, 4, 0),
      start_step=0,
      worker=0,
      num_workers=1,
    )


def test_a_whole_set_that_does_not_fit_is_refused_with_the_numbers(bucket, tmp_path):
  write(f"{bucket}/faces")
  with pytest.raises(
    errors.DataError, match=r"--cache_gb=1e-05 does not hold the .* GB"
  ):
    staged_dataset.stage(f"{bucket}/faces", str(tmp_path), cache_gb=1e-5)


def test_reading_starts_before_all_shards_are_fetched(bucket, tmp_path):
  write(f"{bucket}/faces")
  sample_order = blocks_of_ten()
  plan = prefetch.prefetch_order(
    sample_order, np.arange(0, 101, 10), start_step=0, worker=0, num_workers=1
  )
  first, *_, last = next(plan).shards
  name = f"train-{last:05d}-of-{NUM_SHARDS:05d}.tfrecord"
  bucket.faults.always(status=503, matching=f"*{name}")
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    opened.follow("train", sample_order, start_step=0, worker=0, num_workers=1)
    staged = train_of(opened)
    staged.read(np.array([10 * first]))
    assert name not in shards_in(tmp_path)
    bucket.faults.clear()
    staged.read(np.array([10 * last]))  # waits for it
    assert name in shards_in(tmp_path)


def test_a_shard_that_cannot_be_fetched_fails_the_read_that_needs_it(bucket, tmp_path):
  write(f"{bucket}/faces")
  name = f"train-00004-of-{NUM_SHARDS:05d}.tfrecord"
  storage.remove(f"{bucket}/faces/{name}")
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    staged = train_of(opened)
    with pytest.raises(errors.DataError, match=f"{name} does not exist"):
      staged.read(np.arange(40, 50))


def test_a_shard_with_a_corrupt_record_is_refused_or_left_to_its_readers(
  bucket, tmp_path
):
  made = write(f"{bucket}/faces")
  shard = made.splits["train"].shards[4]
  files.flip_byte(f"{bucket}/faces/{shard.name}", shard.bytes // 2 + 200)
  with (
    staged_dataset.open_set(f"{bucket}/faces", str(tmp_path / "strict")) as opened,
    pytest.raises(errors.DataError, match=f"{shard.name} is not the file .*: CRC mism"),
  ):
    opened.wait()
  bucket.traffic.clear()
  with staged_dataset.open_set(
    f"{bucket}/faces", str(tmp_path / "lenient"), accept_corrupt=True
  ) as opened:
    staged = train_of(opened)
    with pytest.raises(
      integrity.BadRecordError, match=r"record [456] at byte \d+: CRC mismatch"
    ):
      staged.read(np.arange(40, 50))
    others = [*range(40), *range(50, 100)]
    assert len(staged.read(np.array(others))[0]) == 90
  fetched = bucket.traffic.bytes_read(f"{bucket}/faces/{shard.name}")
  assert fetched == 2 * shard.bytes  # once more, in case the way was at fault


def rot(path: str) -> None:
  """Corrupts a local file in place."""
  with open(path, "r+b") as stream:
    stream.seek(MIDDLE)
    stream.write(bytes(100))


def read_all(opened: staged_dataset.StagedSet) -> list[bytes]:
  return train_of(opened).read(np.arange(100))[0]


@pytest.mark.parametrize("accept_corrupt", [False, True])
def test_a_corrupt_copy_whose_source_was_repaired_is_fetched_by_the_next_run(
  bucket, tmp_path, accept_corrupt
):
  shard = write(f"{bucket}/faces").splits["train"].shards[4]
  source = f"{bucket}/faces/{shard.name}"
  files.flip_byte(source, MIDDLE)
  with staged_dataset.open_set(
    f"{bucket}/faces", str(tmp_path), accept_corrupt=True
  ) as opened:
    for _ in range(2):
      with pytest.raises(
        integrity.BadRecordError,
        match=rf"^{source}, record 5 at byte .*; rebuild .* --only_shards=4\.$",
      ):
        read_all(opened)
    files.flip_byte(source, MIDDLE)
    bucket.traffic.clear()
  with (
    staged_dataset.open_set(
      f"{bucket}/faces", str(tmp_path), accept_corrupt=accept_corrupt
    ) as opened,
    pytest.raises(errors.CorruptCopyError),
  ):
    read_all(opened)
  with staged_dataset.open_set(
    f"{bucket}/faces", str(tmp_path), accept_corrupt=accept_corrupt
  ) as opened:
    assert len(read_all(opened)) == 100
  assert bucket.traffic.bytes_read(f"{bucket}/faces/{shard.name}") == shard.bytes


def test_a_corrupt_copy_is_removed_and_ends_all_that_read_it_with_a_restart_code(
  bucket, tmp_path
):
  shard = write(f"{bucket}/faces").splits["train"].shards[4]
  with (
    staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as one,
    staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as other,
  ):
    expected = read_all(one)
    assert read_all(other) == expected
    path = shard.path(one.folder)
    rot(path)
    bucket.traffic.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      for ended in [pool.submit(read_all, opened) for opened in [one, other] * 2]:
        with pytest.raises(
          errors.CorruptCopyError,
          match=rf"^{path} differed from {bucket}/faces/{shard.name} and has been "
          r"removed; a restart fetches it again\. .*disk of --cache_dir",
        ):
          ended.result()
  assert errors.CorruptCopyError.exit_code >= errors.FIRST_RESTART_CODE
  assert not os.path.exists(path)
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    assert read_all(opened) == expected
  assert bucket.traffic.bytes_read(f"{bucket}/faces/{shard.name}") == shard.bytes


def test_a_corrupt_copy_of_an_index_is_fetched_again(bucket, tmp_path):
  shard = write(f"{bucket}/faces").splits["train"].shards[4]
  for size in (0, -1):
    with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
      assert len(read_all(opened)) == 100
      path = shard.index_path(opened.folder)
    files.flip_byte(path, size)


def test_a_set_replaced_in_the_bucket_while_it_is_read_is_told_from_corruption(
  bucket, tmp_path
):
  write(f"{bucket}/faces")
  with staged_dataset.open_set(f"{bucket}/faces", str(tmp_path)) as opened:
    write(f"{bucket}/faces", seed=1)
    staged = train_of(opened)
    with pytest.raises(
      errors.DataError, match="gs://faces/faces was replaced while it was being read"
    ):
      staged.read(np.arange(100))


def test_a_fetcher_drops_what_it_prefetched_for_a_shard_that_is_read(bucket, tmp_path):
  made = write(f"{bucket}/faces")
  sizes = [shard.bytes for shard in made.splits["train"].shards]
  cache = shard_cache.ShardCache(str(tmp_path), limit_bytes=sum(sizes[:4]))
  folder, _ = cache.use("set")
  remotes = [
    shard_cache.Remote(
      shard.path(f"{bucket}/faces"), shard.path(folder), shard.bytes, shard.crc32c
    )
    for shard in made.splits["train"].shards
  ]
  fetcher = prefetch.ShardFetcher(cache, remotes, check_unchanged=lambda: None)
  fetcher.follow(
    iter([prefetch.StepRange(0, 1, 1, (0,)), prefetch.StepRange(1, 9, 9, (1, 2))])
  )
  for shard in range(3):
    fetcher.get(shard)
  for shard in (4, 5, 6, 7):
    assert fetcher.get(shard) is not None
  fetcher.close()


def test_a_full_disk_ends_in_one_line_with_the_fix(bucket, tmp_path, small_disk):
  storage.write_bytes(f"{bucket}/x.tfrecord", bytes(200_000))
  cache = shard_cache.ShardCache(str(small_disk), limit_bytes=None)
  folder, lock = cache.use("set")
  with pytest.raises(
    errors.DataError,
    match=r"the disk of --cache_dir=.*small is full; free some of it, name another",
  ):
    acquire(cache, f"{bucket}/x.tfrecord", pathlib.Path(folder) / "x.tfrecord")
  os.close(lock)


def test_a_cache_that_cannot_be_written_is_a_usage_error(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  cache = shard_cache.ShardCache(str(tmp_path / "file"), limit_bytes=None)
  with pytest.raises(errors.UsageError, match=r"--cache_dir=.*file cannot be written"):
    cache.use("set")


def test_a_file_that_was_completed_meanwhile_frees_no_bytes(tmp_path):
  path = tmp_path / "train.tfrecord"
  path.write_bytes(b"whole")
  partial = shard_cache.partial_name(str(path), 5)
  assert not shard_cache._evict(partial)  # was listed before it got its name
  assert path.exists()
  path.unlink()
  assert shard_cache._evict(partial)


def test_a_file_that_is_renamed_during_the_count_is_counted(tmp_path, monkeypatch):
  path = tmp_path / "train.tfrecord"
  partial = pathlib.Path(shard_cache.partial_name(str(path), 5))
  partial.write_bytes(b"wh")

  def finish(name):
    if name == str(partial):
      partial.rename(path)
      path.write_bytes(b"whole")
    return os.stat(name)

  other = types.SimpleNamespace(scandir=os.scandir, stat=finish)
  monkeypatch.setattr(shard_cache, "os", other)
  assert [entry.size for entry in shard_cache._entries(str(tmp_path))] == [5]
