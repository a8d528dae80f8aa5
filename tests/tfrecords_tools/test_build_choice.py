"""Flags of the builder that choose images: what is built, and what is told of it."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from facedist import errors
from facedist.data.readers import local_reader
from facedist.data.shards import manifest
from tests.tfrecords_tools.test_select import run, write_lines
from tfrecords_tools import build, verify


def made_of(config, name: str, **changes) -> manifest.Manifest:
  """Builds with other flags, beside the given folder; returns the manifest."""
  folder = f"{config.output_dir}_{name}"
  build.main(dataclasses.replace(config, output_dir=folder, **changes))
  return manifest.load(folder)


def images_in(folder: str, split: str = "train") -> list[tuple[str, bytes]]:
  """Returns identity and JPEG of each record, in order."""
  opened = local_reader.open_reader(folder, split)
  jpegs, labels = opened.read(np.arange(opened.num_records))
  names = opened.manifest.identities
  return [
    (names[label], bytes(jpeg)) for jpeg, label in zip(jpegs, labels, strict=True)
  ]


def counts(made: manifest.Manifest) -> dict[str, int]:
  return {name: split.records for name, split in made.splits.items()}


def test_listed_identities_alone_are_built_and_the_others_images_counted(
  vggface2_dir, build_config, tmp_path
):
  wanted = write_lines(tmp_path / "wanted.txt", "n000003", "n000007", "n000042")
  unwanted = write_lines(tmp_path / "unwanted.txt", "n000007")
  made = made_of(
    build_config(vggface2_dir),
    "listed",
    identities=wanted,
    exclude_identities=unwanted,
  )
  assert made.identities == ("n000003",)
  assert counts(made) == {"train": 4}
  assert made.source["left_out"] == {"--identities": 3}
  assert made.source["excluded_identities"] == ["n000007"]


def test_the_minimum_counts_images_that_have_a_row(vggface2_dir, build_config):
  table = vggface2_dir.parent / "loose_landmark_train.csv"
  rows = table.read_text().splitlines()
  table.write_text("\n".join(row for row in rows if "n000003/0002_01" not in row))
  config = build_config(vggface2_dir)  # n000001 has 3 images, n000003 now 3 of 4
  made = made_of(config, "three", min_images_per_identity=3)
  assert made.identities == ("n000001", "n000003")
  assert made.source["left_out"] == {"--min_images_per_identity=3": 1}
  with pytest.raises(errors.DataError, match="min_images_per_identity=4 leaves no"):
    made_of(config, "four", min_images_per_identity=4)


def test_the_minimum_counts_val_and_the_maximum_does_not(vggface2_dir, build_config):
  made = made_of(
    build_config(vggface2_dir),
    "both",
    min_images_per_identity=3,
    max_images_per_identity=1,
    val_fraction=0.5,
  )
  # Of 3 and 4 images 2 each are held out (1.5 is rounded up), and 1 and 2 are left.
  assert counts(made) == {"train": 2, "val": 4}
  assert made.source["images"] == 6
  assert made.source["min_images_per_identity"] == 3
  assert made.source["max_images_per_identity"] == 1
  assert made.source["left_out"] == {
    "--min_images_per_identity=3": 1,
    "--max_images_per_identity=1": 1,
  }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_build_and_select_take_the_same_images_in_the_same_order(
  vggface2_dir, build_config, tmp_path, seed
):
  config = build_config(vggface2_dir, seed=seed, val_fraction=0.34)
  chosen = {"min_images_per_identity": 2, "max_images_per_identity": 2}
  built = made_of(config, "chosen", **chosen)
  made_of(config, "all")
  selected = run(f"{config.output_dir}_all", to=str(tmp_path / "selected"), **chosen)
  assert built.identities == selected.identities == ("n000001", "n000003")
  for split in ("train", "val"):
    expected = images_in(f"{config.output_dir}_chosen", split)
    assert images_in(str(tmp_path / "selected"), split) == expected
  assert counts(built) == {"train": 4, "val": 2}
  found = verify.verify(str(tmp_path / "selected"), verify.Totals(), num_processes=1)
  assert list(found) == []


def test_another_seed_takes_other_images(vggface2_dir, build_config):
  taken = set()
  for seed in range(4):
    config = build_config(vggface2_dir, seed=seed)
    made_of(config, f"seed{seed}", max_images_per_identity=1)
    taken.add(tuple(sorted(images_in(f"{config.output_dir}_seed{seed}"))))
  assert len(taken) > 1


def test_tasks_with_other_flags_do_not_mix(vggface2_dir, build_config, tmp_path):
  wanted = write_lines(tmp_path / "wanted.txt", "n000001", "n000003", "n000007")
  for number, changes in enumerate(
    (
      {"identities": wanted},
      {"min_images_per_identity": 2},
      {"max_images_per_identity": 9},
    )
  ):
    config = build_config(vggface2_dir, output_dir=str(tmp_path / f"mixed{number}"))
    build.main(dataclasses.replace(config, num_tasks=2, task_index=0))
    with pytest.raises(errors.ConfigError, match=next(iter(changes))):
      build.main(dataclasses.replace(config, num_tasks=2, task_index=1, **changes))


def test_tasks_and_finalize_agree_on_the_choice(vggface2_dir, build_config, tmp_path):
  chosen = {"min_images_per_identity": 3, "max_images_per_identity": 2}
  config = build_config(vggface2_dir, **chosen)
  made = made_of(config, "alone")
  tasks = dataclasses.replace(config, output_dir=str(tmp_path / "tasks"), num_tasks=2)
  for index in (1, 0):
    build.main(dataclasses.replace(tasks, task_index=index))
  build.main(dataclasses.replace(tasks, finalize=True))
  assert manifest.load(tasks.output_dir) == made


def test_without_the_flags_the_settings_are_what_they_were(vggface2_dir, build_config):
  config = build_config(vggface2_dir)
  build.main(config)
  path = pathlib.Path(config.output_dir, ".build", "settings.json")
  assert list(json.loads(path.read_text())) == [
    "dataset",
    "tool_version",
    "opencv",
    "image_size",
    "quality",
    "margin",
    "images",
    "identities",
    "shards",
    "input_crc32c",
    "seed",
    "val_fraction",
  ]
  assert "left_out" not in manifest.load(config.output_dir).source


@pytest.mark.parametrize(
  "changes",
  [
    {"identities": "some.txt"},
    {"exclude_identities": "some.txt"},
    {"min_images_per_identity": 2},
    {"max_images_per_identity": 1},
  ],
)
def test_verification_sets_are_not_chosen_from(lfw_dir, build_config, changes):
  config = build_config(lfw_dir, dataset="lfw", **changes)
  (flag,) = changes
  with pytest.raises(errors.UsageError, match=f"--{flag}=.* would break the pairs"):
    build.main(config)
