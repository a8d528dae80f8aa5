"""The batches of a step: the same for any number of workers, and after a restart."""

import functools
import threading
import types
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.data import augment, pipeline
from facedist.data.cache import shard_cache
from facedist.data.readers import batch_memory, local_reader
from facedist.data.readers.record_reader import RecordReader
from facedist.data.samplers.epoch_sampler import EpochSampler
from facedist.data.shards import integrity
from tests import files, noise_sets
from tests.facedist.data import batches

SIZE = 16
NUM_TRAIN = 35
NUM_VAL = 10
SAMPLER = EpochSampler(NUM_TRAIN, 8, seed=1)


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


@pytest.fixture(scope="module")
def steps(train) -> list[batches.Batch]:
  """Steps of one worker."""
  return batches.training_steps(train, SAMPLER, 32)


@pytest.mark.parametrize(
  ("start_step", "num_workers", "local_replicas", "num_threads"),
  [
    (0, 2, 1, 3),
    (1, 1, 4, 3),
    (4, 2, 2, 3),
    (9, 8, 1, 3),
    (11, 1, 1, 1),
    (16, 1, 1, 8),
  ],
)
def test_steps_are_the_same_on_any_number_of_workers_and_from_any_step(
  train, steps, start_step, num_workers, local_replicas, num_threads
):
  resumed = batches.training_steps(
    train,
    SAMPLER,
    16,
    start_step=start_step,
    num_workers=num_workers,
    local_replicas=local_replicas,
    num_threads=num_threads,
  )
  batches.assert_same(resumed, steps[start_step:][:16])


@pytest.mark.parametrize("global_batch", [7, 48])
def test_samples_have_images_labels_and_draws_of_their_record_and_epoch(
  train, global_batch
):
  sampler = EpochSampler(NUM_TRAIN, global_batch, seed=1)
  start_step = 2048 // global_batch - 5  # so many samples are planned at once
  dataset = pipeline.training_dataset(
    train, sampler, seed=2, start_step=start_step, num_threads=4
  )
  for step, batch in enumerate(list(dataset.take(40)), start_step):  # all are kept
    samples = sampler.batch_at(step)
    images, labels = train.read_batch(samples.records)
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(batch["label"], labels)
    expected = augment.draws(2, samples.records, samples.epochs)
    np.testing.assert_array_equal(batch["draws"], expected)


def test_data_sets_are_infinite_unsharded_in_order_and_of_fixed_shape(train, val):
  training = pipeline.training_dataset(
    train, SAMPLER, seed=0, local_replicas=2, num_threads=5
  )
  validation, _ = pipeline.evaluation_dataset(val, global_batch=8, num_workers=2)
  both = {
    "image": tf.TensorSpec([4, SIZE, SIZE, 3], tf.uint8),
    "label": tf.TensorSpec([4], tf.int32),
    "damaged": tf.TensorSpec([4], tf.float32),
  }
  draws = tf.TensorSpec([4, augment.NUM_DRAWS], tf.float32)
  assert training.element_spec == both | {"draws": draws}
  assert validation.element_spec == both | {"weight": tf.TensorSpec([4], tf.float32)}
  for dataset in (training, validation):
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    policy = dataset.options().experimental_distribute.auto_shard_policy
    assert policy == tf.data.experimental.AutoShardPolicy.OFF
    assert dataset.options().deterministic is True
  assert training.options().threading.private_threadpool_size == 5


@pytest.mark.parametrize(
  ("global_batch", "num_workers", "local_replicas"),
  [(4, 1, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2), (10, 1, 1), (12, 1, 1), (40, 2, 2)],
)
def test_validation_holds_every_record_once_and_then_padding(
  val, global_batch, num_workers, local_replicas
):
  cluster = {"num_workers": num_workers, "local_replicas": local_replicas}
  num_steps = -(-NUM_VAL // global_batch)

  def dataset_of(worker: int) -> tf.data.Dataset:
    dataset, of_all = pipeline.evaluation_dataset(
      val, global_batch=global_batch, worker=worker, **cluster
    )
    assert of_all == num_steps
    return dataset

  batch = batches.joined(batches.global_batches(dataset_of, num_steps + 2, **cluster))
  images, labels = val.read_batch(np.arange(NUM_VAL))
  padding = (num_steps + 2) * global_batch - NUM_VAL
  np.testing.assert_array_equal(batch["weight"], [1] * NUM_VAL + [0] * padding)
  np.testing.assert_array_equal(batch["image"][:NUM_VAL], images)
  np.testing.assert_array_equal(batch["label"][:NUM_VAL], labels)
  assert not batch["image"][NUM_VAL:].any()


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(train, val):
  cluster = {"num_workers": 2, "local_replicas": 2}
  message = (
    r"--global_batch=10 does not divide over 4 replicas \(2 workers x 2\); "
    r"try --global_batch=8\."
  )
  with pytest.raises(errors.UsageError, match=message):
    pipeline.training_dataset(train, EpochSampler(NUM_TRAIN, 10, 0), seed=0, **cluster)
  with pytest.raises(errors.UsageError, match=message):
    pipeline.evaluation_dataset(val, global_batch=10, **cluster)


def test_tensorflow_uses_a_batch_without_a_copy(folder):
  class Noting(batch_memory.BatchMemory):
    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
      array = super().empty(shape)
      lent.append(array.ctypes.data)
      return array

  lent: list[int] = []
  reader = local_reader.open_reader(folder, "train")
  reader.memory = Noting()
  dataset = pipeline.training_dataset(reader, SAMPLER, seed=0, num_threads=1)
  kept = list(dataset.take(3))
  used = [np.asarray(memoryview(batch["image"])).ctypes.data for batch in kept]
  assert used == lent[:3]


def test_replicas_of_a_strategy_get_their_slices_in_order(train, steps, two_replicas):
  iterator = iter(
    two_replicas.distribute_datasets_from_function(
      lambda _: pipeline.training_dataset(train, SAMPLER, seed=2, local_replicas=2)
    )
  )

  @tf.function
  def next_images():
    return two_replicas.run(lambda batch: batch["image"], (next(iterator),))

  for step in steps[:6]:
    slices = two_replicas.experimental_local_results(next_images())
    np.testing.assert_array_equal(np.concatenate(slices), step["image"])


def test_a_corrupt_record_is_a_data_error_inside_a_replica_step(tmp_path, two_replicas):
  noise_sets.write(tmp_path, identities=5, images=7, size=SIZE)
  files.flip_byte(tmp_path / "train-00000-of-00001.tfrecord", -9)
  load_errors = pipeline.LoadErrors()
  iterator = iter(
    two_replicas.distribute_datasets_from_function(
      lambda _: pipeline.training_dataset(
        local_reader.open_reader(str(tmp_path), "train"),
        EpochSampler(NUM_TRAIN, 10, 0),
        seed=0,
        local_replicas=2,
        load_errors=load_errors,
      )
    )
  )

  @tf.function
  def steps(batches):
    for _ in tf.range(4):
      two_replicas.run(lambda batch: batch["label"], (next(batches),))

  with (
    pytest.raises(errors.DataError, match=r"^.*, record 34 at byte \d+: CRC .*\.$"),
    load_errors.reraised(),
  ):
    steps(iterator)


def error_of(fail: Callable[..., object], expected: type) -> BaseException:
  """Returns what comes out of the data set of a reader that fails."""
  reader = types.SimpleNamespace(num_records=10, image_size=SIZE, read_batch=fail)
  load_errors = pipeline.LoadErrors()
  dataset, _ = pipeline.evaluation_dataset(
    reader, global_batch=5, load_errors=load_errors
  )
  with pytest.raises(expected) as caught, load_errors.reraised():
    next(iter(dataset))
  return caught.value


@pytest.mark.parametrize(
  "error",
  [
    *(errors.UnreachableError, errors.UsageError, errors.DataError),
    functools.partial(integrity.BadRecordError, 3),
  ],
)
def test_an_error_inside_a_data_set_is_raised_unchanged(error):
  raised = error("gs://faces/a: no success; check the network.")

  def fail(ids: np.ndarray, source: object) -> None:
    raise raised from shard_cache.NoRoomError("the cause")

  assert error_of(fail, errors.FacedistError) is raised


def test_of_several_errors_the_one_of_the_first_batch_is_raised():
  later_has_failed = threading.Event()

  def fail(ids: np.ndarray, source: object) -> None:
    if ids[0] == 0:
      later_has_failed.wait(10)
      raise errors.DataError("first")
    later_has_failed.set()
    raise errors.UnreachableError("later")

  assert str(error_of(fail, errors.DataError)) == "first"


def test_a_bug_in_loading_is_tensorflows_error():
  def fail(ids: np.ndarray, source: object) -> None:
    raise KeyError("a bug")

  assert "a bug" in str(error_of(fail, tf.errors.UnknownError))


@pytest.mark.parametrize(
  "error", [tf.errors.UnknownError(None, None, "of no data set"), KeyError("x")]
)
def test_errors_of_no_data_set_are_unchanged(error):
  with pytest.raises(type(error)), pipeline.LoadErrors().reraised():
    raise error
