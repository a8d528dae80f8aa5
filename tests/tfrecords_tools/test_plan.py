import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from tfrecords_tools import plan, source


def images_of(*counts):
  """A source with so many images of n0, n1, ..."""
  paths = [
    f"n{who}/{what:04d}.jpg" for who, n in enumerate(counts) for what in range(n)
  ]
  size = len(paths)
  return source.Source(
    "", sorted(paths), np.zeros(size, np.uint8), np.zeros((size, 10), np.float32)
  )


def planned(images, seed=0, num_shards=None, val_fraction=0.0):
  return plan.plan_training_set(
    images, seed=seed, num_shards=num_shards, val_fraction=val_fraction
  )


@given(
  counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
  seed=st.integers(0, 99),
  val_fraction=st.sampled_from([0.0, 0.1, 0.34, 0.5]),
  num_shards=st.none() | st.integers(1, 3),
)
def test_each_image_is_in_one_shard_and_shards_are_even(
  counts, seed, val_fraction, num_shards
):
  images = images_of(*counts)
  num_train = sum(n - min(int(n * val_fraction + 0.5), n - 1) for n in counts)
  if num_shards is not None:
    num_shards = min(num_shards, num_train)
  made = planned(images, seed, num_shards, val_fraction)
  rows = np.concatenate([shard.rows for shard in made.shards])
  np.testing.assert_array_equal(np.sort(rows), np.arange(sum(counts)))
  for split in ("train", "val"):
    sizes = [len(shard.rows) for shard in made.shards if shard.split == split]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_labels_are_the_places_of_the_sorted_identities():
  made = planned(images_of(2, 1, 3))
  assert made.identities == ("n0", "n1", "n2")
  assert made.labels.tolist() == [0, 0, 1, 2, 2, 2]


def test_the_fraction_of_each_identity_is_held_out_but_never_its_last_image():
  images = images_of(20, 7, 2, 1)
  made = planned(images, val_fraction=0.5)
  val = np.concatenate([shard.rows for shard in made.shards if shard.split == "val"])
  assert np.bincount(made.labels[val], minlength=4).tolist() == [10, 4, 1, 0]


def test_what_is_held_out_depends_on_the_seed_and_not_on_other_identities():
  def held_out(images, seed):
    shards = planned(images, seed, val_fraction=0.25).shards
    rows = np.concatenate([shard.rows for shard in shards if shard.split == "val"])
    return {images.paths[row] for row in rows if images.paths[row].startswith("n0/")}

  assert len(held_out(images_of(40), 3)) == 10
  assert held_out(images_of(40), 3) == held_out(images_of(40, 25, 8), 3)
  assert held_out(images_of(40), 3) != held_out(images_of(40), 4)


def test_identities_are_mixed_and_another_seed_mixes_them_otherwise():
  images = images_of(*[50] * 8)
  one, other = (planned(images, seed, num_shards=4) for seed in (0, 1))
  for shard in one.shards:
    assert np.bincount(one.labels[shard.rows], minlength=8).min() > 2
  assert one.shards[0].rows.tolist() != other.shards[0].rows.tolist()
  again = planned(images, 0, num_shards=4)
  assert one.shards[0].rows.tolist() == again.shards[0].rows.tolist()


def test_shards_are_named_by_split_and_number():
  made = planned(images_of(30, 30), num_shards=3, val_fraction=0.34)
  assert [shard.name for shard in made.shards] == [
    "train-00000-of-00003.tfrecord",
    "train-00001-of-00003.tfrecord",
    "train-00002-of-00003.tfrecord",
    "val-00000-of-00002.tfrecord",
    "val-00001-of-00002.tfrecord",
  ]


@pytest.mark.parametrize(("images", "shards"), [(3, 3), (79_999, 8), (80_001, 9)])
def test_the_default_is_a_shard_for_each_ten_thousand_images(images, shards):
  assert len(planned(images_of(images)).shards) == shards


def test_more_shards_than_images_are_refused():
  with pytest.raises(errors.UsageError, match=r"--num_shards=4 is more than the 3"):
    planned(images_of(3), num_shards=4)


def test_a_verification_sets_records_are_its_rows():
  made = plan.plan_verification_set(images_of(3, 4), num_shards=2)
  assert [shard.rows.tolist() for shard in made.shards] == [[0, 1, 2, 3], [4, 5, 6]]
  assert made.shards[0].name == "images-00000-of-00002.tfrecord"


def test_the_checksum_changes_with_a_path_or_a_landmark():
  images = images_of(2, 2)
  other = images_of(2, 2)
  assert plan.checksum(images) == plan.checksum(other)
  other.geometry[3, 9] = 1
  assert plan.checksum(images) != plan.checksum(other)
  assert plan.checksum(images) != plan.checksum(images_of(2, 1, 1))
