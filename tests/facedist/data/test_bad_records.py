"""Replacements for corrupt records: near, pure, and the same for all workers."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from facedist.data import pipeline
from facedist.data.readers import bad_records, local_reader
from facedist.data.samplers import epoch_sampler, identity_sampler
from facedist.data.shards import shard_index, tfrecord
from tests import noise_sets

SIZE = 16
NUM_TRAIN = 30  # in 3 shards of 10


@pytest.fixture
def folder(tmp_path) -> str:
  noise_sets.write(tmp_path, identities=5, images=6, val_images=2, size=SIZE, shards=3)
  return str(tmp_path)


def harm(folder: str, split: str, *numbers: int) -> None:
  """Flips a byte in the image of each of these records."""
  first = 0
  for path in sorted(pathlib.Path(folder).glob(f"{split}-*.tfrecord")):
    rows = shard_index.load(shard_index.index_name(str(path)))
    content = bytearray(path.read_bytes())
    for number in numbers:
      if first <= number < first + len(rows):
        row = rows[number - first]
        content[int(row["offset"] + row["image_offset"]) + 9] ^= 0x10
    path.write_bytes(content)
    first += len(rows)


def skipping(folder: str, split: str, **more: object) -> bad_records.BadRecordReplacer:
  opened = local_reader.open_reader(folder, split)
  return bad_records.BadRecordReplacer(opened, seed=0, on_bad_record="skip", **more)


def read_steps(folder: str, *, num_workers: int, start_step: int, count: int) -> list:
  """Returns (corrupt, label, image) of each step over all workers."""
  parts = [
    list(
      pipeline.training_dataset(
        local_reader.open_reader(folder, "train"),
        epoch_sampler.EpochSampler(NUM_TRAIN, 8, seed=1),
        seed=3,
        start_step=start_step,
        worker=worker,
        num_workers=num_workers,
        on_bad_record="skip",
      )
      .take(count)
      .as_numpy_iterator()
    )
    for worker in range(num_workers)
  ]
  names = ("damaged", "label", "image")
  return [
    tuple(np.concatenate([part[name] for part in step]) for name in names)
    for step in zip(*parts, strict=True)
  ]


@given(
  seed=st.integers(),
  epoch=st.integers(0, 2**31),
  record=st.integers(0, 999),
  attempt=st.integers(0, 63),
)
def test_a_candidate_is_near_and_the_neighbourhood_widens(
  seed: int, epoch: int, record: int, attempt: int
):
  other = bad_records.candidate(
    seed, epoch=epoch, record=record, attempt=attempt, num_records=1000
  )
  span = (64, 512, 4096)[min(attempt // 8, 2)]
  assert 0 <= other < 1000
  assert other // span == record // span


def test_candidates_of_other_epochs_and_attempts_are_others():
  chains = {
    tuple(
      bad_records.candidate(7, epoch=epoch, record=5, attempt=place, num_records=10**9)
      for place in range(8)
    )
    for epoch in range(50)
  }
  assert len(chains) == 50
  # each of the 64 records of the block comes up, none far more often than others
  counts = np.bincount(np.array(list(chains)).ravel(), minlength=64)
  assert counts.max() < 25


def test_a_corrupt_record_ends_the_reading_unless_it_is_skipped(folder):
  harm(folder, "train", 4)
  opened = local_reader.open_reader(folder, "train")
  strict = bad_records.BadRecordReplacer(opened, seed=0, on_bad_record="fail")
  with pytest.raises(errors.DataError, match=r"record 4 at byte \d+: CRC mismatch"):
    strict.read_batch(np.arange(8), np.zeros(8, np.int64))


def test_the_batch_names_the_records_that_were_read(folder):
  harm(folder, "train", 4, 17)
  opened = local_reader.open_reader(folder, "train")
  ids = np.array([3, 4, 5, 17, 29])
  images, labels, read, corrupt = skipping(folder, "train").read_batch(
    ids, np.zeros(5, np.int64)
  )
  assert corrupt.tolist() == [0, 1, 0, 1, 0]
  assert read[[0, 2, 4]].tolist() == [3, 5, 29]
  assert not {4, 17} & set(read.tolist())
  expected_images, expected_labels = opened.read_batch(read)
  np.testing.assert_array_equal(images, expected_images)
  np.testing.assert_array_equal(labels, expected_labels)


def test_an_image_that_does_not_decode_is_replaced_too(folder):
  path = pathlib.Path(folder) / "train-00000-of-00003.tfrecord"
  row = shard_index.load(shard_index.index_name(str(path)))[2]
  start = int(row["offset"]) + tfrecord.HEADER_BYTES
  payload = bytearray(path.read_bytes())[start : int(row["offset"] + row["length"]) - 4]
  place = int(row["image_offset"]) - tfrecord.HEADER_BYTES
  payload[place : place + 2] = b"GI"  # no JPEG any more, with a CRC that is right
  with open(path, "r+b") as stream:
    stream.seek(int(row["offset"]))
    stream.write(tfrecord.frame(bytes(payload)))
  _, _, read, corrupt = skipping(folder, "train").read_batch(
    np.arange(4), np.zeros(4, np.int64)
  )
  assert corrupt.tolist() == [0, 0, 1, 0]
  assert read[2] != 2


def test_any_number_of_workers_from_any_step_reads_the_same_replacements(folder):
  harm(folder, "train", 0, 4, 17, 18, 19, 28)
  alone = read_steps(folder, num_workers=1, start_step=0, count=8)
  for num_workers, start_step in ((2, 0), (4, 3), (1, 5)):
    others = read_steps(folder, num_workers=num_workers, start_step=start_step, count=3)
    for first, second in zip(alone[start_step:][:3], others, strict=True):
      for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
  corrupt = np.concatenate([step[0] for step in alone])
  assert corrupt[:NUM_TRAIN].sum() == 6  # each once an epoch
  assert corrupt[NUM_TRAIN : 2 * NUM_TRAIN].sum() == 6


def test_a_corrupt_replacement_is_replaced_too(folder):
  harm(folder, "train", *range(28))
  _, _, read, corrupt = skipping(folder, "train").read_batch(
    np.arange(30), np.zeros(30, np.int64)
  )
  assert set(read.tolist()) == {28, 29}
  assert corrupt.sum() == 28


def test_in_an_order_of_identities_a_replacement_is_of_the_same_identity(folder):
  labels = local_reader.open_reader(folder, "train").labels()
  gone = np.flatnonzero(labels == 2)[:5]  # one of its six is left
  gone_images, _ = local_reader.open_reader(folder, "train").read_batch(gone)
  harm(folder, "train", *gone.tolist(), int(np.flatnonzero(labels == 4)[0]))
  opened = local_reader.open_reader(folder, "train")
  steps = pipeline.training_dataset(
    opened,
    identity_sampler.IdentitySampler(
      NUM_TRAIN, 6, 1, 3, identity_sampler.group(labels)
    ),
    seed=3,
    on_bad_record="skip",
  )
  corrupt = 0
  for step in steps.take(10).as_numpy_iterator():
    assert sorted(np.bincount(step["label"]).tolist())[-3:] == [2, 2, 2]
    for image in step["image"]:
      assert not (image == gone_images).all((1, 2, 3)).any()
    corrupt += step["damaged"].sum()
  assert corrupt > 5


def test_replacements_of_a_wholly_corrupt_identity_are_near(folder):
  labels = local_reader.open_reader(folder, "train").labels()
  gone = np.flatnonzero(labels == 2)
  harm(folder, "train", *gone.tolist())
  groups = identity_sampler.group(labels)
  siblings = identity_sampler.IdentitySampler(NUM_TRAIN, 6, 1, 3, groups).siblings
  replacer = skipping(folder, "train", siblings=siblings)
  _, read_labels, _, corrupt = replacer.read_batch(gone, np.zeros(6, np.int64))
  assert corrupt.sum() == 6
  assert 2 not in read_labels


def test_a_set_without_a_valid_record_is_an_error(folder):
  harm(folder, "val", *range(10))
  with pytest.raises(errors.DataError, match="no replacement was found"):
    skipping(folder, "val").read_batch(np.arange(10), np.zeros(10, np.int64))


def test_validation_leaves_a_corrupt_record_out(folder):
  harm(folder, "val", 2)
  opened = local_reader.open_reader(folder, "val")
  dataset, num_steps = pipeline.evaluation_dataset(
    opened, global_batch=6, on_bad_record="skip"
  )
  steps = list(dataset.take(num_steps).as_numpy_iterator())
  weights = np.concatenate([step["weight"] for step in steps])
  assert weights.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
  corrupt = np.concatenate([step["damaged"] for step in steps])
  assert corrupt.tolist() == [0, 0, 1, *[0] * 9]
