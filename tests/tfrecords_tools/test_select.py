"""tfrecords_tools.select: what is in a selection, and that all read it like a build."""

import collections
import dataclasses
import os
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from facedist import errors
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.data.shards import manifest
from tests import noise_sets, processes
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.folders import files_of, problems_of, times_of
from tfrecords_tools import select
from tfrecords_tools.selection import filters

ADA = [("ada", 1), ("ada", 2), ("ada", 3), ("ada", 4)]
BOB = [("bob", 11), ("bob", 12)]
CY = [("cy", 21)]
FACES = {"train": [*ADA, *CY, *BOB], "val": [("ada", 5), ("bob", 13)]}


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> str:
  """Three identities with 4, 2 and 1 images in train, and 1, 1 and 0 in val."""
  names = {"ada": "Ada_Lovelace"}
  return shard_folders.write(tmp_path / "faces", FACES, identity_names=names)


@pytest.fixture
def two(tmp_path: pathlib.Path) -> tuple[str, str]:
  """The folders `a` of x and y, and `b` of x and z."""
  a = {"train": [("x", 1), ("y", 2)], "val": [("x", 3)]}
  b = {"train": [("x", 4), ("z", 5)]}
  return shard_folders.write(tmp_path / "a", a), shard_folders.write(tmp_path / "b", b)


def run(*folders: str, to: str | os.PathLike[str], **changes: Any) -> manifest.Manifest:
  """Selects in this process; returns the manifest."""
  select.main(
    select.SelectConfig(",".join(folders), str(to), num_processes=1, **changes)
  )
  return manifest.load(str(to))


def write_lines(path: pathlib.Path, *lines: str) -> str:
  path.write_text("".join(f"{line}\n" for line in lines))
  return str(path)


def test_without_rules_all_is_selected_as_it_was(faces, tmp_path):
  made = run(faces, to=tmp_path / "all")
  for split, content in FACES.items():
    assert shard_folders.read(tmp_path / "all", split) == content
  assert made.identities == ("ada", "bob", "cy")
  assert made.identity_names == {"ada": "Ada_Lovelace"}


def test_a_selection_holds_no_shard_and_names_them_by_relative_paths(faces, tmp_path):
  made = run(faces, to=tmp_path / "all")
  assert sorted(os.listdir(tmp_path / "all")) == [
    "manifest.json",
    "train-00000-of-00002.index.npy",
    "train-00001-of-00002.index.npy",
    "val-00000-of-00002.index.npy",
    "val-00001-of-00002.index.npy",
  ]
  assert {shard.folder for shard in made.shards} == {"../faces"}
  (tmp_path / "moved").mkdir()
  for name in ("faces", "all"):
    os.rename(tmp_path / name, tmp_path / "moved" / name)
  assert shard_folders.read(tmp_path / "moved" / "all") == FACES["train"]


def test_listed_identities_are_taken_and_excluded_ones_left_out(faces, tmp_path):
  wanted = write_lines(tmp_path / "wanted.txt", "# a comment", "bob", "ada", "nobody")
  unwanted = write_lines(tmp_path / "unwanted.txt", "ada")
  to = tmp_path / "bob"
  made = run(faces, to=to, identities=wanted, exclude_identities=unwanted)
  assert made.identities == ("bob",)
  assert shard_folders.read(to) == BOB
  assert shard_folders.read(to, "val") == [("bob", 13)]
  assert made.selection["left_out"] == {
    "--identities": 1,
    "--exclude_identities": 5,
    "--min_images_per_identity=1": 0,
  }


def test_identities_with_too_few_images_are_left_out_of_both_splits(faces, tmp_path):
  made = run(faces, to=tmp_path / "3", min_images_per_identity=3)
  assert made.identities == ("ada", "bob")  # bob: two in train and one in val
  made = run(faces, to=tmp_path / "4", min_images_per_identity=4)
  assert made.identities == ("ada",)
  assert shard_folders.read(tmp_path / "4", "val") == [("ada", 5)]


def test_another_seed_takes_other_images_and_a_higher_maximum_some_more(
  faces, tmp_path
):
  chosen = set()
  for seed in range(6):
    taken = []
    for most in (2, 3):
      to = tmp_path / f"{seed}-{most}"
      run(faces, to=to, max_images_per_identity=most, seed=seed)
      taken.append(set(shard_folders.read(to)))
      assert shard_folders.read(to, "val") == FACES["val"]
    assert taken[0] < taken[1] < set(FACES["train"])
    chosen.add(frozenset(taken[0]))
  assert len(chosen) > 1


def test_draws_depend_on_seed_shard_and_place_alone():
  offsets = np.array([0, 700, 1500], np.uint64)
  drawn = filters.draws(3, 0xABCD, offsets)
  # Another hash would choose other images than the same command did before.
  assert drawn[0] == 904991185133840303
  np.testing.assert_array_equal(filters.draws(3, 0xABCD, offsets[1:]), drawn[1:])
  others = [filters.draws(4, 0xABCD, offsets), filters.draws(3, 0xABCE, offsets)]
  assert not np.isin(drawn, others).any()


def test_the_images_with_the_smallest_draws_stay():
  labels = np.array([1, 0, 1, 1, filters.LEFT_OUT, 1])
  drawn = np.array([40, 99, 10, 30, 5, 20], np.uint64)
  stays = filters.keep_at_most(labels, drawn, num_identities=2, maximum=2)
  assert stays.tolist() == [False, True, True, False, False, True]


def test_draws_take_each_place_of_a_shard_as_often():
  for seed in range(8):
    drawn = filters.draws(seed, 7, np.arange(4096, dtype=np.uint64) * 5000)
    # Half fall below the middle, within five standard deviations (32).
    assert abs(int((drawn < 2**63).sum()) - 2048) < 5 * 32


def test_without_a_seed_those_that_come_first_in_the_shards_are_taken(faces, tmp_path):
  made = run(faces, to=tmp_path / "one", max_images_per_identity=1)
  assert shard_folders.read(tmp_path / "one") == [("ada", 1), ("cy", 21), ("bob", 11)]
  assert shard_folders.read(tmp_path / "one", "val") == FACES["val"]
  assert "seed" not in made.source


def test_without_a_seed_folders_give_in_turn_to_an_identity_of_both(tmp_path):
  content = {"train": [("x", 1), ("y", 2), ("x", 3), ("x", 4)]}
  a = shard_folders.write(tmp_path / "a", content)
  b = shard_folders.write(tmp_path / "b", {"train": [("x", 5), ("x", 6)]})
  to = tmp_path / "both"
  run(a, b, to=to, same_names="merge", max_images_per_identity=3)
  # Places in their folders: 0, 2 and 3 of x in a, 0 and 1 in b.
  assert sorted(shard_folders.read(to)) == [("x", 1), ("x", 5), ("x", 6), ("y", 2)]


def test_nothing_left_is_an_error_that_says_which_rule_took_it(faces, tmp_path):
  with pytest.raises(errors.DataError, match=r"min_images_per_identity=9: 9\); loosen"):
    run(faces, to=tmp_path / "none", min_images_per_identity=9)


def test_several_folders_become_one_set_with_prefixes_from_their_names(two, tmp_path):
  to = tmp_path / "both"
  made = run(*two[::-1], to=to)
  assert made.identities == ("a/x", "a/y", "b/x", "b/z")
  assert shard_folders.read(to) == [("b/x", 4), ("b/z", 5), ("a/x", 1), ("a/y", 2)]
  assert shard_folders.read(to, "val") == [("a/x", 3)]
  made = run(*two, to=tmp_path / "named", prefixes="m,n")
  assert made.identities == ("m/x", "m/y", "n/x", "n/z")


def test_identities_of_one_name_become_one_where_asked(two, tmp_path):
  to = tmp_path / "both"
  made = run(*two, to=to, same_names="merge", min_images_per_identity=2)
  assert made.identities == ("x",)
  assert shard_folders.read(to) == [("x", 1), ("x", 4)]


def test_a_list_may_name_identities_with_or_without_the_prefix(two, tmp_path):
  unwanted = write_lines(tmp_path / "unwanted.txt", "x", "b/z")
  made = run(*two, to=tmp_path / "both", exclude_identities=unwanted)
  assert made.identities == ("a/y",)


def test_renaming_makes_two_identities_one(faces, tmp_path):
  to = tmp_path / "renamed"
  table = write_lines(tmp_path / "new.csv", "cy,bob", '"ada", zoe')
  made = run(faces, to=to, relabel=table)
  assert made.identities == ("bob", "zoe")
  assert made.identity_names == {"zoe": "Ada_Lovelace"}
  expected = [("zoe", 1), ("zoe", 2), ("zoe", 3), ("zoe", 4), ("bob", 21), *BOB]
  assert shard_folders.read(to) == expected


def test_a_selection_that_does_not_say_its_names_is_refused(faces, tmp_path):
  made = run(faces, to=tmp_path / "all")
  selection = {"folders": {"../faces": {"prefix": "", "renamed": {"ada": 3}}}}
  manifest.save(dataclasses.replace(made, selection=selection), str(tmp_path / "all"))
  text = r"all/manifest\.json: the selection does not say what .* \.\./faces are called"
  with pytest.raises(errors.DataError, match=text):
    run(str(tmp_path / "all"), to=tmp_path / "again")


def test_one_shard_given_twice_is_refused(faces, tmp_path):
  run(faces, to=tmp_path / "all")
  with pytest.raises(errors.UsageError, match=r"both hold .*train-00000-of-00002"):
    run(faces, str(tmp_path / "all"), to=tmp_path / "twice")


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"image_size": 32}, "has image_size 32"),
    ({"alignment": {"template": "loose"}}, "has alignment loose"),
    (
      {"kind": "verification", "pairs": manifest.Pairs("pairs.npy", 0, 0, 0)},
      "holds a verification set",
    ),
  ],
)
def test_folders_that_do_not_go_together_are_refused(faces, tmp_path, changes, reason):
  other = str(tmp_path / "other")
  manifest.save(dataclasses.replace(manifest.load(faces), **changes), other)
  with pytest.raises(errors.DataError, match=f"{other} {reason}"):
    run(faces, other, to=tmp_path / "both")


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"prefixes": "p"}, "--prefixes=p must be a different name for each of the 2"),
    ({"prefixes": "p,p"}, "--prefixes=p,p must be"),
    ({"prefixes": "p,q", "same_names": "merge"}, "would keep apart"),
  ],
)
def test_prefixes_must_tell_the_folders_apart(two, tmp_path, changes, text):
  with pytest.raises(errors.UsageError, match=text):
    run(*two, to=tmp_path / "both", **changes)


def test_the_same_command_again_changes_nothing_and_another_is_refused(faces, tmp_path):
  to = tmp_path / "some"
  run(faces, to=to, max_images_per_identity=2)
  before = times_of(to)
  run(faces, to=to, max_images_per_identity=2)
  assert times_of(to) == before
  with pytest.raises(errors.ConfigError, match="with other max_images_per_identity"):
    run(faces, to=to, max_images_per_identity=3)
  with pytest.raises(errors.ConfigError, match="holds shards"):
    run(faces, to=faces)


def test_embed_reads_a_selection_under_its_own_names(faces, tmp_path):
  to = str(tmp_path / "renamed")
  run(faces, to=to, relabel=write_lines(tmp_path / "new.csv", "cy,new"))
  with staged_dataset.open_set(to, str(tmp_path / "cache")) as data:
    loaded = [load() for load in image_source.loaders(data, "train", image_size=16)]
  assert [one.identity for one in loaded] == ["ada"] * 4 + ["new", "bob", "bob"]
  assert loaded[4].path == "cy/21.jpg"


def test_a_selection_in_a_bucket_refers_to_shards_in_buckets_alone(
  bucket, faces, tmp_path
):
  there = shard_folders.write(f"{bucket}/sets/faces", FACES)
  made = run(there, to=f"{bucket}/chosen/all")
  assert {shard.folder for shard in made.shards} == {"../../sets/faces"}
  assert problems_of(f"{bucket}/chosen/all") == []
  made = run(there, to=tmp_path / "here")
  assert {shard.folder for shard in made.shards} == {there}
  with pytest.raises(errors.UsageError, match="copy the shards to the bucket first"):
    run(faces, to=f"{bucket}/chosen/local")


@pytest.mark.slow
def test_training_and_validation_run_on_a_selection_of_two_folders(tmp_path):
  sizes = {"identities": 4, "images": 8, "val_images": 2, "size": 32, "shards": 2}
  for seed, name in enumerate("ab"):
    noise_sets.write(tmp_path / name, seed=seed, **sizes)
  to = tmp_path / "both"
  made = run(str(tmp_path / "a"), str(tmp_path / "b"), to=to, max_images_per_identity=6)
  records = {name: split.records for name, split in made.splits.items()}
  assert records == {"train": 48, "val": 16}
  done = processes.run(
    "facedist.train",
    *("--backbone=tinynet", "--backbone_weights=none", "--embedding_size=8"),
    *("--global_batch=16", "--head_epochs=0.3", "--full_epochs=1", "--strategy=one"),
    *(f"--data_dir={to}", f"--workdir={tmp_path / 'run'}"),
  )
  assert done.returncode == 0, done.stderr
  facts = f"48 images of 8 identities, 32 px, fingerprint {made.fingerprint}"
  assert facts in done.stderr


RECORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=24)


@hypothesis.given(
  train=RECORDS, val=RECORDS, minimum=st.integers(1, 4), maximum=st.integers(1, 4)
)
@hypothesis.settings(max_examples=25)
def test_a_selection_is_a_part_of_its_input_and_each_record_is_there_once(
  tmp_path_factory, train, val, minimum, maximum
):
  folder = tmp_path_factory.mktemp("sets")
  content = {
    "train": [(name, number) for number, name in enumerate(train)],
    "val": [(name, 50 + number) for number, name in enumerate(val)],
  }
  source = shard_folders.write(folder / "faces", content, num_shards=1)
  rules = {"min_images_per_identity": minimum, "max_images_per_identity": maximum}
  counts = collections.Counter(train + val)
  expected = sorted(name for name in set(train) if counts[name] >= minimum)
  if not expected:
    with pytest.raises(errors.DataError):
      run(source, to=folder / "some", **rules)
    return
  made = run(source, to=folder / "some", **rules)
  assert made.identities == tuple(expected)
  kept = shard_folders.read(folder / "some")
  assert len(set(kept)) == len(kept)
  assert set(kept) <= set(content["train"])
  assert collections.Counter(name for name, _ in kept) == {
    name: min(maximum, train.count(name)) for name in expected
  }
  if "val" in made.splits:
    of_val = [face for face in content["val"] if face[0] in expected]
    assert shard_folders.read(folder / "some", "val") == of_val


def test_the_order_of_a_lists_lines_does_not_matter(faces, tmp_path):
  rules = {"max_images_per_identity": 1, "min_images_per_identity": 2, "seed": 3}
  for name, lines in (("one", ["ada", "bob", "cy"]), ("two", ["cy", "bob", "ada"])):
    listed = write_lines(tmp_path / f"{name}.txt", *lines)
    run(faces, to=tmp_path / name, identities=listed, **rules)
  assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
