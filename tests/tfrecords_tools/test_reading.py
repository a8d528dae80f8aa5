import numpy as np
import pytest

from facedist import errors, storage
from tfrecords_tools.sources import base


def rows_of(*places):
  """Rows of (origin, start, length)."""
  rows = np.zeros(len(places), base.ROW_DTYPE)
  for row, place in zip(rows, places, strict=True):
    row["origin"], row["start"], row["length"] = place
  return rows


def test_an_image_lies_in_a_file_of_its_own_or_in_an_archive():
  rows = rows_of((1, 0, base.WHOLE), (0, 512, 9))
  files = base.files_of(rows, ["n1/1.jpg", "n1/2.jpg"], origins=["/a.tar", "/b"])
  assert files == ["/b/n1/1.jpg", "/a.tar"]


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_whole_files_and_parts_are_read_and_what_is_not_there_is_a_reason(
  tmp_path, bucket, where
):
  folder = str(tmp_path) if where == "disk" else bucket
  storage.write_bytes(f"{folder}/a.tar", bytes(range(100)))
  storage.write_bytes(f"{folder}/1.jpg", b"whole")
  files = [f"{folder}/{name}" for name in ("a.tar", "1.jpg", "2.jpg")]
  whole = (0, 0, base.WHOLE)
  part, image, missing = base.read_all(files, rows_of((0, 90, 3), whole, whole))
  assert (part, image) == (bytes([90, 91, 92]), b"whole")
  assert isinstance(missing, errors.DataError)
  assert str(missing) == "No such file or directory"


def test_a_part_past_an_archives_end_is_cut_off(tmp_path):
  (tmp_path / "a.tar").write_bytes(bytes(100))
  (found,) = base.read_all([str(tmp_path / "a.tar")], rows_of((0, 90, 11)))
  assert str(found) == "it is cut off"


def test_many_images_of_a_bucket_are_asked_for_at_once(bucket):
  files = [f"{bucket}/{number}.jpg" for number in range(base.THREADS)]
  for file in files:
    storage.write_bytes(file, file.encode())
  bucket.traffic.clear()
  bucket.faults.always("meet", method="GET", together=base.THREADS)
  rows = rows_of(*[(0, 0, base.WHOLE)] * len(files))
  assert base.read_all(files, rows) == [file.encode() for file in files]
  assert bucket.traffic.max_at_once == base.THREADS
