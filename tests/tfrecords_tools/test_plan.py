import hashlib

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facedist import errors
from tfrecords_tools.builder import plan
from tfrecords_tools.sources import base


def images_of(*counts):
  """The groups of a source with so many images of n0, n1, ..."""
  return [
    base.new_group(f"n{who}", [f"n{who}/{what:04d}.jpg" for what in range(count)])
    for who, count in enumerate(counts)
  ]


def paths_in(groups):
  return [path for group in groups for path in group.paths]


def planned(groups, seed=0, num_shards=None, val_fraction=0.0, **changes):
  return plan.plan_training_set(
    groups, seed=seed, num_shards=num_shards, val_fraction=val_fraction, **changes
  )


def shards_of(made, split):
  """The paths of each shard of a split, in order."""
  shards = [shard for shard in made.shards if shard.split == split]
  return [list(made.images_of(shard).paths) for shard in shards]


def split_of(made, split):
  """The paths of a split, in order."""
  return [path for paths in shards_of(made, split) for path in paths]


def hash_of(path, key):
  digest = hashlib.blake2b(path.encode(), key=key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


@given(
  counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
  seed=st.integers(0, 99),
  val_fraction=st.sampled_from([0.0, 0.1, 0.34, 0.5]),
  num_shards=st.none() | st.integers(1, 3),
)
def test_each_image_is_in_one_shard_and_shards_are_even(
  counts, seed, val_fraction, num_shards
):
  groups = images_of(*counts)
  num_train = sum(n - min(int(n * val_fraction + 0.5), n - 1) for n in counts)
  if num_shards is not None:
    num_shards = min(num_shards, num_train)
  made = planned(groups, seed, num_shards, val_fraction)
  train, val = split_of(made, "train"), split_of(made, "val")
  assert sorted(train + val) == paths_in(groups)
  assert len(train) == num_train
  assert made.num_images == sum(counts)
  for split in ("train", "val"):
    sizes = [len(paths) for paths in shards_of(made, split)]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert sizes == [shard.num_images for shard in made.shards if shard.split == split]


@pytest.mark.parametrize("seed", [0, 3])
def test_images_lie_in_the_order_of_a_keyed_hash_of_their_paths(seed):
  groups = images_of(*[40] * 10)
  paths = sorted(paths_in(groups), key=lambda path: hash_of(path, f"order {seed}"))
  assert split_of(planned(groups, seed, 7), "train") == paths
  made = planned(groups, seed, 7, val_fraction=0.25)
  held_out = {
    path
    for group in groups
    for path in sorted(group.paths, key=lambda path: hash_of(path, f"val {seed}"))[:10]
  }
  assert split_of(made, "val") == [path for path in paths if path in held_out]
  assert split_of(made, "train") == [path for path in paths if path not in held_out]


def test_labels_are_the_places_of_the_sorted_identities():
  groups = [
    base.new_group("Ann-Lee", ["Ann-Lee/1.jpg"]),
    base.new_group("Ann", ["Ann/1.jpg", "Ann/2.jpg"]),  # as paths: "-" before "/"
    base.new_group("Bob", ["Bob/1.jpg"]),
  ]
  made = planned(groups, num_shards=1)
  assert made.identities == ("Ann", "Ann-Lee", "Bob")
  images = made.images_of(made.shards[0])
  assert dict(zip(images.paths, images.rows["label"].tolist(), strict=True)) == {
    "Ann/1.jpg": 0,
    "Ann/2.jpg": 0,
    "Ann-Lee/1.jpg": 1,
    "Bob/1.jpg": 2,
  }


def test_images_keep_where_they_and_their_faces_lie():
  group = base.new_group(
    "n1", ["n1/1.jpg", "n1/2.jpg"], origins=[3, 4], starts=[512, 7], lengths=[9, 2**40]
  )
  group.rows["place"], group.rows["geometry"][:, 9] = [1, 2], [1.5, 2.5]
  made = planned([group], num_shards=1)
  images = made.images_of(made.shards[0])
  for path, row in zip(images.paths, images.rows, strict=True):
    place = group.paths.index(path)
    for name in ("origin", "start", "length", "place"):
      assert row[name] == group.rows[name][place]
    np.testing.assert_array_equal(row["geometry"], group.rows["geometry"][place])


def test_shards_are_named_by_split_and_number():
  made = planned(images_of(30, 30), num_shards=3, val_fraction=0.34)
  assert [shard.name for shard in made.shards] == [
    "train-00000-of-00003.tfrecord",
    "train-00001-of-00003.tfrecord",
    "train-00002-of-00003.tfrecord",
    "val-00000-of-00002.tfrecord",
    "val-00001-of-00002.tfrecord",
  ]


def test_a_plan_without_images_has_the_same_shards_and_checksum():
  whole, counted = (
    planned(images_of(30, 30), num_shards=3, val_fraction=0.34, counts_only=only)
    for only in (False, True)
  )
  assert counted.shards == whole.shards
  assert counted.checksum == whole.checksum
  assert counted.identities == whole.identities


@pytest.mark.parametrize(("images", "shards"), [(3, 3), (79_999, 8), (80_001, 9)])
def test_the_default_is_a_shard_for_each_ten_thousand_images(images, shards):
  assert len(planned(images_of(images), counts_only=True).shards) == shards


def test_more_shards_than_images_are_refused():
  with pytest.raises(errors.UsageError, match=r"--num_shards=4 is more than the 3"):
    planned(images_of(3), num_shards=4)


def test_groups_out_of_order_are_no_source():
  with pytest.raises(ValueError, match="n0/ comes after n1/"):
    planned(reversed(images_of(1, 1)))
  with pytest.raises(ValueError, match="n0/ comes after n0/"):
    planned([*images_of(1), *images_of(2)])


def test_a_verification_sets_records_are_its_rows():
  groups = images_of(3, 4)
  made = plan.plan_verification_set(groups, num_shards=2)
  assert shards_of(made, "images") == [
    ["n0/0000.jpg", "n0/0001.jpg", "n0/0002.jpg", "n1/0000.jpg"],
    ["n1/0001.jpg", "n1/0002.jpg", "n1/0003.jpg"],
  ]
  assert made.shards[0].name == "images-00000-of-00002.tfrecord"


def test_the_checksum_is_that_of_paths_places_and_geometry():
  groups = images_of(2, 3)
  for number, group in enumerate(groups):
    group.rows["place"], group.rows["geometry"] = number, number + 0.5
  columns = [
    np.concatenate([group.rows[name] for group in groups]).tobytes()
    for name in ("place", "geometry")
  ]
  content = b"".join(["\n".join(paths_in(groups)).encode(), *columns])
  assert planned(groups).checksum == f"{google_crc32c.value(content):08x}"
