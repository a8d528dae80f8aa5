"""tfrecords_tools.duplicates: copies by hand, in any identity, split and folder."""

import json
import os
import pathlib

import numpy as np
import pytest

from tests import files
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.test_select import run
from tfrecords_tools.selection import dedup, filters, merge

# Face 1 is twice ada's; 2 is ada's and bob's; 3 is in train and in val.
FACES = {
  "train": [("ada", 1), ("ada", 2), ("ada", 1), ("ada", 3), ("bob", 2), ("bob", 4)],
  "val": [("ada", 3), ("bob", 5)],
}


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> str:
  folder = str(tmp_path / "faces")
  shard_folders.write(folder, FACES)
  return folder


def report_of(folder: str) -> list[dict]:
  text = pathlib.Path(folder, "duplicates.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_the_first_copy_stays_and_images_of_two_identities_all_go(faces, tmp_path):
  to = str(tmp_path / "some")
  made = run(faces, to=to, duplicates="drop")
  assert shard_folders.read(to) == [("ada", 1), ("ada", 3), ("bob", 4)]
  assert shard_folders.read(to, "val") == [("bob", 5)]
  assert made.source["across_identities"] == "drop_all"
  assert made.selection["left_out"]["--duplicates=drop, drop_all"] == 4


def test_the_first_copy_of_two_identities_stays_where_asked(faces, tmp_path):
  to = str(tmp_path / "some")
  run(faces, to=to, duplicates="drop", across_identities="keep_first")
  assert shard_folders.read(to) == [("ada", 1), ("ada", 2), ("ada", 3), ("bob", 4)]


def test_copies_are_kept_unless_asked(faces, tmp_path):
  run(faces, to=str(tmp_path / "all"))
  assert shard_folders.read(str(tmp_path / "all")) == FACES["train"]


def test_the_report_tells_each_image_that_is_there_twice(faces, tmp_path):
  to = str(tmp_path / "some")
  run(faces, to=to, duplicates="drop")
  first, second = (
    os.path.join(faces, f"train-0000{number}-of-00002.tfrecord") for number in (0, 1)
  )
  held_out = os.path.join(faces, "val-00000-of-00002.tfrecord")

  def record(identity: str, shard: str, number: int, face: int) -> dict:
    return {
      "identity": identity,
      "split": "val" if shard == held_out else "train",
      "shard": shard,
      "record": number,
      "filename": f"{identity}/{face}.jpg",
    }

  expected = [
    {
      "across_identities": False,
      "kept": record("ada", first, 0, 1),
      "dropped": [record("ada", first, 2, 1)],
    },
    {
      "across_identities": True,
      "kept": None,
      "dropped": [record("ada", first, 1, 2), record("bob", second, 1, 2)],
    },
    {
      "across_identities": False,
      "kept": record("ada", second, 0, 3),
      "dropped": [record("ada", held_out, 0, 3)],
    },
  ]
  found = sorted(report_of(to), key=lambda line: line["dropped"][0]["record"])
  expected.sort(key=lambda line: line["dropped"][0]["record"])
  assert found == expected


def test_a_corrupt_record_has_no_filename_in_the_report(faces, tmp_path):
  shard = pathlib.Path(faces, "train-00000-of-00002.tfrecord")
  files.flip_byte(shard, -1)  # the last record's CRC, of the second copy of face 1
  to = str(tmp_path / "some")
  run(faces, to=to, duplicates="drop")
  (line,) = (line for line in report_of(to) if line["dropped"][0]["record"] == 2)
  assert line["kept"]["filename"] == "ada/1.jpg"
  assert line["dropped"][0]["filename"] is None


def test_copies_are_found_across_folders_and_of_identities_made_one(tmp_path):
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  shard_folders.write(a, {"train": [("x", 1), ("x", 2)]})
  shard_folders.write(b, {"train": [("x", 2), ("x", 3)]})
  to = str(tmp_path / "apart")
  run(a, b, to=to, duplicates="drop")
  assert shard_folders.read(to) == [("a/x", 1), ("b/x", 3)]
  to = str(tmp_path / "as_one")
  run(a, b, to=to, duplicates="drop", same_names="merge")
  assert shard_folders.read(to) == [("x", 1), ("x", 2), ("x", 3)]


def test_an_excluded_identitys_images_are_no_copies(faces, tmp_path):
  unwanted = tmp_path / "unwanted.txt"
  unwanted.write_text("ada\n")
  to = str(tmp_path / "some")
  run(faces, to=to, duplicates="drop", exclude_identities=str(unwanted))
  assert shard_folders.read(to) == [("bob", 2), ("bob", 4)]
  assert report_of(to) == []


def test_duplicates_go_before_images_are_counted(faces, tmp_path):
  to = str(tmp_path / "some")
  run(faces, to=to, duplicates="drop", max_images_per_identity=2)
  assert shard_folders.read(to) == [("ada", 1), ("ada", 3), ("bob", 4)]


def test_hashes_are_kept_for_the_next_time(faces, tmp_path):
  inputs = merge.open_inputs([faces], prefixes=None, same_names="separate", renamed={})
  parts = merge.parts_of(inputs)
  first = dedup.digest_parts(parts, str(tmp_path / "some"), num_processes=1)
  cache = tmp_path / "some" / ".digests"
  assert len(os.listdir(cache)) == 4
  victim = next(cache.iterdir())
  victim.write_bytes(b"cut off")
  for part in parts:
    if victim.name[:8] != f"{part.shard.crc32c:08x}":
      os.remove(part.path)  # those that are cached are not read again
  again = dedup.digest_parts(parts, str(tmp_path / "some"), num_processes=1)
  np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_hashes_do_not_depend_on_processes_and_are_blake2b_of_the_jpeg(faces, tmp_path):
  import hashlib

  inputs = merge.open_inputs([faces], prefixes=None, same_names="separate", renamed={})
  digests = dedup.digest_parts(
    merge.parts_of(inputs), str(tmp_path / "some"), num_processes=2
  )
  expected = b"".join(
    hashlib.blake2b(shard_folders.face(number), digest_size=16).digest()
    for _, number in FACES["train"] + FACES["val"]
  )
  assert digests.tobytes() == expected


def test_groups_hold_whole_digests_and_leave_singles_alone():
  digests = np.array([[1, 2], [1, 3], [0, 3], [1, 2], [9, 9], [1, 2]], np.uint64)
  labels = np.array([0, 0, 0, 1, filters.LEFT_OUT, 1], np.int32)
  (group,) = dedup.groups_of(digests, labels, across="keep_first")
  assert group.records.tolist() == [0, 3, 5]
  assert (group.across, group.kept) == (True, 0)
  (group,) = dedup.groups_of(digests, labels, across="drop_all")
  assert group.kept is None
  assert not list(dedup.groups_of(digests[:0], labels[:0], across="drop_all"))


def test_stretches_are_cut_by_records_and_by_bytes(faces, monkeypatch):
  inputs = merge.open_inputs([faces], prefixes=None, same_names="separate", renamed={})
  part = merge.parts_of(inputs)[0]
  (whole,) = dedup.tasks_of(part)
  assert len(whole.firsts) == 3
  monkeypatch.setattr(dedup, "_BYTES_A_TASK", 1)
  assert [len(task.firsts) for task in dedup.tasks_of(part)] == [1, 1, 1]
