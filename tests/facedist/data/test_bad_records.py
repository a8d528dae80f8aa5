"""Replacements for corrupt records: near, pure, and the same for all workers."""

import numpy as np
import pytest

from facedist import errors
from facedist.data import pipeline
from facedist.data.readers import bad_records, local_reader
from facedist.data.samplers import epoch_sampler, identity_sampler
from tests import noise_sets
from tests.facedist.data import batches

NUM_TRAIN = 30


@pytest.fixture
def folder(tmp_path) -> str:
  noise_sets.write(tmp_path, identities=5, images=6, val_images=2, shards=3)
  return str(tmp_path)


def read(
  folder: str, ids: object, *, split: str = "train", **more: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
  """Returns images, labels, the numbers of what was read, and where it replaces."""
  reader = local_reader.open_reader(folder, split)
  replacer = bad_records.BadRecordReplacer(reader, seed=0, on_bad_record="skip", **more)
  ids = np.array(ids)
  images, labels, numbers, corrupt = replacer.read_batch(ids, np.zeros_like(ids))
  return images, labels, numbers, corrupt.tolist()


def identities_of(folder: str) -> identity_sampler.IdentitySampler:
  labels = local_reader.open_reader(folder, "train").labels()
  return identity_sampler.IdentitySampler(
    NUM_TRAIN, 6, 1, 3, identity_sampler.group(labels)
  )


def candidates(*, record: int, attempt: int, num_records: int) -> np.ndarray:
  """Returns the candidates of two hundred epochs."""
  found = [
    bad_records.candidate(
      7, epoch=epoch, record=record, attempt=attempt, num_records=num_records
    )
    for epoch in range(200)
  ]
  return np.array(found)


@pytest.mark.parametrize(
  ("attempt", "span"), [(0, 64), (7, 64), (8, 512), (15, 512), (16, 4096)]
)
def test_candidates_are_near_and_the_neighbourhood_widens(attempt, span):
  found = candidates(record=70_000, attempt=attempt, num_records=10**6)
  assert set(found // span) == {70_000 // span}
  assert np.ptp(found) > span / 2
  last = candidates(record=999, attempt=attempt, num_records=1000)
  assert 960 // span * span <= last.min() <= last.max() <= 999


def test_candidates_of_other_epochs_and_attempts_are_others():
  first, second = (
    candidates(record=5, attempt=attempt, num_records=10**9) for attempt in range(2)
  )
  for others in (first[1:], second[:-1]):
    assert (first[:-1] == others).mean() < 0.1  # of 64 records, 1 / 64 is expected


def test_the_batch_names_the_records_that_were_read(folder):
  noise_sets.corrupt(folder, "train", 4, 17)
  images, labels, numbers, corrupt = read(folder, [3, 4, 5, 17, 29])
  assert corrupt == [0, 1, 0, 1, 0]
  assert numbers[[0, 2, 4]].tolist() == [3, 5, 29]
  assert not {4, 17} & set(numbers.tolist())
  reader = local_reader.open_reader(folder, "train")
  expected_images, expected_labels = reader.read_batch(numbers)
  np.testing.assert_array_equal(images, expected_images)
  np.testing.assert_array_equal(labels, expected_labels)


def test_an_image_that_does_not_decode_is_replaced_too(folder, tmp_path):
  (jpeg,), _ = local_reader.open_reader(folder, "train").read(np.array([0]))
  noise_sets.write_jpegs(tmp_path / "other", [jpeg, jpeg, b"GIF89a"], size=16)
  _, _, numbers, corrupt = read(str(tmp_path / "other"), range(3))
  assert corrupt == [0, 0, 1]
  assert numbers[2] in (0, 1)


@pytest.mark.parametrize(("num_workers", "start_step"), [(2, 0), (4, 3), (1, 5)])
def test_any_number_of_workers_from_any_step_reads_the_same_replacements(
  folder, num_workers, start_step
):
  noise_sets.corrupt(folder, "train", 0, 4, 17, 18, 19, 28)
  reader = local_reader.open_reader(folder, "train")
  sampler = epoch_sampler.EpochSampler(NUM_TRAIN, 8, seed=1)
  alone = batches.training_steps(reader, sampler, 8, on_bad_record="skip")
  others = batches.training_steps(
    reader,
    sampler,
    3,
    start_step=start_step,
    num_workers=num_workers,
    on_bad_record="skip",
  )
  batches.assert_same(others, alone[start_step:][:3])
  corrupt = batches.joined(alone)["damaged"]
  assert corrupt[:NUM_TRAIN].sum() == corrupt[NUM_TRAIN:][:NUM_TRAIN].sum() == 6


def test_a_corrupt_replacement_is_replaced_too(folder):
  noise_sets.corrupt(folder, "train", *range(28))
  _, _, numbers, corrupt = read(folder, range(30))
  assert set(numbers.tolist()) == {28, 29}
  assert sum(corrupt) == 28


def test_in_an_order_of_identities_a_replacement_is_of_the_same_identity(folder):
  sampler = identities_of(folder)
  reader = local_reader.open_reader(folder, "train")
  gone = np.flatnonzero(reader.labels() == 2)[:5]  # one of its six is left
  gone_images, _ = reader.read_batch(gone)
  noise_sets.corrupt(folder, "train", *gone.tolist())
  reader = local_reader.open_reader(folder, "train")
  steps = batches.training_steps(reader, sampler, 10, on_bad_record="skip")
  for step in steps:
    assert sorted(np.bincount(step["label"]).tolist())[-3:] == [2, 2, 2]
    for image in step["image"]:
      assert not (image == gone_images).all((1, 2, 3)).any()
  assert sum(step["damaged"].sum() for step in steps) > 5


def test_replacements_of_a_wholly_corrupt_identity_are_near(folder):
  sampler = identities_of(folder)
  gone = np.flatnonzero(local_reader.open_reader(folder, "train").labels() == 2)
  noise_sets.corrupt(folder, "train", *gone.tolist())
  _, labels, _, corrupt = read(folder, gone, siblings=sampler.siblings)
  assert corrupt == [1] * 6
  assert 2 not in labels


def test_a_set_without_a_valid_record_is_an_error(folder):
  noise_sets.corrupt(folder, "val", *range(10))
  with pytest.raises(errors.DataError, match="no replacement was found"):
    read(folder, range(10), split="val")


def test_validation_leaves_a_corrupt_record_out(folder):
  noise_sets.corrupt(folder, "val", 2)
  dataset, num_steps = pipeline.evaluation_dataset(
    local_reader.open_reader(folder, "val"), global_batch=6, on_bad_record="skip"
  )
  steps = batches.joined(dataset.take(num_steps).as_numpy_iterator())
  assert steps["weight"].tolist() == [1, 1, 0, *[1] * 7, 0, 0]
  assert steps["damaged"].tolist() == [0, 0, 1, *[0] * 9]
