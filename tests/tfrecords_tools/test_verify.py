import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index, tfrecord
from tests import files
from tests.tfrecords_tools.folders import problems_of, upload
from tfrecords_tools import verify
from tfrecords_tools.validation import scan

SHARD = "train-00001-of-00002.tfrecord"
INDEX = "train-00001-of-00002.index.npy"
FIX = "rebuild this shard with --only_shards=1"


@pytest.fixture
def built(vggface2_dir, build_set):
  """A folder of two valid shards."""
  return pathlib.Path(build_set(vggface2_dir))


def rows_of(folder):
  return shard_index.load(str(folder / INDEX))


def change_entry(folder, **changes):
  """Lets the manifest say something else of the shard."""
  made = manifest.load(str(folder))
  first, last = made.splits["train"].shards
  shards = (first, dataclasses.replace(last, **changes))
  splits = {"train": manifest.Split(made.splits["train"].records, shards)}
  manifest.save(dataclasses.replace(made, splits=splits), str(folder))


def test_every_bad_record_is_named_by_shard_number_and_byte(built):
  rows = rows_of(built)
  for number in (1, 3):
    files.flip_byte(built / SHARD, int(rows[number]["offset"]) + 50)
  assert problems_of(built) == [
    f"{SHARD}, record 1 at byte {rows[1]['offset']}: CRC mismatch; {FIX}",
    f"{SHARD}, record 3 at byte {rows[3]['offset']}: CRC mismatch; {FIX}",
    f"{SHARD} is not the manifest's: CRC mismatch; {FIX}",
  ]


@pytest.mark.slow
def test_many_processes_find_what_one_finds(built):
  files.flip_byte(built / SHARD, 60)
  found = verify.verify(str(built), verify.Totals(), num_processes=2)
  assert [str(problem) for problem in found] == problems_of(built)


def test_a_corrupt_length_does_not_hide_the_records_after_it(built):
  files.flip_byte(built / SHARD, 0)
  files.flip_byte(built / SHARD, -1)
  first, last, _ = problems_of(built)
  assert f"{SHARD}, record 0 at byte 0: CRC mismatch in the record's length" in first
  offset = rows_of(built)[3]["offset"]
  assert f"{SHARD}, record 3 at byte {offset}: CRC mismatch;" in last


def test_a_shard_that_is_cut_off_is_named(built):
  size = (built / SHARD).stat().st_size
  os.truncate(built / SHARD, size - 10)
  record, shard = problems_of(built)
  assert f"{SHARD}, record 3" in record
  assert f"has {size - 10} bytes, the manifest says {size}" in shard


def test_a_missing_index_is_named(built):
  (built / INDEX).unlink()
  (problem,) = problems_of(built)
  assert INDEX in problem


def test_without_an_index_the_records_are_found_by_walking(built):
  offset = int(rows_of(built)[2]["offset"])
  files.flip_byte(built / SHARD, offset + 50)
  (built / INDEX).write_bytes(b"no index")
  record, *rest = problems_of(built)
  assert record.startswith(f"{SHARD}, record 2 at byte {offset}: CRC")
  assert any("is not a shard index" in problem for problem in rest)


@pytest.mark.parametrize(
  ("column", "reason", "reason_if_confirmed"),
  [
    ("offset", "leave gaps in the shard", "leave gaps in the shard"),
    ("length", "leave gaps in the shard", "leave gaps in the shard"),
    ("image_offset", "CRC mismatch", "does not point at the record's image"),
    ("label", "CRC mismatch", "in the index"),
  ],
)
def test_an_index_that_does_not_fit_is_named_even_if_the_manifest_confirms_it(
  built, column, reason, reason_if_confirmed
):
  rows = rows_of(built)
  rows[column][1] += 1
  content = shard_index.to_bytes(rows)
  (built / INDEX).write_bytes(content)
  (problem,) = problems_of(built)
  assert INDEX in problem
  assert reason in problem
  change_entry(built, index_crc32c=storage.crc32c_of(content))
  (problem,) = problems_of(built)
  assert reason_if_confirmed in problem
  assert "gaps" in reason or f"record 1 at byte {rows[1]['offset']}" in problem


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda _: {"label": 9}, "label 9 is not below the 3 identities"),
    (lambda _: {"identity": "n000000"}, "identity n000000 has label"),
    (lambda record: {"jpeg": bytes(len(record.jpeg))}, "not a JPEG"),
  ],
)
def test_a_record_of_wrong_content_is_named(built, change, reason):
  start, length = (int(rows_of(built)[2][name]) for name in ("offset", "length"))
  content = bytearray((built / SHARD).read_bytes())
  record = tfrecord.parse(tfrecord.unframe(bytes(content[start : start + length])))
  changed = dataclasses.replace(record, **change(record))
  content[start : start + length] = tfrecord.frame(tfrecord.serialize(changed))
  (built / SHARD).write_bytes(content)
  change_entry(built, crc32c=storage.crc32c_of(bytes(content)))
  (problem,) = problems_of(built)
  assert problem.startswith(f"{SHARD}, record 2 at byte")
  assert reason in problem


def test_an_image_of_another_size_is_named(built):
  made = manifest.load(str(built))
  manifest.save(dataclasses.replace(made, image_size=96), str(built))
  found = problems_of(built)
  assert len(found) == 8
  text = "112x112 pixels, but the manifest says 96x96"
  assert all(text in problem for problem in found)


@pytest.fixture
def verification_set(lfw_dir, build_set):
  return pathlib.Path(build_set(lfw_dir, dataset="lfw"))


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
  path = verification_set / "pairs.npy"
  assert problems_of(verification_set) == []
  pairs = np.array([[2, 3, 1, 0], [4, 5, 0, 0], [0, 1, 1, 1], [1, 2, 0, 1]], np.int32)
  pairs[place] = value
  np.save(path, pairs)
  made = manifest.load(str(verification_set))
  crc32c = storage.crc32c_of(path.read_bytes())
  entry = dataclasses.replace(made.pairs, crc32c=crc32c)
  manifest.save(dataclasses.replace(made, pairs=entry), str(verification_set))
  (problem,) = problems_of(verification_set)
  assert reason in problem


def test_pairs_of_another_set_are_named(verification_set):
  np.save(verification_set / "pairs.npy", np.zeros((4, 4), np.int32))
  (problem,) = problems_of(verification_set)
  assert "pairs.npy is not the manifest's" in problem
  os.remove(verification_set / "pairs.npy")
  (problem,) = problems_of(verification_set)
  assert "pairs.npy is missing" in problem


def report_of(folder, report):
  """Runs the command in this process; returns its report, and its error if any."""
  error = None
  try:
    verify.main(verify.VerifyConfig(str(folder), str(report), num_processes=1))
  except errors.DataError as raised:
    error = str(raised)
  return json.loads(storage.read_bytes(str(report))), error


def test_the_report_of_valid_shards_counts_what_was_read(built, tmp_path):
  report, error = report_of(built, tmp_path / "report.json")
  assert error is None
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
  offset = int(rows_of(built)[2]["offset"])
  files.flip_byte(built / SHARD, offset + 50)
  report, error = report_of(built, tmp_path / "report.json")
  assert "has 2 problems, each named above" in error
  assert (report["num_problems"], report["sound"]) == (2, False)
  of_record = {"kind": "record", "reason": "CRC mismatch", "record": 2, "byte": offset}
  reason = f"{SHARD} is not the manifest's: CRC mismatch"
  of_shard = {"kind": "shard", "reason": reason, "record": None, "byte": None}
  both = {"fix": FIX, "file": SHARD, "shard": 1}
  assert report["problems"] == [of_record | both, of_shard | both]


def test_the_report_of_a_folder_without_a_manifest_says_so(tmp_path):
  report, error = report_of(tmp_path, tmp_path / "report.json")
  assert "has 1 problem, named above" in error
  (problem,) = report["problems"]
  assert problem["kind"] == "manifest"
  assert "manifest.json does not exist" in problem["reason"]
  assert problem["fix"].startswith("build the shards with")
  assert (report["fingerprint"], report["records"]) == (None, 0)


def test_shards_in_a_bucket_are_checked_like_those_on_a_disk(built, bucket):
  folder = upload(built, f"{bucket}/shards")
  assert problems_of(folder) == []
  files.flip_byte(f"{folder}/{SHARD}", int(rows_of(built)[3]["offset"]) + 50)
  storage.remove(f"{folder}/{INDEX.replace('00001-of', '00000-of')}")
  report, _ = report_of(folder, f"{bucket}/report.json")
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
  offset = int(rows_of(built)[3]["offset"])
  files.flip_byte(built / SHARD, offset + 50)
  record, shard = problems_of(built)
  assert f"record 3 at byte {offset}: CRC mismatch" in record
  assert "is not the manifest's: CRC mismatch" in shard
