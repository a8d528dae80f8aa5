"""tfrecords_tools.selection.dedup: copies in any identity, split and folder."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest

from tests import files
from tests.tfrecords_tools import shard_folders
from tests.tfrecords_tools.test_select import run, write_lines
from tfrecords_tools.selection import dedup, filters, merge

# Face 1 is twice ada's; 2 is ada's and bob's; 3 is in train and in val.
FACES = {
  "train": [("ada", 1), ("ada", 2), ("ada", 1), ("ada", 3), ("bob", 2), ("bob", 4)],
  "val": [("ada", 3), ("bob", 5)],
}


@pytest.fixture
def faces(tmp_path: pathlib.Path) -> str:
  return shard_folders.write(tmp_path / "faces", FACES)


def report_of(folder: pathlib.Path) -> list[dict]:
  """Returns the report's lines, in the order of the first record that is dropped."""
  lines = map(json.loads, (folder / "duplicates.jsonl").read_text().splitlines())
  return sorted(lines, key=lambda line: line["dropped"][0]["record"])


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"duplicates": "keep"}, FACES["train"]),
    ({}, [("ada", 1), ("ada", 3), ("bob", 4)]),
    ({"max_images_per_identity": 2}, [("ada", 1), ("ada", 3), ("bob", 4)]),
    (
      {"across_identities": "keep_first"},
      [("ada", 1), ("ada", 2), ("ada", 3), ("bob", 4)],
    ),
  ],
)
def test_the_first_copy_stays_and_images_of_two_identities_go_unless_asked(
  faces, tmp_path, changes, expected
):
  run(faces, to=tmp_path / "some", **({"duplicates": "drop"} | changes))
  assert shard_folders.read(tmp_path / "some") == expected


def test_what_is_dropped_is_counted_and_told_with_each_copys_place(faces, tmp_path):
  made = run(faces, to=tmp_path / "some", duplicates="drop")
  assert shard_folders.read(tmp_path / "some", "val") == [("bob", 5)]
  assert made.selection["left_out"]["--duplicates=drop, drop_all"] == 4

  def record(name: str, number: int, identity: str, image: int) -> dict:
    return {
      "identity": identity,
      "split": name.split("-")[0],
      "shard": os.path.join(faces, f"{name}-of-00002.tfrecord"),
      "record": number,
      "filename": f"{identity}/{image}.jpg",
    }

  expected = [
    (False, record("train-00001", 0, "ada", 3), [record("val-00000", 0, "ada", 3)]),
    (
      True,
      None,
      [record("train-00000", 1, "ada", 2), record("train-00001", 1, "bob", 2)],
    ),
    (False, record("train-00000", 0, "ada", 1), [record("train-00000", 2, "ada", 1)]),
  ]
  assert report_of(tmp_path / "some") == [
    {"across_identities": across, "kept": kept, "dropped": dropped}
    for across, kept, dropped in expected
  ]


def test_a_corrupt_record_has_no_filename_in_the_report(faces, tmp_path):
  # The last record's CRC, of the second copy of face 1.
  files.flip_byte(os.path.join(faces, "train-00000-of-00002.tfrecord"), -1)
  run(faces, to=tmp_path / "some", duplicates="drop")
  line = report_of(tmp_path / "some")[-1]
  assert line["kept"]["filename"] == "ada/1.jpg"
  assert line["dropped"][0]["filename"] is None


@pytest.mark.parametrize(
  ("same_names", "expected"),
  [
    ("separate", [("a/x", 1), ("b/x", 3)]),
    ("merge", [("x", 1), ("x", 2), ("x", 3)]),
  ],
)
def test_copies_are_found_across_folders_and_of_identities_made_one(
  tmp_path, same_names, expected
):
  a = shard_folders.write(tmp_path / "a", {"train": [("x", 1), ("x", 2)]})
  b = shard_folders.write(tmp_path / "b", {"train": [("x", 2), ("x", 3)]})
  run(a, b, to=tmp_path / "both", duplicates="drop", same_names=same_names)
  assert shard_folders.read(tmp_path / "both") == expected


def test_an_excluded_identitys_images_are_no_copies(faces, tmp_path):
  unwanted = write_lines(tmp_path / "unwanted.txt", "ada")
  run(faces, to=tmp_path / "some", duplicates="drop", exclude_identities=unwanted)
  assert shard_folders.read(tmp_path / "some") == [("bob", 2), ("bob", 4)]
  assert report_of(tmp_path / "some") == []


@pytest.mark.parametrize(("bytes_a_task", "num_processes"), [(1, 2), (8 << 20, 1)])
def test_hashes_of_the_jpegs_are_kept_for_the_next_time(
  faces, tmp_path, monkeypatch, bytes_a_task, num_processes
):
  monkeypatch.setattr(dedup, "_BYTES_A_TASK", bytes_a_task)
  inputs = merge.open_inputs([faces], prefixes=None, same_names="separate", renamed={})
  parts = merge.parts_of(inputs)
  to = tmp_path / "some"
  found = dedup.digest_parts(parts, str(to), num_processes=num_processes)
  expected = b"".join(
    hashlib.blake2b(shard_folders.face(number), digest_size=16).digest()
    for _, number in FACES["train"] + FACES["val"]
  )
  assert found.tobytes() == expected
  victim, *others = (to / ".digests").iterdir()
  assert len(others) == 3
  victim.write_bytes(b"cut off")
  for part in parts:
    if victim.name[:8] != f"{part.shard.crc32c:08x}":
      os.remove(part.path)  # those that are cached are not read again
  again = dedup.digest_parts(parts, str(to), num_processes=1)
  np.testing.assert_array_equal(again, found)


def test_groups_hold_whole_digests_and_leave_singles_alone():
  digests = np.array([[1, 2], [1, 3], [0, 3], [1, 2], [9, 9], [1, 2]], np.uint64)
  labels = np.array([0, 0, 0, 1, filters.LEFT_OUT, 1], np.int32)
  (group,) = dedup.groups_of(digests, labels, across="keep_first")
  assert group.records.tolist() == [0, 3, 5]
  assert (group.across, group.kept) == (True, 0)
