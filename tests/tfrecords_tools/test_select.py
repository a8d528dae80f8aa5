"""tfrecords_tools.select: what is in a selection, and that all read it like a build."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from absl import flags

from facedist import config, errors, storage
from facedist.data import image_source
from facedist.data.cache import staged_dataset
from facedist.data.shards import manifest
from tests import files, noise_sets
from tests.tfrecords_tools import shard_folders
from tfrecords_tools import select

ADA = [("ada", 1), ("ada", 2), ("ada", 3), ("ada", 4)]
BOB = [("bob", 11), ("bob", 12)]
CY = [("cy", 21)]
FACES = {"train": [*ADA, *CY, *BOB], "val": [("ada", 5), ("bob", 13)]}


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> str:
  """Three identities with 4, 2 and 1 images in train, and 1, 1 and 0 in val."""
  folder = str(tmp_path / "faces")
  shard_folders.write(folder, FACES, identity_names={"ada": "Ada_Lovelace"})
  return folder


def run(*folders: str, to: str, **changes: object) -> manifest.Manifest:
  """Selects in this process; returns the manifest."""
  settings = select.SelectConfig(",".join(folders), to, num_processes=1)
  select.main(dataclasses.replace(settings, **changes))  # type: ignore[arg-type]
  return manifest.load(to)


def write_lines(path: pathlib.Path, *lines: str) -> str:
  path.write_text("".join(f"{line}\n" for line in lines))
  return str(path)


def test_without_rules_all_is_selected_as_it_was(faces, tmp_path):
  made = run(faces, to=str(tmp_path / "all"))
  for split, content in FACES.items():
    assert shard_folders.read(str(tmp_path / "all"), split) == content
  assert made.identities == ("ada", "bob", "cy")
  assert made.identity_names == {"ada": "Ada_Lovelace"}


def test_a_selection_holds_no_shard_and_names_them_by_relative_paths(faces, tmp_path):
  made = run(faces, to=str(tmp_path / "all"))
  assert sorted(os.listdir(tmp_path / "all")) == [
    "manifest.json",
    "train-00000-of-00002.index.npy",
    "train-00001-of-00002.index.npy",
    "val-00000-of-00002.index.npy",
    "val-00001-of-00002.index.npy",
  ]
  assert {shard.folder for shard in made.shards} == {"../faces"}
  (tmp_path / "moved").mkdir()
  os.rename(tmp_path / "faces", tmp_path / "moved" / "faces")
  os.rename(tmp_path / "all", tmp_path / "moved" / "all")
  moved = str(tmp_path / "moved" / "all")
  assert shard_folders.read(moved) == FACES["train"]


def test_listed_identities_are_taken_and_excluded_ones_left_out(faces, tmp_path):
  wanted = write_lines(tmp_path / "wanted.txt", "# a comment", "bob", "ada", "nobody")
  unwanted = write_lines(tmp_path / "unwanted.txt", "ada")
  to = str(tmp_path / "bob")
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
  to = str(tmp_path / "many")
  made = run(faces, to=to, min_images_per_identity=3)
  assert made.identities == ("ada", "bob")  # bob: two in train and one in val
  made = run(faces, to=to + "2", min_images_per_identity=4)
  assert made.identities == ("ada",)
  assert shard_folders.read(to + "2", "val") == [("ada", 5)]


def test_the_maximum_holds_for_train_and_another_seed_takes_other_images(
  faces, tmp_path
):
  chosen = set()
  for seed in range(6):
    to = str(tmp_path / str(seed))
    run(faces, to=to, max_images_per_identity=2, seed=seed)
    found = shard_folders.read(to)
    assert sorted(name for name, _ in found) == ["ada", "ada", "bob", "bob", "cy"]
    assert set(found) <= set(FACES["train"])
    assert shard_folders.read(to, "val") == FACES["val"]
    chosen.add(tuple(found))
  assert len(chosen) > 1


def test_without_a_seed_those_that_come_first_in_the_shards_are_taken(faces, tmp_path):
  to = str(tmp_path / "first")
  made = run(faces, to=to, max_images_per_identity=1)
  assert shard_folders.read(to) == [("ada", 1), ("cy", 21), ("bob", 11)]
  assert shard_folders.read(to, "val") == FACES["val"]
  assert "seed" not in made.source


def test_without_a_seed_folders_give_in_turn_to_an_identity_of_both(tmp_path):
  a, b, to = (str(tmp_path / name) for name in ("a", "b", "both"))
  shard_folders.write(a, {"train": [("x", 1), ("y", 2), ("x", 3), ("x", 4)]})
  shard_folders.write(b, {"train": [("x", 5), ("x", 6)]})
  run(a, b, to=to, same_names="merge", max_images_per_identity=3)
  # Places in their folders: 0, 2 and 3 of x in a, 0 and 1 in b.
  assert sorted(shard_folders.read(to)) == [("x", 1), ("x", 5), ("x", 6), ("y", 2)]


def test_nothing_left_is_an_error_that_says_which_rule_took_it(faces, tmp_path):
  with pytest.raises(errors.DataError, match=r"min_images_per_identity=9: 9\); loosen"):
    run(faces, to=str(tmp_path / "none"), min_images_per_identity=9)


def test_several_folders_become_one_set_with_prefixes_from_their_names(tmp_path):
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  shard_folders.write(a, {"train": [("x", 1), ("y", 2)], "val": [("x", 3)]})
  shard_folders.write(b, {"train": [("x", 4), ("x", 5)]})
  to = str(tmp_path / "both")
  made = run(b, a, to=to)
  assert made.identities == ("a/x", "a/y", "b/x")
  assert shard_folders.read(to) == [("b/x", 4), ("b/x", 5), ("a/x", 1), ("a/y", 2)]
  assert shard_folders.read(to, "val") == [("a/x", 3)]
  made = run(a, b, to=to + "2", prefixes="m,n")
  assert made.identities == ("m/x", "m/y", "n/x")


def test_identities_of_one_name_become_one_where_asked(tmp_path):
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  shard_folders.write(a, {"train": [("x", 1), ("y", 2)]})
  shard_folders.write(b, {"train": [("x", 4), ("z", 5)]})
  to = str(tmp_path / "both")
  made = run(a, b, to=to, same_names="merge", min_images_per_identity=2)
  assert made.identities == ("x",)
  assert shard_folders.read(to) == [("x", 1), ("x", 4)]


def test_a_list_may_name_identities_with_or_without_the_prefix(tmp_path):
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  shard_folders.write(a, {"train": [("x", 1), ("y", 2)]})
  shard_folders.write(b, {"train": [("x", 4), ("y", 5)]})
  unwanted = write_lines(tmp_path / "unwanted.txt", "x", "b/y")
  made = run(a, b, to=str(tmp_path / "both"), exclude_identities=unwanted)
  assert made.identities == ("a/y",)


def test_renaming_makes_two_identities_one(faces, tmp_path):
  to = str(tmp_path / "renamed")
  table = write_lines(tmp_path / "new.csv", "cy,bob", '"ada", zoe')
  made = run(faces, to=to, relabel=table)
  assert made.identities == ("bob", "zoe")
  assert made.identity_names == {"zoe": "Ada_Lovelace"}
  assert sorted(shard_folders.read(to)) == [
    ("bob", 11),
    ("bob", 12),
    ("bob", 21),
    *(("zoe", number) for number in (1, 2, 3, 4)),
  ]


def test_a_selection_can_be_selected_from(faces, tmp_path):
  first, second = str(tmp_path / "deep" / "first"), str(tmp_path / "second")
  run(faces, to=first, relabel=write_lines(tmp_path / "new.csv", "ada,zoe"))
  unwanted = write_lines(tmp_path / "unwanted.txt", "cy")
  made = run(first, to=second, exclude_identities=unwanted, prefixes="p")
  assert made.identities == ("p/bob", "p/zoe")
  assert {shard.folder for shard in made.shards} == {"../faces"}
  assert shard_folders.read(second, "val") == [("p/zoe", 5), ("p/bob", 13)]


@pytest.mark.parametrize(
  "selection",
  [
    {},
    {"folders": []},
    {"folders": {}},
    {"folders": {"../faces": {"renamed": {}}}},
    {"folders": {"../faces": {"prefix": 3, "renamed": {}}}},
    {"folders": {"../faces": {"prefix": "", "renamed": [["ada", "x"]]}}},
    {"folders": {"../faces": {"prefix": "", "renamed": {"ada": 3}}}},
  ],
)
def test_a_selection_that_does_not_say_its_names_is_refused(faces, tmp_path, selection):
  first = str(tmp_path / "all")
  made = run(faces, to=first)
  manifest.save(dataclasses.replace(made, selection=selection), first)
  text = r"all/manifest\.json: the selection does not say what .* \.\./faces are called"
  with pytest.raises(errors.DataError, match=text):
    run(first, to=str(tmp_path / "again"))


def test_one_shard_given_twice_is_refused(faces, tmp_path):
  run(faces, to=str(tmp_path / "all"))
  with pytest.raises(errors.UsageError, match=r"both hold .*train-00000-of-00002"):
    run(faces, str(tmp_path / "all"), to=str(tmp_path / "twice"))


def test_folders_that_do_not_go_together_are_refused(faces, tmp_path):
  made = manifest.load(faces)
  for name, changes in (
    ("image_size", {"image_size": 32}),
    ("alignment", {"alignment": {"template": "loose"}}),
    (
      "verification",
      {"kind": "verification", "pairs": manifest.Pairs("pairs.npy", 0, 0, 0)},
    ),
  ):
    other = str(tmp_path / name)
    manifest.save(dataclasses.replace(made, **changes), other)
    with pytest.raises(errors.DataError, match=f"{other} ho?[la][ds].* {name}"):
      run(faces, other, to=str(tmp_path / "both"))


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"prefixes": "p"}, "--prefixes=p must be a different name for each of the 2"),
    ({"prefixes": "p,p"}, "--prefixes=p,p must be"),
    ({"prefixes": "p,q", "same_names": "merge"}, "would keep apart"),
  ],
)
def test_prefixes_must_tell_the_folders_apart(faces, tmp_path, changes, text):
  shard_folders.write(str(tmp_path / "b"), {"train": [("x", 1), ("y", 2)]})
  with pytest.raises(errors.UsageError, match=text):
    run(faces, str(tmp_path / "b"), to=str(tmp_path / "both"), **changes)


def test_the_same_command_again_changes_nothing_and_another_is_refused(faces, tmp_path):
  to = tmp_path / "some"
  run(faces, to=str(to), max_images_per_identity=2)
  before = {path.name: path.stat().st_mtime_ns for path in to.iterdir()}
  run(faces, to=str(to), max_images_per_identity=2)
  assert {path.name: path.stat().st_mtime_ns for path in to.iterdir()} == before
  with pytest.raises(errors.ConfigError, match="with other max_images_per_identity"):
    run(faces, to=str(to), max_images_per_identity=3)
  with pytest.raises(errors.ConfigError, match="holds shards"):
    run(faces, to=faces)


def test_the_fingerprint_changes_with_the_selection(faces, tmp_path):
  prints = {manifest.load(faces).fingerprint}
  for number, changes in enumerate(
    ({}, {"max_images_per_identity": 2}, {"min_images_per_identity": 3})
  ):
    prints.add(run(faces, to=str(tmp_path / str(number)), **changes).fingerprint)
  assert len(prints) == 4


def test_a_corrupt_index_is_named(faces, tmp_path):
  index = pathlib.Path(faces, "train-00001-of-00002.index.npy")
  files.flip_byte(index, -1)
  with pytest.raises(
    errors.DataError, match=r"train-00001-of-00002\.index\.npy is corrupt: CRC"
  ):
    run(faces, to=str(tmp_path / "all"))


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
  shard_folders.write(f"{bucket}/sets/faces", FACES)
  made = run(f"{bucket}/sets/faces", to=f"{bucket}/chosen/all")
  assert {shard.folder for shard in made.shards} == {"../../sets/faces"}
  path = made.shards[0].path(f"{bucket}/chosen/all")
  assert storage.crc32c_of(storage.read_bytes(path)) == made.shards[0].crc32c
  made = run(f"{bucket}/sets/faces", to=str(tmp_path / "here"))
  assert {shard.folder for shard in made.shards} == {f"{bucket}/sets/faces"}
  with pytest.raises(errors.UsageError, match="copy the shards to the bucket first"):
    run(faces, to=f"{bucket}/chosen/local")


@pytest.mark.slow
def test_training_and_validation_run_on_a_selection_of_two_folders(tmp_path):
  for seed, name in enumerate("ab"):
    noise_sets.write(
      tmp_path / name,
      identities=4,
      images=8,
      val_images=2,
      size=32,
      shards=2,
      seed=seed,
    )
  made = run(
    str(tmp_path / "a"),
    str(tmp_path / "b"),
    to=str(tmp_path / "both"),
    max_images_per_identity=6,
  )
  assert {name: split.records for name, split in made.splits.items()} == {
    "train": 48,
    "val": 16,
  }
  command = [
    *(sys.executable, "-m", "facedist.train"),
    *("--backbone=tinynet", "--backbone_weights=none", "--embedding_size=8"),
    *("--global_batch=16", "--head_epochs=0.3", "--full_epochs=1", "--strategy=one"),
    f"--data_dir={tmp_path / 'both'}",
    f"--workdir={tmp_path / 'run'}",
  ]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=250, check=False
  )
  assert done.returncode == 0, done.stderr
  facts = f"48 images of 8 identities, 32 px, fingerprint {made.fingerprint}"
  assert facts in done.stderr


RECORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=24)


@hypothesis.given(train=RECORDS, val=RECORDS, data=st.data())
@hypothesis.settings(max_examples=25)
def test_a_selection_is_a_part_of_its_input_and_each_record_is_there_once(
  tmp_path_factory, train, val, data
):
  folder = tmp_path_factory.mktemp("sets")
  content = {
    "train": [(name, number) for number, name in enumerate(train)],
    "val": [(name, 50 + number) for number, name in enumerate(val) if name in train],
  }
  content = {split: faces for split, faces in content.items() if faces}
  shard_folders.write(str(folder / "faces"), content, num_shards=1)
  minimum, maximum = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
  to = str(folder / "some")
  rules = {"min_images_per_identity": minimum, "max_images_per_identity": maximum}
  counts = dict.fromkeys(train, 0)
  for split in content.values():
    for name, _ in split:
      counts[name] += 1
  expected = sorted(name for name, count in counts.items() if count >= minimum)
  if not expected:
    with pytest.raises(errors.DataError):
      run(str(folder / "faces"), to=to, **rules)
    return
  made = run(str(folder / "faces"), to=to, **rules)
  assert made.identities == tuple(expected)
  kept = shard_folders.read(to)
  assert len(set(kept)) == len(kept)
  assert set(kept) <= set(content["train"])
  for name in expected:
    of_name = [one for one in kept if one[0] == name]
    assert len(of_name) == min(maximum, train.count(name))
  if "val" in made.splits:
    assert set(shard_folders.read(to, "val")) == {
      one for one in content["val"] if one[0] in expected
    }


def test_the_order_of_flags_and_of_lines_does_not_matter(faces, tmp_path):
  lines = ["ada", "bob", "cy"]
  rules = ["--max_images_per_identity=1", "--min_images_per_identity=2", "--seed=3"]
  contents = []
  for number in range(2):
    random.Random(number).shuffle(lines)
    wanted = write_lines(tmp_path / f"{number}.txt", *lines)
    to = tmp_path / f"order{number}"
    given = [f"--input_dirs={faces}", f"--output_dir={to}", f"--identities={wanted}"]
    given += rules[::-1] if number else rules
    parsed = flags.FlagValues()
    config.define_flags(select.SelectConfig, parsed)
    parsed(["select", *given])
    select.main(config.from_flags(select.SelectConfig, parsed))
    contents.append({path.name: path.read_bytes() for path in to.iterdir()})
  assert contents[0] == contents[1]
  json.loads(contents[0]["manifest.json"])
  assert len(np.load(tmp_path / "order0" / "train-00000-of-00002.index.npy")) == 1
