"""Streamed records equal those of a disk, and each is fetched once."""

import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.data import pipeline
from facedist.data.readers import local_reader, streaming_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.block_sampler import BlockSampler
from facedist.data.samplers.epoch_sampler import BatchShard, EpochSampler
from facedist.data.shards import integrity, manifest
from tests import buckets, noise_sets

SIZE = 16
NUM_TRAIN = 120
ORDER = BlockSampler(NUM_TRAIN, 8, seed=1, shuffle_block=7, streams=4, window_blocks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  """Shards of 40 records."""
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(
    folder, identities=5, images=NUM_TRAIN // 5, val_images=4, size=SIZE, shards=3
  )
  return folder


@pytest.fixture
def uploaded(folder: str, bucket: buckets.Bucket) -> buckets.Bucket:
  """The same shards in a bucket."""
  for name in os.listdir(folder):
    storage.upload(os.path.join(folder, name), storage.join(bucket, name))
  bucket.traffic.clear()
  return bucket


def shard_names() -> list[str]:
  return [f"train-{number:05d}-of-00003.tfrecord" for number in range(3)]


def payload_bytes(folder: str) -> int:
  return sum(os.path.getsize(os.path.join(folder, name)) for name in shard_names())


def payload_requests(bucket: buckets.Bucket) -> int:
  return sum(
    exchange.path.endswith(".tfrecord") and exchange.body_bytes > 0
    for exchange in bucket.traffic.exchanges
  )


def steps_of(
  opened: RecordReader,
  count: int,
  *,
  worker: int = 0,
  num_workers: int = 1,
  first_step: int = 0,
  **settings,
) -> list[dict[str, np.ndarray]]:
  dataset = pipeline.training_dataset(
    opened,
    ORDER,
    seed=2,
    start_step=first_step,
    end_step=first_step + count,
    worker=worker,
    num_workers=num_workers,
    **settings,
  )
  return list(dataset.take(count).as_numpy_iterator())


def test_streamed_records_equal_those_of_the_disk(folder, uploaded):
  local = local_reader.open_reader(folder, "train")
  streamed = streaming_reader.open_reader(uploaded, "train")
  assert streamed.num_records == NUM_TRAIN
  assert streamed.image_size == SIZE
  assert streamed.manifest == local.manifest
  for ids in (np.arange(120), np.array([119, 0, 7, 7, 39, 40, 41]), np.zeros(0, int)):
    jpegs, labels = streamed.read(ids)
    expected, expected_labels = local.read(ids)
    assert jpegs == expected
    np.testing.assert_array_equal(labels, expected_labels)
    images, _ = streamed.read_batch(ids)
    np.testing.assert_array_equal(images, local.read_batch(ids)[0])


def test_a_folder_on_a_disk_is_streamed_too(folder):
  streamed = streaming_reader.open_reader(folder, "train")
  expected = local_reader.open_reader(folder, "train").read_batch(np.arange(9))[0]
  np.testing.assert_array_equal(streamed.read_batch(np.arange(9))[0], expected)


def test_neighbours_are_fetched_in_one_request_a_shard(uploaded):
  streaming_reader.open_reader(uploaded, "train").read(np.arange(30, 90))
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
  read = uploaded.traffic.bytes_read(f"{uploaded}/train-*.tfrecord")
  assert read == 2 * payload_bytes(folder)
  # Of 18 blocks an epoch, streams cut 3 and shards 2, and one continues at record 0.
  assert payload_requests(uploaded) <= 2 * (18 + 3 + 2 + 1)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 13])
def test_streamed_batches_equal_those_of_the_disk_for_any_number_of_workers(
  folder, uploaded, num_workers, first_step
):
  expected = steps_of(
    local_reader.open_reader(folder, "train"), 20, first_step=first_step
  )
  parts = [
    steps_of(
      streaming_reader.open_reader(uploaded, "train"),
      20,
      worker=worker,
      num_workers=num_workers,
      first_step=first_step,
    )
    for worker in range(num_workers)
  ]
  for step, whole in enumerate(expected):
    for name in whole:
      together = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(together, whole[name], err_msg=name)


def test_failing_requests_change_nothing(folder, uploaded):
  expected = steps_of(local_reader.open_reader(folder, "train"), 20)
  uploaded.faults.rate(0.1, seed=3, delay_seconds=0.05)
  streamed = steps_of(streaming_reader.open_reader(uploaded, "train"), 20)
  assert sum(uploaded.traffic.faults().values()) > 0
  for first, second in zip(expected, streamed, strict=True):
    np.testing.assert_array_equal(first["image"], second["image"])


def test_validation_reads_a_batch_in_one_request(folder, uploaded):
  opened = streaming_reader.open_reader(uploaded, "val")
  dataset, num_steps = pipeline.evaluation_dataset(opened, global_batch=5)
  labels = [batch["label"] for batch in dataset.take(num_steps).as_numpy_iterator()]
  expected = local_reader.open_reader(folder, "val").read(np.arange(20))[1]
  np.testing.assert_array_equal(np.concatenate(labels), expected)
  assert payload_requests(uploaded) == num_steps


def test_a_shard_replaced_while_training_is_named(folder, uploaded):
  opened = streaming_reader.open_reader(uploaded, "train")
  opened.read(np.array([50]))
  name = storage.join(uploaded, shard_names()[1])
  storage.write_bytes(name, pathlib.Path(folder, shard_names()[1]).read_bytes())
  opened.read(np.array([100]))
  with pytest.raises(errors.DataError, match=f"{name} was replaced"):
    opened.read(np.array([51]))


def test_a_corrupt_record_is_named_by_shard_record_and_byte(folder, uploaded):
  rows = np.load(os.path.join(folder, "train-00001-of-00003.index.npy"))
  content = bytearray(pathlib.Path(folder, shard_names()[1]).read_bytes())
  content[int(rows["offset"][3]) + 40] ^= 1
  name = storage.join(uploaded, shard_names()[1])
  storage.write_bytes(name, bytes(content))
  with pytest.raises(integrity.BadRecordError) as caught:
    streaming_reader.open_reader(uploaded, "train").read_batch(np.arange(40, 50))
  assert str(caught.value) == (
    f"{name}, record 3 at byte {rows['offset'][3]}: CRC mismatch; rebuild this shard "
    "with --only_shards=1."
  )
  assert caught.value.record == 43
  unchecked = streaming_reader.open_reader(uploaded, "train", verify_crc=False)
  assert len(unchecked.read(np.array([43]))[0]) == 1


def test_corrupt_records_are_replaced_alike_on_any_number_of_workers(folder, uploaded):
  rows = np.load(os.path.join(folder, "train-00002-of-00003.index.npy"))
  content = bytearray(pathlib.Path(folder, shard_names()[2]).read_bytes())
  for record in (0, 17, 39):
    content[int(rows["offset"][record]) + 40] ^= 1
  storage.write_bytes(storage.join(uploaded, shard_names()[2]), bytes(content))
  alone = steps_of(
    streaming_reader.open_reader(uploaded, "train"), 15, on_bad_record="skip"
  )
  assert sum(step["damaged"].sum() for step in alone) == 3
  parts = [
    steps_of(
      streaming_reader.open_reader(uploaded, "train"),
      15,
      worker=worker,
      num_workers=2,
      on_bad_record="skip",
    )
    for worker in range(2)
  ]
  for step, whole in enumerate(alone):
    together = np.concatenate([part[step]["image"] for part in parts])
    np.testing.assert_array_equal(together, whole["image"])


@pytest.mark.parametrize("on_bad_record", ["fail", "skip"])
@pytest.mark.parametrize(
  ("change", "state"), [(-1000, "is cut off: it has"), (8, "is too long: it has")]
)
def test_a_shard_of_another_size_is_named_before_its_records_are_read(
  folder, uploaded, change, state, on_bad_record
):
  name = storage.join(uploaded, shard_names()[2])
  content = pathlib.Path(folder, shard_names()[2]).read_bytes()
  changed = content[:change] if change < 0 else content + bytes(change)
  storage.write_bytes(name, changed)
  uploaded.traffic.clear()
  load_errors = pipeline.LoadErrors()
  dataset = pipeline.training_dataset(
    streaming_reader.open_reader(uploaded, "train"),
    ORDER,
    seed=0,
    on_bad_record=on_bad_record,
    load_errors=load_errors,
  )
  with pytest.raises(errors.DataError) as caught, load_errors.reraised():
    list(dataset.take(15))
  assert str(caught.value) == (
    f"{name} {state} {len(changed)} bytes, the manifest says {len(content)}; copy it "
    "again or rebuild it."
  )
  assert uploaded.traffic.bytes_read(name) < 1000  # its first bytes, for what it is


def test_an_error_while_prefetching_ends_training_in_one_line(uploaded):
  storage.remove(storage.join(uploaded, shard_names()[2]))
  opened = streaming_reader.open_reader(uploaded, "train")
  load_errors = pipeline.LoadErrors()
  dataset = pipeline.training_dataset(opened, ORDER, seed=0, load_errors=load_errors)
  with (
    pytest.raises(errors.DataError, match=r"train-00002-of-00003.tfrecord does not"),
    load_errors.reraised(),
  ):
    list(dataset.take(15))


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
  described = noise_sets.write(tmp_path, identities=1, images=1, size=SIZE)
  (shard,) = described.splits["train"].shards
  large = manifest.Shard(
    name=shard.name,
    records=100_000,
    bytes=10_000 * 100_000,
    crc32c=0,
    index_name=shard.index_name,
    index_crc32c=0,
  )
  described.splits["train"] = manifest.Split(100_000, (large,))
  manifest.save(described, str(tmp_path))
  order = BlockSampler(100_000, 64, 0, shuffle_block=100, streams=8, window_blocks=4)
  # 16 windows of 400 records of 10,000 bytes are 61.04 MiB; an eighth is the index's.
  small = streaming_reader.open_reader(str(tmp_path), "train", memory_mb=69)
  with pytest.raises(errors.UsageError, match=r"=69 .* try --stream_memory_mb=70,"):
    prefetcher_of(small, order)
  # Half the streams need half of it.
  half = streaming_reader.open_reader(str(tmp_path), "train", memory_mb=35)
  with pytest.raises(errors.DataError):  # of the index, which is not that shard's
    half.read(np.array([0]))
  prefetcher_of(half, order, num_workers=2)


def test_a_batch_holds_the_images_of_its_records_for_each_replica(uploaded, folder):
  local = local_reader.open_reader(folder, "train")
  streamed = steps_of(
    streaming_reader.open_reader(uploaded, "train"), 8, local_replicas=2
  )
  for element, batch in enumerate(streamed):
    expected = ORDER.slice_at(element // 2, element % 2 * 4, element % 2 * 4 + 4)
    np.testing.assert_array_equal(batch["image"], local.read_batch(expected.records)[0])
  assert streamed[0]["image"].dtype == tf.uint8
