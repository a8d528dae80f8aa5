import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files
from tfrecords_tools import build, verify
from tfrecords_tools.validation import checks, scan

SHARD = "train-00001-of-00002.tfrecord"
INDEX = "train-00001-of-00002.index.npy"


@pytest.fixture
def built(vggface2_dir, build_config):
  """A folder of two valid shards."""
  config = build_config(vggface2_dir)
  build.main(config)
  return pathlib.Path(config.output_dir)


def problems_of(folder):
  found = verify.verify(str(folder), verify.Totals(), num_processes=1)
  return [str(problem) for problem in found]


def rows_of(folder):
  return shard_index.load(str(folder / INDEX))


def change_record(folder, number, change):
  """Writes a record anew, of the same length, with valid CRCs and manifest."""
  row = rows_of(folder)[number]
  start, length = int(row["offset"]), int(row["length"])
  content = bytearray((folder / SHARD).read_bytes())
  record = tfrecord.parse(tfrecord.unframe(bytes(content[start : start + length])))
  framed = tfrecord.frame(tfrecord.serialize(change(record)))
  assert len(framed) == length
  content[start : start + length] = framed
  (folder / SHARD).write_bytes(content)
  made = manifest.load(str(folder))
  shards = list(made.splits["train"].shards)
  checksum = tfrecord.google_crc32c.value(bytes(content))
  shards[1] = dataclasses.replace(shards[1], crc32c=checksum)
  split = dataclasses.replace(made.splits["train"], shards=tuple(shards))
  manifest.save(dataclasses.replace(made, splits={"train": split}), str(folder))


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


def test_a_corrupt_length_does_not_hide_the_records_after_it(built):
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
  files.flip_byte(built / SHARD, int(rows[2]["offset"]) + 50)
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
  made = manifest.load(str(built))
  task = checks.VerifyTask(
    path=str(built / SHARD),
    shard=made.splits["train"].shards[1],
    number=1,
    files=checks.ShardFiles(rows, True, (built / SHARD).stat().st_size, []),
    is_relabelled=False,
    names=None,
    identities=dict(enumerate(made.identities)),
    num_identities=3,
    image_size=112,
  )
  (problem,) = map(str, checks.check_shard(task).problems)
  assert f"record 1 at byte {rows[1]['offset']}" in problem
  assert reason in problem


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda _: {"label": 9}, "label 9 is not below the 3 identities"),
    (lambda _: {"identity": "n000000"}, "identity n000000 has label"),
    (lambda record: {"jpeg": bytes(len(record.jpeg))}, "not a JPEG"),
  ],
)
def test_a_record_of_wrong_content_is_named(built, change, reason):
  change_record(built, 2, lambda one: dataclasses.replace(one, **change(one)))
  (problem,) = problems_of(built)
  assert problem.startswith(f"{SHARD}, record 2 at byte")
  assert reason in problem


def test_an_image_of_another_size_is_named(built):
  made = manifest.load(str(built))
  manifest.save(dataclasses.replace(made, image_size=96), str(built))
  found = problems_of(built)
  assert len(found) == 8
  assert all(
    "112x112 pixels, but the manifest says 96x96" in problem for problem in found
  )


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
  entry = dataclasses.replace(made.pairs, crc32c=tfrecord.google_crc32c.value(content))
  manifest.save(dataclasses.replace(made, pairs=entry), str(folder))


VALID = [[2, 3, 1, 0], [4, 5, 0, 0], [0, 1, 1, 1], [1, 2, 0, 1]]


@pytest.mark.parametrize(
  ("place", "value", "reason"),
  [
    ((1, 1), 6, "names a record outside [0, 6)"),
    ((1, 0), -1, "names a record outside [0, 6)"),
    ((0, 3), 2, "lies in a fold outside [0, 2)"),
    ((0, 2), 0, "1 pairs whose 'same' contradicts the labels, such as pair 0"),
  ],
)
def test_pairs_that_cannot_be_are_named(verification_set, place, value, reason):
  pairs = np.array(VALID)
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


def report_of(folder, report):
  """Runs the command in this process; returns its report and whether it failed."""
  settings = verify.VerifyConfig(
    data_dir=str(folder), report=str(report), num_processes=1
  )
  try:
    verify.main(settings)
  except errors.DataError:
    return json.loads(storage.read_bytes(str(report))), True
  return json.loads(storage.read_bytes(str(report))), False


def test_the_report_of_valid_shards_counts_what_was_read(built, tmp_path):
  report, failed = report_of(built, tmp_path / "report.json")
  assert not failed
  assert report.pop("seconds") >= 0
  assert report == {
    "format": "facedist-verify-report",
    "format_version": 1,
    "data_dir": str(built),
    "problems": [],
    "num_problems": 0,
    "sound": True,
    "fingerprint": manifest.load(str(built)).fingerprint,
    "splits": {"train": 8},
    "records": 8,
    "bytes": sum(path.stat().st_size for path in built.glob("*.tfrecord")),
  }


def test_the_report_names_each_bad_record_in_fields(built, tmp_path):
  row = rows_of(built)[2]
  files.flip_byte(str(built / SHARD), int(row["offset"]) + 50)
  report, failed = report_of(built, tmp_path / "report.json")
  assert failed
  assert (report["num_problems"], report["sound"]) == (2, False)
  fix = "rebuild this shard with --only_shards=1"
  assert report["problems"] == [
    {
      "kind": "record",
      "reason": "CRC mismatch",
      "fix": fix,
      "file": SHARD,
      "shard": 1,
      "record": 2,
      "byte": int(row["offset"]),
    },
    {
      "kind": "shard",
      "reason": f"{SHARD} is not the manifest's: CRC mismatch",
      "fix": fix,
      "file": SHARD,
      "shard": 1,
      "record": None,
      "byte": None,
    },
  ]


def test_the_report_of_a_folder_without_a_manifest_says_so(tmp_path):
  report, failed = report_of(tmp_path, tmp_path / "report.json")
  assert failed
  (problem,) = report["problems"]
  assert problem["kind"] == "manifest"
  assert "manifest.json does not exist" in problem["reason"]
  assert problem["fix"].startswith("build the shards with")
  assert report["fingerprint"] is None
  assert report["records"] == 0


def test_shards_in_a_bucket_are_checked_like_those_on_a_disk(built, bucket):
  folder = f"{bucket}/shards"
  for path in built.iterdir():
    if path.is_file():
      storage.upload(str(path), f"{folder}/{path.name}")
  assert problems_of(folder) == []
  files.flip_byte(f"{folder}/{SHARD}", int(rows_of(built)[3]["offset"]) + 50)
  storage.remove(f"{folder}/{INDEX.replace('00001-of', '00000-of')}")
  report, failed = report_of(folder, f"{bucket}/report.json")
  assert failed
  found = [(one["kind"], one["shard"], one["record"]) for one in report["problems"]]
  assert found == [("index", 0, None), ("record", 1, 3), ("shard", 1, None)]
  assert report["records"] == 8


def test_a_shard_of_zeros_is_one_problem_not_one_for_each_sixteen_bytes(built):
  (built / SHARD).write_bytes(bytes((built / SHARD).stat().st_size))
  (built / INDEX).unlink()
  record, index, shard, count = problems_of(built)
  assert f"{SHARD}, record 0 at byte 0: CRC mismatch in the record's length" in record
  assert INDEX in index
  assert "CRC mismatch" in shard
  assert "1 records were found without the index, the manifest says 4" in count


def test_shards_in_many_parts_are_checked_as_in_one(built, monkeypatch):
  monkeypatch.setattr(scan, "RECORDS_A_PART", 1)
  assert problems_of(built) == []
  row = rows_of(built)[3]
  files.flip_byte(str(built / SHARD), int(row["offset"]) + 50)
  record, shard = problems_of(built)
  assert f"record 3 at byte {row['offset']}: CRC mismatch" in record
  assert "is not the manifest's: CRC mismatch" in shard


@pytest.mark.slow
def test_the_command_uses_many_processes_and_ends_with_the_errors_code(built):
  command = [sys.executable, "-m", "tfrecords_tools.verify", str(built)]
  command.append("--num_processes=2")
  valid = subprocess.run(command, capture_output=True, text=True, check=False)
  assert valid.returncode == 0
  assert "is valid: 8 train records" in valid.stderr
  files.flip_byte(built / SHARD, 60)
  broken = subprocess.run(command, capture_output=True, text=True, check=False)
  assert broken.returncode == 4
  assert f"{SHARD}, record 0 at byte 0: CRC mismatch" in broken.stderr
  assert broken.stderr.splitlines()[-1].startswith(f"error: {built} has 2 problems")
