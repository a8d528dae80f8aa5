"""The batches of a step: the same for any number of workers, and after a restart."""

import functools
import itertools
import pathlib
import threading

import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from facedist import errors
from facedist.data import augment, pipeline
from facedist.data.cache import shard_cache
from facedist.data.readers import batch_memory, local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers import epoch_sampler
from facedist.data.shards import integrity, tfrecord
from tests import files, noise_sets

SIZE = 16
NUM_TRAIN = 35
NUM_VAL = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(folder, identities=5, images=7, val_images=2, size=SIZE, shards=3)
  return folder


@pytest.fixture(scope="module")
def train(folder) -> RecordReader:
  return local_reader.open_reader(folder, "train")


@pytest.fixture(scope="module")
def val(folder) -> RecordReader:
  return local_reader.open_reader(folder, "val")


def error_of(train, monkeypatch, fail, expected: type) -> BaseException:
  """Lets a batch's load fail; returns what comes out of the data set."""
  monkeypatch.setattr(train, "read_batch", fail)
  load_errors = pipeline.LoadErrors()
  dataset, _ = pipeline.evaluation_dataset(
    train, global_batch=5, load_errors=load_errors
  )
  with pytest.raises(expected) as caught, load_errors.reraised():
    taken(dataset, 1)
  return caught.value


def taken(dataset: tf.data.Dataset, count: int) -> list[dict[str, np.ndarray]]:
  return list(dataset.take(count).as_numpy_iterator())


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def training_steps(
  train: RecordReader,
  count: int,
  *,
  global_batch: int = 8,
  num_workers: int = 1,
  local_replicas: int = 1,
  start_step: int = 0,
  num_threads: int = 3,
) -> list[dict[str, np.ndarray]]:
  """Returns the global batches of `count` steps, put together from all workers."""
  elements = [
    taken(
      pipeline.training_dataset(
        train,
        epoch_sampler.EpochSampler(train.num_records, global_batch, seed=1),
        seed=2,
        start_step=start_step,
        worker=worker,
        num_workers=num_workers,
        local_replicas=local_replicas,
        num_threads=num_threads,
      ),
      count * local_replicas,
    )
    for worker in range(num_workers)
  ]
  return [
    joined(
      [
        element
        for of_worker in elements
        for element in of_worker[step * local_replicas :][:local_replicas]
      ]
    )
    for step in range(count)
  ]


def records_of(reader: RecordReader, images: np.ndarray) -> list[int]:
  """Returns the numbers of the records that have these images, each another."""
  every, _ = reader.read_batch(np.arange(reader.num_records))
  numbers = {image.tobytes(): number for number, image in enumerate(every)}
  assert len(numbers) == reader.num_records
  return [numbers[image.tobytes()] for image in np.asarray(images)]


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize(
  ("num_workers", "local_replicas", "num_threads"),
  [
    *((2, 1, 3), (4, 1, 3), (1, 4, 3), (2, 2, 3), (1, 8, 3), (8, 1, 3)),
    *((1, 1, 1), (1, 1, 8)),
  ],
)
def test_steps_are_the_same_on_any_number_of_workers_and_threads(
  train, num_workers, local_replicas, num_threads
):
  alone = training_steps(train, 20)
  together = training_steps(
    train,
    20,
    num_workers=num_workers,
    local_replicas=local_replicas,
    num_threads=num_threads,
  )
  for first, second in zip(alone, together, strict=True):
    assert_same(first, second)


@settings(max_examples=10)
@given(start_step=st.integers(0, 30), num_workers=st.sampled_from([1, 2, 4]))
def test_resuming_at_any_step_yields_the_same_batches(train, start_step, num_workers):
  whole = training_steps(train, 32)[start_step : start_step + 2]
  resumed = training_steps(
    train, len(whole), start_step=start_step, num_workers=num_workers
  )
  for first, second in zip(whole, resumed, strict=True):
    assert_same(first, second)


@pytest.mark.parametrize("global_batch", [1, 7, 8, 35, 48, 80])
def test_each_record_comes_exactly_once_an_epoch(train, global_batch):
  num_steps = -(-3 * NUM_TRAIN // global_batch)
  steps = joined(training_steps(train, num_steps, global_batch=global_batch))
  for epoch in range(3):
    seen = steps["image"][epoch * NUM_TRAIN :][:NUM_TRAIN]
    assert sorted(records_of(train, seen)) == list(range(NUM_TRAIN))


def test_a_batch_holds_the_images_and_labels_of_its_records(train, folder):
  names = sorted(str(path) for path in pathlib.Path(folder).glob("train-*.tfrecord"))
  payloads = tf.data.TFRecordDataset(names).as_numpy_iterator()
  stored = [tfrecord.parse(payload) for payload in payloads]
  (batch,) = training_steps(train, 1, global_batch=NUM_TRAIN)
  records = epoch_sampler.EpochSampler(NUM_TRAIN, NUM_TRAIN, seed=1).batch_at(0).records
  for place, record in enumerate(records):
    assert batch["label"][place] == stored[record].label
    expected = simplejpeg.decode_jpeg(stored[record].jpeg)
    np.testing.assert_array_equal(batch["image"][place], expected)


def test_draws_are_those_of_seed_record_and_epoch(train):
  steps = training_steps(train, 5, global_batch=21)
  epochs = np.arange(5 * 21) // NUM_TRAIN
  drawn = joined(steps)
  expected = augment.draws(2, np.array(records_of(train, drawn["image"])), epochs)
  np.testing.assert_array_equal(drawn["draws"], expected)


def test_data_sets_are_infinite_and_of_fixed_shape(train, val):
  training = pipeline.training_dataset(
    train, epoch_sampler.EpochSampler(NUM_TRAIN, 8, 0), seed=0, local_replicas=2
  )
  validation, _ = pipeline.evaluation_dataset(val, global_batch=8, num_workers=2)
  image = tf.TensorSpec([4, SIZE, SIZE, 3], tf.uint8)
  label = tf.TensorSpec([4], tf.int32)
  for dataset in (training, validation):
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    assert dataset.element_spec["image"] == image
    assert dataset.element_spec["label"] == label
  assert "record" not in training.element_spec  # nothing that no replica reads
  draws = tf.TensorSpec([4, augment.NUM_DRAWS], tf.float32)
  assert training.element_spec["draws"] == draws
  assert validation.element_spec["weight"] == tf.TensorSpec([4], tf.float32)


def test_files_are_not_sharded_and_order_is_kept(train):
  options = pipeline.training_dataset(
    train, epoch_sampler.EpochSampler(NUM_TRAIN, 8, 0), seed=0, num_threads=5
  ).options()
  policy = options.experimental_distribute.auto_shard_policy
  assert policy == tf.data.experimental.AutoShardPolicy.OFF
  assert options.deterministic is True
  assert options.threading.private_threadpool_size == 5


@pytest.mark.parametrize(
  ("global_batch", "num_workers", "local_replicas"),
  [(4, 1, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2), (10, 1, 1), (12, 1, 1), (40, 2, 2)],
)
def test_validation_holds_every_record_once(
  val, global_batch, num_workers, local_replicas
):
  parts = []
  for worker in range(num_workers):
    dataset, num_steps = pipeline.evaluation_dataset(
      val,
      global_batch=global_batch,
      worker=worker,
      num_workers=num_workers,
      local_replicas=local_replicas,
    )
    assert num_steps == -(-NUM_VAL // global_batch)
    parts.append(taken(dataset, num_steps * local_replicas))
  steps = [
    part[step * local_replicas + replica]
    for step in range(num_steps)
    for part in parts
    for replica in range(local_replicas)
  ]
  batch = joined(steps)
  images, labels = val.read_batch(np.arange(NUM_VAL))
  padding = len(batch["label"]) - NUM_VAL
  np.testing.assert_array_equal(batch["weight"], [1] * NUM_VAL + [0] * padding)
  np.testing.assert_array_equal(batch["image"][:NUM_VAL], images)
  np.testing.assert_array_equal(batch["label"][:NUM_VAL], labels)
  assert not batch["image"][NUM_VAL:].any()


def test_validation_continues_with_padding_after_its_last_step(val):
  dataset, num_steps = pipeline.evaluation_dataset(val, global_batch=4)
  after = taken(dataset, num_steps + 3)[num_steps:]
  assert all(not batch["weight"].any() for batch in after)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(train, val):
  message = (
    r"--global_batch=10 does not divide over 4 replicas \(2 workers x 2\); "
    r"try --global_batch=8\."
  )
  cluster = {"num_workers": 2, "local_replicas": 2}
  with pytest.raises(errors.UsageError, match=message):
    pipeline.training_dataset(
      train, epoch_sampler.EpochSampler(NUM_TRAIN, 10, 0), seed=0, **cluster
    )
  with pytest.raises(errors.UsageError, match=message):
    pipeline.evaluation_dataset(val, global_batch=10, **cluster)


def test_tensorflow_uses_a_batch_without_a_copy():
  handed_over = []

  def load(_: np.ndarray) -> tuple[np.ndarray, ...]:
    images = batch_memory.BatchMemory().empty((4, SIZE, SIZE, 3))
    images[:] = len(handed_over)
    handed_over.append(images.ctypes.data)
    return (images,)

  signature = {"image": tf.TensorSpec([4, SIZE, SIZE, 3], tf.uint8)}
  dataset = pipeline._dataset(load, signature, load_errors=None, ahead=1, num_threads=1)
  for number, batch in enumerate(itertools.islice(dataset, 3)):
    address = np.asarray(memoryview(batch["image"])).ctypes.data
    assert address == handed_over[number]


def test_batches_kept_for_long_are_not_overwritten(train):
  sample_order = epoch_sampler.EpochSampler(NUM_TRAIN, 8, seed=0)
  dataset = pipeline.training_dataset(train, sample_order, seed=0, num_threads=4)
  kept = list(dataset.take(40))
  for step, batch in enumerate(kept):
    images, _ = train.read_batch(sample_order.batch_at(step).records)
    np.testing.assert_array_equal(batch["image"], images)


def test_replicas_of_a_strategy_get_their_slices_in_order(train, two_replicas):
  sample_order = epoch_sampler.EpochSampler(NUM_TRAIN, 8, seed=1)
  iterator = iter(
    two_replicas.distribute_datasets_from_function(
      lambda _: pipeline.training_dataset(train, sample_order, seed=2, local_replicas=2)
    )
  )

  @tf.function
  def step(batches):
    return two_replicas.run(lambda batch: batch["image"], (next(batches),))

  for number in range(6):
    slices = two_replicas.experimental_local_results(step(iterator))
    expected = sample_order.batch_at(number).records
    np.testing.assert_array_equal(records_of(train, np.concatenate(slices)), expected)


@pytest.fixture
def corrupt(folder, tmp_path) -> RecordReader:
  """The training split with one byte of its last record changed."""
  for path in pathlib.Path(folder).iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  path = tmp_path / "train-00002-of-00003.tfrecord"
  files.flip_byte(path, -9)
  return local_reader.open_reader(str(tmp_path), "train")


def test_a_corrupt_record_is_a_data_error_of_one_line(corrupt):
  load_errors = pipeline.LoadErrors()
  dataset = pipeline.training_dataset(
    corrupt,
    epoch_sampler.EpochSampler(NUM_TRAIN, 5, 0),
    seed=0,
    load_errors=load_errors,
  )
  with pytest.raises(errors.DataError) as caught, load_errors.reraised():
    taken(dataset, 7)
  with pytest.raises(errors.DataError) as direct:
    corrupt.read(np.array([NUM_TRAIN - 1]))
  assert str(caught.value) == str(direct.value)
  assert "\n" not in str(caught.value)


def test_a_corrupt_record_is_a_data_error_inside_a_replica_step(corrupt, two_replicas):
  load_errors = pipeline.LoadErrors()
  iterator = iter(
    two_replicas.distribute_datasets_from_function(
      lambda _: pipeline.training_dataset(
        corrupt,
        epoch_sampler.EpochSampler(NUM_TRAIN, 10, 0),
        seed=0,
        local_replicas=2,
        load_errors=load_errors,
      )
    )
  )

  @tf.function
  def steps(batches):
    total = tf.constant(0)
    for _ in tf.range(4):
      per_replica = two_replicas.run(
        lambda batch: tf.reduce_sum(batch["label"]), (next(batches),)
      )
      total += two_replicas.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)
    return total

  with (
    pytest.raises(errors.DataError, match=r"record \d+ at byte \d+: CRC mismatch"),
    load_errors.reraised(),
  ):
    steps(iterator)


@pytest.mark.parametrize(
  "error",
  [
    *(errors.UnreachableError, errors.UsageError, errors.DataError),
    functools.partial(integrity.BadRecordError, 3),
  ],
)
def test_an_error_inside_a_data_set_is_raised_unchanged(train, monkeypatch, error):
  raised = error("gs://faces/a: no success; check the network.")

  def fail(ids: np.ndarray, source: object) -> None:
    raise raised from shard_cache.NoRoomError("the cause")

  assert error_of(train, monkeypatch, fail, errors.FacedistError) is raised


def test_of_several_errors_the_one_of_the_first_batch_is_raised(train, monkeypatch):
  later_has_failed = threading.Event()

  def fail(ids: np.ndarray, source: object) -> None:
    if ids[0] == 0:
      later_has_failed.wait(10)
      raise errors.DataError("first")
    later_has_failed.set()
    raise errors.UnreachableError("later")

  assert str(error_of(train, monkeypatch, fail, errors.DataError)) == "first"


@pytest.mark.parametrize(
  "error",
  [
    tf.errors.UnavailableError(None, None, "Socket closed"),
    tf.errors.UnknownError(None, None, "of no data set"),
    KeyError("x"),
  ],
)
def test_errors_of_no_data_set_are_unchanged(error):
  with pytest.raises(type(error)), pipeline.LoadErrors().reraised():
    raise error


def test_a_bug_in_loading_is_tensorflows_error(train, monkeypatch):
  def fail(ids: np.ndarray, source: object) -> None:
    raise KeyError("a bug")

  assert "a bug" in str(error_of(train, monkeypatch, fail, tf.errors.UnknownError))
