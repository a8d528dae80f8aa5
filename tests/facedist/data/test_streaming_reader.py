"""Streamed records equal those of a disk, and each is fetched once."""

import dataclasses
import os

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import pipeline
from facedist.data.readers import local_reader, streaming_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.block_sampler import BlockSampler
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest
from tests import buckets, noise_sets
from tests.facedist.data import batches

NUM_TRAIN = 120
ORDER = BlockSampler(NUM_TRAIN, 8, seed=1, shuffle_block=7, streams=4, window_blocks=2)
SHARDS = [f"train-{number:05d}-of-00003.tfrecord" for number in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  """Shards of 40 records."""
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(folder, identities=5, images=24, val_images=4, shards=3)
  return folder


@pytest.fixture
def uploaded(folder: str, bucket: buckets.Bucket) -> buckets.Bucket:
  """The same shards in a bucket."""
  for name in os.listdir(folder):
    storage.upload(os.path.join(folder, name), storage.join(bucket, name))
  bucket.traffic.clear()
  return bucket


@pytest.fixture
def streamed(uploaded: buckets.Bucket) -> RecordReader:
  return streaming_reader.open_reader(uploaded, "train")


@pytest.fixture(scope="module")
def local(folder: str) -> RecordReader:
  return local_reader.open_reader(folder, "train")


def payload_requests(bucket: buckets.Bucket) -> int:
  return sum(
    exchange.path.endswith(".tfrecord") and exchange.body_bytes > 0
    for exchange in bucket.traffic.exchanges
  )


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_streamed_records_equal_those_of_the_disk(folder, local, uploaded, place):
  streamed = streaming_reader.open_reader(
    folder if place == "disk" else uploaded, "train"
  )
  assert streamed.manifest == local.manifest
  for ids in (np.arange(120), np.array([119, 0, 7, 7, 39, 40, 41]), np.zeros(0, int)):
    jpegs, labels = streamed.read(ids)
    expected, expected_labels = local.read(ids)
    assert jpegs == expected
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(streamed.read_batch(ids)[0], local.read_batch(ids)[0])


def test_neighbours_are_fetched_in_one_request_a_shard(streamed, uploaded):
  streamed.read(np.arange(30, 90))
  assert payload_requests(uploaded) == 3  # 30 to 39, 40 to 79, 80 to 89


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_together_fetch_each_payload_byte_once_an_epoch(
  folder, uploaded, num_workers
):
  end_step = 2 * NUM_TRAIN // ORDER.global_batch
  slice_size = ORDER.global_batch // num_workers
  seen = []
  for worker in range(num_workers):
    opened = streaming_reader.open_reader(uploaded, "train")
    prefetcher = opened.shards.prefetcher(
      ORDER, BatchShard(8, worker, num_workers, 1), first_step=0, end_step=end_step
    )
    for step in range(end_step):
      first = step * ORDER.global_batch + worker * slice_size
      positions = np.arange(first, first + slice_size)
      records = ORDER.samples_at(positions).records
      with prefetcher.batch(positions, records) as source:
        opened.read_batch(records, source)
      seen += records.tolist()
  assert sorted(seen) == sorted([*range(NUM_TRAIN)] * 2)
  stored = sum(os.path.getsize(os.path.join(folder, name)) for name in SHARDS)
  assert uploaded.traffic.bytes_read(f"{uploaded}/train-*.tfrecord") == 2 * stored
  # Of 18 blocks an epoch, streams cut 3 and shards 2, and one continues at record 0.
  assert payload_requests(uploaded) <= 2 * (18 + 3 + 2 + 1)


@pytest.mark.parametrize(
  ("num_workers", "local_replicas", "start_step"),
  [(1, 1, 0), (2, 1, 0), (4, 1, 13), (1, 2, 13)],
)
def test_streamed_batches_equal_those_of_the_disk_for_any_number_of_workers(
  local, streamed, num_workers, local_replicas, start_step
):
  expected = batches.training_steps(local, ORDER, 20, start_step=start_step)
  found = batches.training_steps(
    streamed,
    ORDER,
    20,
    start_step=start_step,
    num_workers=num_workers,
    local_replicas=local_replicas,
  )
  batches.assert_same(found, expected)


def test_validation_reads_a_batch_in_one_request(folder, uploaded):
  opened = streaming_reader.open_reader(uploaded, "val")
  dataset, num_steps = pipeline.evaluation_dataset(opened, global_batch=5)
  found = batches.joined(dataset.take(num_steps).as_numpy_iterator())
  expected = local_reader.open_reader(folder, "val").read(np.arange(20))[1]
  np.testing.assert_array_equal(found["label"], expected)
  assert payload_requests(uploaded) == num_steps


def test_a_shard_replaced_while_training_is_named(streamed, uploaded):
  streamed.read(np.array([50]))
  name = storage.join(uploaded, SHARDS[1])
  storage.write_bytes(name, storage.read_bytes(name))
  streamed.read(np.array([100]))
  with pytest.raises(errors.DataError, match=f"{name} was replaced"):
    streamed.read(np.array([51]))


def test_a_corrupt_record_is_named_by_shard_record_and_byte(streamed, uploaded):
  noise_sets.corrupt(uploaded, "train", 43)
  with pytest.raises(
    integrity.BadRecordError,
    match=rf"^{uploaded}/{SHARDS[1]}, record 3 at byte \d+: CRC mismatch; rebuild this "
    r"shard with --only_shards=1\.$",
  ) as caught:
    streamed.read_batch(np.arange(40, 50))
  assert caught.value.record == 43
  unchecked = streaming_reader.open_reader(uploaded, "train", verify_crc=False)
  assert len(unchecked.read(np.array([43]))[0]) == 1


def test_corrupt_records_are_replaced_alike_on_any_number_of_workers(
  streamed, uploaded
):
  noise_sets.corrupt(uploaded, "train", 80, 97, 119)
  alone, together = (
    batches.training_steps(
      streamed, ORDER, 15, num_workers=num_workers, on_bad_record="skip"
    )
    for num_workers in (1, 2)
  )
  batches.assert_same(together, alone)
  assert sum(step["damaged"].sum() for step in alone) == 3


@pytest.mark.parametrize(
  ("num_bytes", "reason"), [(1000, "is cut off: it has 1000 bytes"), (None, "does not")]
)
def test_a_shard_cut_off_or_missing_ends_training_that_skips_bad_records(
  uploaded, num_bytes, reason
):
  name = storage.join(uploaded, SHARDS[2])
  content = storage.read_bytes(name)
  storage.remove(name)
  if num_bytes is not None:
    storage.write_bytes(name, content[:num_bytes])
  uploaded.traffic.clear()
  load_errors = pipeline.LoadErrors()
  dataset = pipeline.training_dataset(
    streaming_reader.open_reader(uploaded, "train"),
    ORDER,
    seed=0,
    on_bad_record="skip",
    load_errors=load_errors,
  )
  with (
    pytest.raises(errors.DataError, match=f"^{name} {reason}.*"),
    load_errors.reraised(),
  ):
    list(dataset.take(15))
  assert uploaded.traffic.bytes_read(name) < 1000  # its first bytes, for what it is


def prefetcher_of(opened: RecordReader, order: EpochSampler, num_workers: int = 1):
  return opened.shards.prefetcher(
    order,
    BatchShard(order.global_batch, 0, num_workers, 1),
    first_step=0,
    end_step=None,
  )


@pytest.mark.parametrize(
  ("order", "num_workers", "reason"),
  [
    (EpochSampler(NUM_TRAIN, 8, seed=0), 1, r"--shuffle_block=1 .* try --shuffle"),
    (ORDER, 3, "--streams=4 does not divide over 3 wor"),
  ],
)
def test_an_order_that_cannot_be_streamed_is_refused(
  folder, order, num_workers, reason
):
  opened = streaming_reader.open_reader(folder, "train")
  with pytest.raises(errors.UsageError, match=reason):
    prefetcher_of(opened, order, num_workers=num_workers)


def test_a_memory_too_small_for_the_windows_is_refused_with_one_that_holds_them(
  tmp_path,
):
  content = noise_sets.write(tmp_path, identities=1, images=1)
  (shard,) = content.splits["train"].shards
  large = dataclasses.replace(shard, records=100_000, bytes=10_000 * 100_000)
  content.splits["train"] = manifest.Split(100_000, (large,))
  manifest.save(content, str(tmp_path))
  order = BlockSampler(100_000, 64, 0, shuffle_block=100, streams=8, window_blocks=4)
  # 16 windows of 400 records of 10,000 bytes are 61.04 MiB; an eighth is the index's.
  small = streaming_reader.open_reader(str(tmp_path), "train", memory_mb=69)
  with pytest.raises(errors.UsageError, match=r"=69 .* try --stream_memory_mb=70,"):
    prefetcher_of(small, order)
  # Half the streams need half of it.
  half = streaming_reader.open_reader(str(tmp_path), "train", memory_mb=35)
  prefetcher_of(half, order, num_workers=2)
