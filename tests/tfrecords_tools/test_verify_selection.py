"""tfrecords_tools.verify on selections: whose faces an index says the records show."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from facedist import storage
from facedist.data.shards import manifest, shard_index
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.folders import problems_of
from tests.tfrecords_tools.test_select import run, write_lines


@pytest.fixture
def merged(tmp_path: pathlib.Path) -> str:
  """Two folders as one set: a/x and b/x are two people, a/y and b/z are both `zoe`."""
  of_a = {"train": [("x", 1), ("y", 2)], "val": [("x", 3)]}
  a = shard_folders.write(tmp_path / "a", of_a)
  of_b = {"train": [("x", 4), ("z", 5), ("x", 6)]}
  b = shard_folders.write(tmp_path / "b", of_b)
  table = write_lines(tmp_path / "new.csv", "a/y,zoe", "b/z,zoe")
  to = str(tmp_path / "merged")
  assert run(a, b, to=to, relabel=table).identities == ("a/x", "b/x", "zoe")
  return to


def change_labels(folder: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
  """Writes all indexes with other labels, and a manifest that confirms them."""
  made = manifest.load(folder)
  splits = {}
  for split_name, split in made.splits.items():
    shards = []
    for shard in split.shards:
      rows = shard_index.load(shard.index_path(folder))
      rows["label"] = change(rows["label"])
      content = shard_index.to_bytes(rows)
      pathlib.Path(folder, shard.index_name).write_bytes(content)
      crc32c = storage.crc32c_of(content)
      shards.append(dataclasses.replace(shard, index_crc32c=crc32c))
    splits[split_name] = manifest.Split(split.records, tuple(shards))
  manifest.save(dataclasses.replace(made, splits=splits), folder)


def test_records_under_another_identitys_label_are_named(merged):
  change_labels(merged, lambda labels: np.array([1, 0, 2])[labels])  # a/x for b/x
  problems = problems_of(merged)
  assert len(problems) == 4  # faces 1 and 3 of a/x, 4 and 6 of b/x
  assert sum("identity x, here a/x, has label 1" in one for one in problems) == 2
  assert sum("is a/x in the manifest" in one for one in problems) == 2


def test_a_selection_that_forgets_a_renaming_is_named(merged):
  made = manifest.load(merged)
  made.selection["folders"]["../b"]["renamed"].clear()
  manifest.save(made, merged)
  (problem,) = problems_of(merged)
  assert "identity z, here b/z, has label 2 in the index, which is zoe" in problem


def test_a_selection_that_does_not_say_its_names_is_one_problem(merged):
  made = manifest.load(merged)
  made.selection["folders"].clear()
  manifest.save(made, merged)
  (problem,) = problems_of(merged)
  assert "does not say what the identities of ../a are called" in problem


def test_a_selection_of_a_selection_is_checked_by_its_own_names(merged, tmp_path):
  to = str(tmp_path / "deep" / "second")
  unwanted = write_lines(tmp_path / "unwanted.txt", "b/x")
  table = write_lines(tmp_path / "newer.csv", "p/zoe,p/a/x", "p/a/x,p/zoe")
  made = run(merged, to=to, exclude_identities=unwanted, relabel=table, prefixes="p")
  assert made.identities == ("p/a/x", "p/zoe")  # swapped
  assert sorted(shard_folders.read(to)) == [("p/a/x", 2), ("p/a/x", 5), ("p/zoe", 1)]
  assert problems_of(to) == []
  change_labels(to, lambda labels: 1 - labels)
  assert len(problems_of(to)) == 4


def test_a_copy_that_training_cached_is_checked_but_for_names(merged, tmp_path):
  cached = tmp_path / "cached"
  cached.mkdir()
  made = manifest.load(merged)
  gathered = manifest.gathered(made)
  for before, after in zip(made.shards, gathered.shards, strict=True):
    os.link(before.path(merged), cached / after.name)
    os.link(before.index_path(merged), cached / after.index_name)
  manifest.save(gathered, str(cached))
  assert problems_of(str(cached)) == []
