"""The cache that processes of a host share: fetched once, resumed, within its limit."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import noise
from facedist.data.cache import prefetch, shard_cache, staged_dataset
from facedist.data.readers import local_reader, record_reader, streaming_reader
from facedist.data.samplers import block_sampler, epoch_sampler
from facedist.data.shards import integrity, manifest, open_files
from tests import files, noise_sets

NUM_SHARDS = 10
NUM_TRAIN = 100
MIDDLE = 5000  # a byte of an image in every shard
BLOCKS = block_sampler.make_block_sampler(
  NUM_TRAIN, 4, 0, shuffle_block=10, streams=1, window_blocks=1
)


def write(folder: object, *, seed: int = 0) -> manifest.Manifest:
  return noise_sets.write(
    folder, identities=10, images=10, val_images=1, shards=NUM_SHARDS, seed=seed
  )


@pytest.fixture
def made(bucket) -> manifest.Manifest:
  """The set in the bucket."""
  return write(f"{bucket}/faces")


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
  return tmp_path / "cache"


@pytest.fixture
def open_faces(bucket, made, cache) -> Callable[..., staged_dataset.StagedSet]:
  return functools.partial(staged_dataset.open_set, f"{bucket}/faces", str(cache))


@pytest.fixture
def shard(made) -> manifest.Shard:
  """The shard of records 40 to 49."""
  return made.splits["train"].shards[4]


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


def staging_process(bucket: str, cache: pathlib.Path) -> subprocess.Popen:
  """Starts a process that stages the set in pieces of 500 bytes."""
  code = (
    "import sys; from facedist.data.cache import shard_cache, staged_dataset;"
    "shard_cache._CHUNK_BYTES = 500; staged_dataset.stage(*sys.argv[1:])"
  )
  return subprocess.Popen([sys.executable, "-c", code, f"{bucket}/faces", str(cache)])


def reader_of(
  opened: staged_dataset.StagedSet, split: str = "train"
) -> record_reader.RecordReader:
  return local_reader.open_reader(opened.folder, split, files=opened.files(split))


def read_all(opened: staged_dataset.StagedSet) -> list[bytes]:
  return reader_of(opened).read(np.arange(NUM_TRAIN))[0]


@pytest.mark.slow
def test_several_processes_fetch_each_file_once(bucket, made, cache):
  bucket.faults.rate(0.3, kinds=("delay",), delay_seconds=0.1)
  processes = [staging_process(bucket, cache) for _ in range(3)]
  try:
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  for shard in made.shards:
    assert bucket.traffic.bytes_read(f"{bucket}/faces/{shard.name}") == shard.bytes
    assert bucket.traffic.requests(f"{bucket}/faces/{shard.index_name}", "GET") <= 2


@pytest.mark.slow
def test_a_download_of_a_killed_process_is_resumed(bucket, made, open_faces, cache):
  def partial_bytes() -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.partial"))

  bucket.faults.always("delay", matching="*.tfrecord", method="GET", delay_seconds=0.1)
  process = staging_process(bucket, cache)
  while partial_bytes() < 9000:
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert partial_bytes() >= 9000
  bucket.faults.clear()
  bucket.traffic.clear()
  with open_faces() as opened:
    opened.wait()
    assert len(read_all(opened)) == NUM_TRAIN
  whole = sum(shard.bytes for shard in made.shards)
  assert sum(shards_in(cache).values()) == whole
  assert bucket.traffic.bytes_read("*.tfrecord") <= whole - 9000
  assert not partial_bytes()


@pytest.mark.parametrize(("partial", "fetched"), [(b"9876", 16), (b"0123", 6)])
def test_a_partial_file_is_completed_if_it_fits_and_else_fetched_again(
  get, bucket, cache, partial, fetched
):
  storage.write_bytes(f"{bucket}/x.tfrecord", b"0123456789")
  (cache / "set" / "x.tfrecord.10.partial").write_bytes(partial)
  get("x")
  assert (cache / "set" / "x.tfrecord").read_bytes() == b"0123456789"
  assert bucket.traffic.bytes_read(f"{bucket}/x.tfrecord") == 10 + fetched


def acquire(
  shards: shard_cache.ShardCache, source: str, folder: str
) -> open_files.OpenFile:
  content = storage.read_bytes(source)
  path = os.path.join(folder, os.path.basename(source))
  shard = shard_cache.Remote(source, path, len(content), storage.crc32c_of(content))
  return shards.acquire(shard, stop=threading.Event())


@pytest.fixture
def get(bucket, cache):
  """Takes a file into a cache of 1000 bytes, by its letter; a to d have 300 bytes."""
  shards = shard_cache.ShardCache(str(cache), limit_bytes=1000)
  folder, lock = shards.use("set")
  for name in "abcd":
    storage.write_bytes(f"{bucket}/{name}.tfrecord", name.encode() * 300)

  yield lambda name: acquire(shards, f"{bucket}/{name}.tfrecord", folder)
  os.close(lock)


def test_the_least_recently_used_shard_is_evicted(get, cache):
  for name in "abcad":
    get(name)
  assert sorted(shards_in(cache)) == ["a.tfrecord", "c.tfrecord", "d.tfrecord"]


def test_a_file_in_use_is_never_evicted(get, cache):
  held = [get(name) for name in "abc"]
  with pytest.raises(
    shard_cache.NoRoomError,
    match=r"files of 9e-07 GB are in use at once, 3e-07 GB more are needed, --cache_gb",
  ):
    get("d")
  del held[1]
  get("d")
  assert sorted(shards_in(cache)) == ["a.tfrecord", "c.tfrecord", "d.tfrecord"]


def test_a_full_disk_ends_in_one_line_with_the_fix(bucket, small_disk):
  storage.write_bytes(f"{bucket}/x.tfrecord", bytes(200_000))
  shards = shard_cache.ShardCache(str(small_disk), limit_bytes=None)
  with pytest.raises(
    errors.DataError,
    match=r"the disk of --cache_dir=.*small is full; free some of it, name another",
  ):
    acquire(shards, f"{bucket}/x.tfrecord", str(small_disk))


def test_an_unused_set_is_evicted_for_another(bucket, made, cache):
  other = write(f"{bucket}/other", seed=1)
  total = max(sum(shard.bytes for shard in one.shards) for one in (made, other))
  limit = 1.3 * total + 30_000  # indexes and manifests count too
  for name in ("faces", "other"):
    with staged_dataset.stage(f"{bucket}/{name}", str(cache), cache_gb=limit / 1e9):
      assert bytes_in(cache) <= limit
  kept = (cache / f"noise-{other.fingerprint}").glob("*.tfrecord")
  assert {path.name for path in kept} == {shard.name for shard in other.shards}


@pytest.mark.parametrize("range_samples", [8, 512])
def test_a_set_larger_than_the_cache_is_fetched_and_evicted_in_block_order(
  open_faces, made, cache, tmp_path, monkeypatch, range_samples
):
  monkeypatch.setattr(prefetch, "_RANGE_SAMPLES", range_samples)
  write(tmp_path / "original")
  original = local_reader.open_reader(str(tmp_path / "original"), "train")
  limit = 0.55 * sum(shard.bytes for shard in made.shards) + 30_000
  with open_faces(cache_gb=limit / 1e9) as opened:
    opened.follow("train", BLOCKS, start_step=0, worker=0, num_workers=1)
    staged = reader_of(opened)
    for step in range(50):  # two epochs
      opened.reached(step)
      ids = BLOCKS.batch_at(step).records
      assert staged.read(ids)[0] == original.read(ids)[0]
      # a file that goes while others are counted may be counted with what follows it
      assert min(bytes_in(cache) for _ in range(3)) <= limit
    assert reader_of(opened, "val").read(np.arange(10))[1].shape == (10,)


def test_a_cache_too_small_for_single_records_is_refused_with_the_numbers(
  open_faces, made, monkeypatch
):
  monkeypatch.setattr(prefetch, "_RANGE_SAMPLES", 8)
  total = sum(shard.bytes for shard in made.shards)
  sampler = epoch_sampler.EpochSampler(NUM_TRAIN, 4, 0)
  with (
    open_faces(cache_gb=0.3 * total / 1e9) as opened,
    pytest.raises(
      errors.DataError,
      match=r"--cache_gb=\S+ holds too little of the \S+ GB of gs://faces/faces: in "
      r"this order each byte would be fetched \d+ times; give --cache_gb=1, a "
      r"--shuffle_block of 10 records \(a shard's\) or more, or --read_mode=stream",
    ),
  ):
    opened.follow("train", sampler, start_step=0, worker=0, num_workers=1)


def test_a_whole_set_that_does_not_fit_is_refused_with_the_numbers(made, bucket, cache):
  with pytest.raises(
    errors.DataError, match=r"--cache_gb=1e-05 does not hold the .* GB"
  ):
    staged_dataset.stage(f"{bucket}/faces", str(cache), cache_gb=1e-5)


def test_reading_starts_before_all_shards_are_fetched(bucket, open_faces, cache):
  plan = prefetch.prefetch_order(
    BLOCKS, np.arange(0, 101, 10), start_step=0, worker=0, num_workers=1
  )
  first, *_, last = next(plan).shards
  name = f"train-{last:05d}-of-{NUM_SHARDS:05d}.tfrecord"
  bucket.faults.always(status=503, matching=f"*{name}")
  with open_faces() as opened:
    opened.follow("train", BLOCKS, start_step=0, worker=0, num_workers=1)
    staged = reader_of(opened)
    staged.read(np.array([10 * first]))
    assert name not in shards_in(cache)
    bucket.faults.clear()
    staged.read(np.array([10 * last]))  # waits for it
    assert name in shards_in(cache)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_staged_set_reads_as_the_original(open_faces, tmp_path, split):
  write(tmp_path / "original")
  original = local_reader.open_reader(str(tmp_path / "original"), split)
  ids = np.arange(original.num_records)
  with open_faces() as opened:
    staged = reader_of(opened, split).read_batch(ids)
    for ours, theirs in zip(staged, original.read_batch(ids), strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_a_local_folder_is_read_in_place(tmp_path, cache):
  write(tmp_path / "shards")
  with staged_dataset.stage(str(tmp_path / "shards"), str(cache)) as opened:
    assert opened.folder == str(tmp_path / "shards")
  assert not cache.exists()


def test_a_verification_set_is_staged_with_its_pairs(bucket, cache):
  noise.write_noise_verification_set(
    f"{bucket}/pairs", num_pairs=4, folds=2, image_size=16, seed=0
  )
  with staged_dataset.stage(f"{bucket}/pairs", str(cache)) as opened:
    assert os.path.exists(os.path.join(opened.folder, "pairs.npy"))


def test_a_selection_is_staged_with_shards_of_one_name_from_two_folders(
  bucket, made, cache, tmp_path
):
  shards, expected = [], []
  for name, content in (("faces", made), ("other", write(f"{bucket}/other", seed=1))):
    folder, shard = f"{bucket}/{name}", content.splits["train"].shards[0]
    index = storage.read_bytes(shard.index_path(folder))
    storage.write_bytes(str(tmp_path / "selection" / f"{name}.index.npy"), index)
    shards.append(
      dataclasses.replace(shard, folder=folder, index_name=f"{name}.index.npy")
    )
    expected += streaming_reader.open_reader(folder, "train").read(np.arange(10))[0]
  selection = dataclasses.replace(
    made, splits={"train": manifest.Split(20, tuple(shards))}, selection={}
  )
  manifest.save(selection, str(tmp_path / "selection"))
  with staged_dataset.stage(str(tmp_path / "selection"), str(cache)) as opened:
    staged = reader_of(opened)
    assert staged.manifest.fingerprint == selection.fingerprint
    assert staged.read(np.arange(20))[0] == expected


@pytest.mark.parametrize("content", [b"", None])
def test_a_second_start_downloads_only_what_is_missing_or_cut_off(
  bucket, open_faces, cache, shard, content
):
  with open_faces() as opened:
    opened.wait()
  path = next(cache.rglob(shard.name))
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  bucket.traffic.clear()
  with open_faces() as opened:
    opened.wait()
    assert path.stat().st_size == shard.bytes
  fetched = {one.path for one in bucket.traffic.exchanges if one.body_bytes}
  assert fetched == {f"{bucket}/faces/{name}" for name in ("manifest.json", shard.name)}


def test_a_shard_with_a_corrupt_record_is_refused_or_left_to_its_readers(
  bucket, open_faces, cache, shard
):
  source = f"{bucket}/faces/{shard.name}"
  files.flip_byte(source, MIDDLE)
  with (
    open_faces() as opened,
    pytest.raises(errors.DataError, match=f"{shard.name} is not the file .*: CRC mism"),
  ):
    opened.wait()
  assert not list(cache.rglob(f"{shard.name}*"))
  bucket.traffic.clear()
  with open_faces(accept_corrupt=True) as opened:
    staged = reader_of(opened)
    for _ in range(2):
      with pytest.raises(
        integrity.BadRecordError,
        match=rf"^{source}, record 5 at byte .*; rebuild .* --only_shards=4\.$",
      ):
        staged.read(np.arange(40, 50))
    others = [*range(40), *range(50, 100)]
    assert len(staged.read(np.array(others))[0]) == 90
  # Once more, in case the way was at fault.
  assert bucket.traffic.bytes_read(source) == 2 * shard.bytes


@pytest.mark.parametrize("accept_corrupt", [False, True])
def test_a_corrupt_copy_whose_source_was_repaired_is_fetched_by_the_next_run(
  bucket, open_faces, shard, accept_corrupt
):
  source = f"{bucket}/faces/{shard.name}"
  files.flip_byte(source, MIDDLE)
  with (
    open_faces(accept_corrupt=True) as opened,
    pytest.raises(integrity.BadRecordError),
  ):
    read_all(opened)
  files.flip_byte(source, MIDDLE)
  bucket.traffic.clear()
  with (
    open_faces(accept_corrupt=accept_corrupt) as opened,
    pytest.raises(errors.CorruptCopyError),
  ):
    read_all(opened)
  with open_faces(accept_corrupt=accept_corrupt) as opened:
    assert len(read_all(opened)) == 100
  assert bucket.traffic.bytes_read(source) == shard.bytes


def test_a_corrupt_copy_is_removed_and_ends_all_that_read_it_with_a_restart_code(
  bucket, open_faces, shard
):
  source = f"{bucket}/faces/{shard.name}"
  with open_faces() as one, open_faces() as other:
    expected = read_all(one)
    assert read_all(other) == expected
    path = shard.path(one.folder)
    with open(path, "r+b") as stream:  # in place
      stream.seek(MIDDLE)
      stream.write(bytes(100))
    bucket.traffic.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      for ended in [pool.submit(read_all, opened) for opened in [one, other] * 2]:
        with pytest.raises(
          errors.CorruptCopyError,
          match=rf"^{path} differed from {source} and has been removed; a restart "
          r"fetches it again\. .*disk of --cache_dir",
        ):
          ended.result()
  assert errors.CorruptCopyError.exit_code >= errors.FIRST_RESTART_CODE
  assert not os.path.exists(path)
  with open_faces() as opened:
    assert read_all(opened) == expected
  assert bucket.traffic.bytes_read(source) == shard.bytes


def test_a_corrupt_copy_of_an_index_is_fetched_again(open_faces, shard):
  for place in (0, -1):
    with open_faces() as opened:
      assert len(read_all(opened)) == 100
      files.flip_byte(shard.index_path(opened.folder), place)
  with open_faces() as opened:
    assert len(read_all(opened)) == 100


def test_a_set_replaced_in_the_bucket_while_it_is_read_is_told_from_corruption(
  bucket, open_faces
):
  with open_faces() as opened:
    write(f"{bucket}/faces", seed=1)
    with pytest.raises(
      errors.DataError, match="gs://faces/faces was replaced while it was being read"
    ):
      read_all(opened)


def test_what_was_prefetched_makes_room_for_a_shard_that_is_read(open_faces, made):
  limit = sum(shard.bytes for shard in made.shards[:5]) + 30_000
  with open_faces(cache_gb=limit / 1e9) as opened:
    opened.follow("train", BLOCKS, start_step=0, worker=0, num_workers=1)
    staged = reader_of(opened)
    for first in (0, 30, 60, 90):  # a shard each, not in that order
      staged.read(np.arange(first, first + 10))


def test_a_cache_that_cannot_be_written_is_a_usage_error(made, cache, open_faces):
  cache.write_bytes(b"")
  with pytest.raises(errors.UsageError, match=r"--cache_dir=.*cache cannot be written"):
    open_faces()


def test_a_file_that_was_completed_meanwhile_frees_no_bytes(tmp_path):
  path = tmp_path / "train.tfrecord"
  path.write_bytes(b"whole")
  partial = shard_cache.partial_name(str(path), 5)
  assert not shard_cache._evict(partial)  # was listed before it got its name
  assert path.exists()
  path.unlink()
  assert shard_cache._evict(partial)


def test_files_that_are_renamed_during_the_count_are_counted(tmp_path):
  for name in ("1.tfrecord", "2.tfrecord"):
    pathlib.Path(shard_cache.partial_name(str(tmp_path / name), 5)).write_bytes(b"wh")
  entries = shard_cache._entries(str(tmp_path))
  assert next(entries).size == 5  # both are listed now
  for partial in tmp_path.iterdir():
    partial.rename(str(partial).removesuffix(".5.partial"))
  assert [entry.size for entry in entries] == [5]
