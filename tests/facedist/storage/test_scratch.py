"""Temporary folders that are full, missing or files end in one line."""

import pathlib
import tempfile

import pytest

from facedist import errors, storage


def test_a_missing_folder_is_created(tmp_path):
  with storage.scratch(str(tmp_path / "a" / "b")) as folder:
    assert pathlib.Path(folder).is_dir()


def test_a_full_disk_is_named_by_the_flag_or_the_variable(small_disk, monkeypatch):
  def fill(scratch_dir: str | None) -> None:
    with storage.scratch(scratch_dir) as folder:
      (pathlib.Path(folder) / "x").write_bytes(bytes(200_000))

  with pytest.raises(errors.DataError, match=f"of --scratch_dir={small_disk} is full"):
    fill(str(small_disk))
  monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
  with pytest.raises(errors.DataError, match=f"of TMPDIR={small_disk} is full; free"):
    fill(None)


def test_a_file_in_the_place_of_the_folder_is_a_usage_error(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with (
    pytest.raises(errors.UsageError, match=r"--scratch_dir=.*/file cannot be written"),
    storage.scratch(str(tmp_path / "file")),
  ):
    pass


def test_other_errors_of_the_body_pass(tmp_path):
  with pytest.raises(FileNotFoundError), storage.scratch(str(tmp_path / "here")):
    (tmp_path / "elsewhere").read_bytes()
