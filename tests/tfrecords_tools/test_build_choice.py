"""Flags of the builder that choose images: what is built, and what is told of it."""

import json
import pathlib

import pytest

from facedist import errors
from facedist.data.shards import manifest
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.folders import problems_of
from tests.tfrecords_tools.test_select import run, write_lines


def counts(made: manifest.Manifest) -> dict[str, int]:
  return {name: split.records for name, split in made.splits.items()}


def test_listed_identities_alone_are_built_and_the_others_images_counted(
  vggface2_dir, build_set, tmp_path
):
  made = manifest.load(
    build_set(
      vggface2_dir,
      identities=write_lines(tmp_path / "a.txt", "n000003", "n000007", "n000042"),
      exclude_identities=write_lines(tmp_path / "b.txt", "n000007"),
    )
  )
  assert made.identities == ("n000003",)
  assert counts(made) == {"train": 4}
  assert made.source["left_out"] == {"--identities": 3}
  assert made.source["excluded_identities"] == ["n000007"]


def test_the_minimum_counts_images_that_have_a_row(vggface2_dir, build_set):
  table = vggface2_dir.parent / "loose_landmark_train.csv"
  rows = table.read_text().splitlines()
  table.write_text("\n".join(row for row in rows if "n000003/0002_01" not in row))
  # n000001 has 3 images, n000003 now 3 of 4.
  made = manifest.load(build_set(vggface2_dir, min_images_per_identity=3))
  assert made.identities == ("n000001", "n000003")
  assert made.source["left_out"] == {"--min_images_per_identity=3": 1}
  with pytest.raises(errors.DataError, match="min_images_per_identity=4 leaves no"):
    build_set(vggface2_dir, output_dir="four", min_images_per_identity=4)


def test_the_minimum_counts_val_and_the_maximum_does_not(vggface2_dir, build_set):
  rules = {"min_images_per_identity": 3, "max_images_per_identity": 1}
  made = manifest.load(build_set(vggface2_dir, val_fraction=0.5, **rules))
  # Of 3 and 4 images 2 each are held out (1.5 is rounded up), and 1 and 2 are left.
  assert counts(made) == {"train": 2, "val": 4}
  assert made.source["images"] == 6
  assert made.source | rules == made.source
  assert made.source["left_out"] == {
    "--min_images_per_identity=3": 1,
    "--max_images_per_identity=1": 1,
  }


def test_build_and_select_take_the_same_images_in_the_same_order(
  vggface2_dir, build_set, tmp_path
):
  rules = {"min_images_per_identity": 2, "max_images_per_identity": 2}
  taken = set()
  for seed in range(3):
    flags = {"seed": seed, "val_fraction": 0.34}
    built = build_set(vggface2_dir, output_dir=f"chosen{seed}", **flags, **rules)
    everything = build_set(vggface2_dir, output_dir=f"all{seed}", **flags)
    selected = str(tmp_path / f"selected{seed}")
    made = run(everything, to=selected, **rules)
    assert made.identities == ("n000001", "n000003")
    assert counts(made) == {"train": 4, "val": 2}
    for split in ("train", "val"):
      images = shard_folders.images(built, split)
      assert shard_folders.images(selected, split) == images
    taken.add(tuple(sorted(shard_folders.images(built))))
    assert problems_of(selected) == []
  assert len(taken) > 1


@pytest.mark.parametrize(
  "rule", ["identities", "min_images_per_identity", "max_images_per_identity"]
)
def test_tasks_with_other_flags_do_not_mix(vggface2_dir, build_set, tmp_path, rule):
  everybody = write_lines(tmp_path / "all.txt", "n000001", "n000003", "n000007")
  value = everybody if rule == "identities" else 2
  build_set(vggface2_dir, num_tasks=2, task_index=0)
  with pytest.raises(errors.ConfigError, match=rule):
    build_set(vggface2_dir, num_tasks=2, task_index=1, **{rule: value})


def test_tasks_and_finalize_agree_on_the_choice(vggface2_dir, build_set):
  rules = {"min_images_per_identity": 3, "max_images_per_identity": 2}
  alone = build_set(vggface2_dir, output_dir="alone", **rules)
  for flags in ({"task_index": 1}, {"task_index": 0}, {"finalize": True}):
    folder = build_set(vggface2_dir, num_tasks=2, **flags, **rules)
  assert manifest.load(folder) == manifest.load(alone)


def test_without_the_flags_the_settings_are_what_they_were(vggface2_dir, build_set):
  folder = build_set(vggface2_dir)
  settings = json.loads(pathlib.Path(folder, ".build", "settings.json").read_text())
  names = "dataset tool_version opencv image_size quality margin images identities"
  names += " shards input_crc32c seed val_fraction"
  assert list(settings) == names.split()
  assert "left_out" not in manifest.load(folder).source


@pytest.mark.parametrize(
  ("flag", "value"),
  [
    ("identities", "some.txt"),
    ("exclude_identities", "some.txt"),
    ("min_images_per_identity", 2),
    ("max_images_per_identity", 1),
  ],
)
def test_verification_sets_are_not_chosen_from(lfw_dir, build_set, flag, value):
  with pytest.raises(errors.UsageError, match=f"--{flag}=.* would break the pairs"):
    build_set(lfw_dir, dataset="lfw", **{flag: value})
