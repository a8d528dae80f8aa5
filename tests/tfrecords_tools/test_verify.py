import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from facedist import errors
from facedist.data import manifest, records, shard_index
from tfrecords_tools import build, checks, verify

SHARD = "train-00001-of-00002.tfrecord"
INDEX = "train-00001-of-00002.index.npy"


@pytest.fixture
def built(vggface2_dir, build_config):
  """A folder of two sound shards."""
  config = build_config(vggface2_dir)
  build.main(config)
  return pathlib.Path(config.output_dir)


def problems_of(folder):
  return list(verify.verify(str(folder), manifest.load(str(folder)), num_processes=1))


def rows_of(folder):
  return shard_index.load(str(folder / INDEX))


def change_record(folder, number, change):
  """Writes a record anew, of the same length, with sound CRCs and manifest."""
  row = rows_of(folder)[number]
  start, length = int(row["offset"]), int(row["length"])
  content = bytearray((folder / SHARD).read_bytes())
  record = records.parse(records.unframe(bytes(content[start : start + length])))
  framed = records.frame(records.serialize(change(record)))
  assert len(framed) == length
  content[start : start + length] = framed
  (folder / SHARD).write_bytes(content)
  made = manifest.load(str(folder))
  shards = list(made.splits["train"].shards)
  checksum = records.google_crc32c.value(bytes(content))
  shards[1] = dataclasses.replace(shards[1], crc32c=checksum)
  split = dataclasses.replace(made.splits["train"], shards=tuple(shards))
  manifest.save(dataclasses.replace(made, splits={"train": split}), str(folder))


def test_sound_shards_have_no_problems(built):
  assert problems_of(built) == []
  verify.main(verify.VerifyConfig(data_dir=str(built), num_processes=1))


def test_every_bad_record_is_named_by_shard_number_and_byte(built):
  rows = rows_of(built)
  content = bytearray((built / SHARD).read_bytes())
  for number in (1, 3):
    content[int(rows[number]["offset"]) + 50] ^= 1
  (built / SHARD).write_bytes(content)
  fix = "rebuild this shard with --only_shards=1"
  assert problems_of(built) == [
    f"{SHARD}, record 1 at byte {rows[1]['offset']}: CRC mismatch; {fix}",
    f"{SHARD}, record 3 at byte {rows[3]['offset']}: CRC mismatch; {fix}",
    f"{SHARD} is not the manifest's: CRC mismatch; {fix}",
  ]
  with pytest.raises(errors.DataError, match="has 3 problems"):
    verify.main(verify.VerifyConfig(data_dir=str(built), num_processes=1))


def test_a_damaged_length_does_not_hide_the_records_after_it(built):
  rows = rows_of(built)
  content = bytearray((built / SHARD).read_bytes())
  content[int(rows[0]["offset"])] ^= 1
  content[-1] ^= 1
  (built / SHARD).write_bytes(content)
  first, last, _ = problems_of(built)
  assert f"{SHARD}, record 0 at byte 0: CRC mismatch in the record's length" in first
  assert f"{SHARD}, record 3 at byte {rows[3]['offset']}: CRC mismatch;" in last


def test_a_shard_that_is_cut_off_is_named(built):
  content = (built / SHARD).read_bytes()
  (built / SHARD).write_bytes(content[:-10])
  record, shard = problems_of(built)
  assert f"{SHARD}, record 3" in record
  assert f"has {len(content) - 10} bytes, the manifest says {len(content)}" in shard


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_a_missing_file_is_named(built, name):
  (built / name).unlink()
  (problem,) = problems_of(built)
  assert name in problem


def test_without_an_index_the_records_are_found_by_walking(built):
  rows = rows_of(built)
  content = bytearray((built / SHARD).read_bytes())
  content[int(rows[2]["offset"]) + 50] ^= 1
  (built / SHARD).write_bytes(content)
  (built / INDEX).write_bytes(b"no index")
  record, *rest = problems_of(built)
  assert record.startswith(f"{SHARD}, record 2 at byte {rows[2]['offset']}: CRC")
  assert any("is not a shard index" in problem for problem in rest)


def test_walking_ends_at_a_length_that_cannot_be(built):
  content = bytearray((built / SHARD).read_bytes())
  content[7] = 0xFF
  (built / SHARD).write_bytes(content)
  (built / INDEX).unlink()
  assert problems_of(built)[0].startswith(f"{SHARD}, record 0 at byte 0: CRC mismatch")


@pytest.mark.parametrize(
  ("column", "delta", "reason"),
  [
    ("offset", 1, "leave gaps in the shard"),
    ("length", 1, "leave gaps in the shard"),
    ("image_offset", 1, "is not the manifest's: CRC mismatch"),
    ("label", 1, "is not the manifest's: CRC mismatch"),
  ],
)
def test_an_index_that_does_not_fit_is_named(built, column, delta, reason):
  rows = rows_of(built)
  rows[column][1] += delta
  (built / INDEX).write_bytes(shard_index.to_bytes(rows))
  (problem,) = problems_of(built)
  assert INDEX in problem
  assert reason in problem


@pytest.mark.parametrize(
  ("column", "reason"),
  [("image_offset", "does not point at the record's image"), ("label", "in the index")],
)
def test_an_index_that_the_manifest_confirms_is_still_checked(built, column, reason):
  rows = rows_of(built)
  rows[column][1] += 1
  task = checks.Task(
    path=str(built / SHARD),
    number=1,
    first=0,
    rows=rows,
    has_index=True,
    identities=manifest.load(str(built)).identities,
    image_size=112,
  )
  (problem,) = checks.check_records(task).problems
  assert f"record 1 at byte {rows[1]['offset']}" in problem
  assert reason in problem


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"label": 9}, "label 9 is not below the 3 identities"),
    ({"identity": "n000000"}, "identity n000000 has label"),
  ],
)
def test_a_record_of_a_wrong_label_is_named(built, change, reason):
  change_record(built, 2, lambda record: dataclasses.replace(record, **change))
  (problem,) = problems_of(built)
  assert problem.startswith(f"{SHARD}, record 2 at byte")
  assert reason in problem


def test_an_image_that_does_not_decode_is_named(built):
  change_record(
    built,
    2,
    lambda record: dataclasses.replace(record, jpeg=bytes(len(record.jpeg))),
  )
  (problem,) = problems_of(built)
  assert "record 2" in problem
  assert "broken JPEG" in problem


def test_an_image_of_another_size_is_named(built):
  made = manifest.load(str(built))
  manifest.save(dataclasses.replace(made, image_size=96), str(built))
  found = problems_of(built)
  assert len(found) == 8
  assert all("112x112 pixels, the manifest says 96x96" in problem for problem in found)


def test_a_manifest_that_contradicts_itself_is_named(built):
  made = manifest.load(str(built))
  split = dataclasses.replace(made.splits["train"], records=9)
  changed = dataclasses.replace(made, splits={"train": split})
  manifest.save(changed, str(built))
  with pytest.raises(errors.DataError, match="records is 9, its shards have 8"):
    verify.main(verify.VerifyConfig(data_dir=str(built)))


def test_a_folder_without_a_manifest_is_an_error(tmp_path):
  with pytest.raises(errors.DataError, match=r"manifest\.json does not exist"):
    verify.main(verify.VerifyConfig(data_dir=str(tmp_path)))


@pytest.fixture
def verification_set(lfw_dir, build_config):
  config = build_config(lfw_dir, dataset="lfw", num_shards=None)
  build.main(config)
  return pathlib.Path(config.output_dir)


def save_pairs(folder, pairs):
  """Writes the pairs and makes the manifest agree with the file."""
  np.save(folder / "pairs.npy", np.array(pairs, np.int32))
  content = (folder / "pairs.npy").read_bytes()
  made = manifest.load(str(folder))
  entry = dataclasses.replace(made.pairs, crc32c=records.google_crc32c.value(content))
  manifest.save(dataclasses.replace(made, pairs=entry), str(folder))


SOUND = [[2, 3, 1, 0], [4, 5, 0, 0], [0, 1, 1, 1], [1, 2, 0, 1]]


@pytest.mark.parametrize(
  ("place", "value", "reason"),
  [
    ((1, 1), 6, "names records past the 6"),
    ((1, 0), -1, "names records past the 6"),
    ((0, 3), 2, "does not have 2 folds"),
    ((0, 2), 0, "1 pairs whose 'same' contradicts the labels, such as pair 0"),
  ],
)
def test_pairs_that_cannot_be_are_named(verification_set, place, value, reason):
  pairs = np.array(SOUND)
  save_pairs(verification_set, pairs)
  assert problems_of(verification_set) == []
  pairs[place] = value
  save_pairs(verification_set, pairs)
  assert any(reason in problem for problem in problems_of(verification_set))


def test_pairs_of_another_set_are_named(verification_set):
  np.save(verification_set / "pairs.npy", np.zeros((4, 4), np.int32))
  (problem,) = problems_of(verification_set)
  assert "pairs.npy is not the manifest's" in problem
  os.remove(verification_set / "pairs.npy")
  (problem,) = problems_of(verification_set)
  assert "pairs.npy is missing" in problem


def test_the_folder_may_be_given_without_the_flag():
  given = ["/data/shards", "--num_processes=2"]
  expected = ["--data_dir=/data/shards", "--num_processes=2"]
  assert verify.with_folder_as_flag(given) == expected
  assert verify.with_folder_as_flag(expected) == expected
  assert verify.with_folder_as_flag([]) == []


@pytest.mark.slow
def test_the_command_uses_many_processes_and_ends_with_the_errors_code(built):
  command = [sys.executable, "-m", "tfrecords_tools.verify", str(built)]
  command.append("--num_processes=2")
  sound = subprocess.run(command, capture_output=True, text=True, check=False)
  assert sound.returncode == 0
  assert "is sound: 8 train records" in sound.stderr
  content = bytearray((built / SHARD).read_bytes())
  content[60] ^= 1
  (built / SHARD).write_bytes(content)
  damaged = subprocess.run(command, capture_output=True, text=True, check=False)
  assert damaged.returncode == 4
  assert f"{SHARD}, record 0 at byte 0: CRC mismatch" in damaged.stderr
  assert damaged.stderr.splitlines()[-1].startswith(f"error: {built} has 2 problems")
