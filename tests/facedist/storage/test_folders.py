"""storage.new_folder on a disk and in a bucket: whole or not at all."""

import errno
import os
import pathlib

import pytest

from facedist import errors, storage
from tests import buckets

FILES = {"a/z.txt": b"1", "last": b"2", "z": b"3"}


def _fill(folder: str) -> None:
  for name, content in FILES.items():
    storage.write_bytes(os.path.join(folder, name), content)


def _content(folder: str) -> dict[str, bytes]:
  return {
    entry.path: storage.read_bytes(storage.join(folder, entry.path))
    for entry in storage.walk(folder)
  }


def _make(path: str) -> None:
  with storage.new_folder(path, last="last") as folder:
    _fill(folder)


@pytest.mark.parametrize("name", ["new", "new/", "below/new"])
def test_a_folder_appears_with_all_that_was_written(tmp_path: pathlib.Path, name: str):
  with storage.new_folder(f"{tmp_path}/{name}", last="last") as folder:
    _fill(folder)
    assert not (tmp_path / name).exists()
  assert _content(f"{tmp_path}/{name}") == FILES
  assert len(list((tmp_path / name).parent.iterdir())) == 1


def test_an_empty_folder_is_replaced_even_through_a_link(tmp_path: pathlib.Path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "empty")
  _make(f"{tmp_path}/link")
  assert _content(f"{tmp_path}/empty") == FILES


def test_an_existing_folder_stays(tmp_path: pathlib.Path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "mine").write_bytes(b"0")
  (tmp_path / "file").write_bytes(b"0")
  for name in ("folder", "file"):
    with pytest.raises(FileExistsError):
      _make(f"{tmp_path}/{name}")
  assert _content(str(tmp_path)) == {"folder/mine": b"0", "file": b"0"}


def test_a_body_that_fails_leaves_nothing(tmp_path: pathlib.Path):
  def fill_and_fail(number: int) -> None:
    with storage.new_folder(f"{tmp_path}/new", last="last") as folder:
      _fill(folder)
      raise OSError(number, os.strerror(number))

  with pytest.raises(PermissionError):
    fill_and_fail(errno.EACCES)
  with pytest.raises(errors.DataError, match="No space left on device; free space"):
    fill_and_fail(errno.ENOSPC)
  assert list(tmp_path.iterdir()) == []


def test_a_bucket_has_the_last_file_when_it_has_all(bucket: buckets.Bucket):
  bucket.faults.rate(0.2, seed=1, delay_seconds=0.01)
  _make(f"{bucket}/a/new/")
  bucket.faults.clear()
  assert _content(f"{bucket}/a/new") == FILES
  sent = [one for one in bucket.traffic.exchanges if one.method == "POST"]
  *done, last = [one.path for one in sent if one.status == 200]
  assert last == f"{bucket}/a/new/last"
  assert set(done) >= {f"{bucket}/a/new/z", f"{bucket}/a/new/a/z.txt"}


def test_of_two_writers_to_a_bucket_one_makes_the_folder(bucket: buckets.Bucket):
  def be_late() -> None:
    with storage.new_folder(f"{bucket}/new", last="last") as folder:
      storage.write_bytes(os.path.join(folder, "a/z.txt"), b"late")
      storage.write_bytes(os.path.join(folder, "last"), b"late")
      _make(f"{bucket}/new")

  with pytest.raises(FileExistsError):
    be_late()
  assert _content(f"{bucket}/new") == FILES


def test_the_files_of_a_failed_upload_are_removed(bucket: buckets.Bucket):
  bucket.faults.always(status=403, matching=f"{bucket}/new/last", method="POST")
  with pytest.raises(errors.AccessError):
    _make(f"{bucket}/new")
  assert _content(f"{bucket}/new") == {}
