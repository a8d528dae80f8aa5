"""facedist.storage on a disk and against a server of the bucket's interface."""

import os
import pathlib
import signal
import subprocess
import sys

import google_crc32c
import pytest

from facedist import errors, storage

CONTENT = bytes(range(256)) * 300


@pytest.fixture(params=["local", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
  """A folder that does not exist yet, on the disk and in a bucket."""
  if request.param == "local":
    return str(tmp_path / "shards")
  return request.getfixturevalue("bucket") + "/shards"


def test_what_is_written_is_read_back(folder: str):
  path = storage.join(folder, "nested", "a.bin")
  storage.write_bytes(path, CONTENT)
  assert storage.read_bytes(path) == CONTENT
  assert storage.exists(path)


def test_an_empty_file_is_a_file(folder: str):
  storage.write_bytes(storage.join(folder, "empty"), b"")
  assert storage.read_bytes(storage.join(folder, "empty")) == b""


def test_writing_again_replaces_the_whole_content(folder: str):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, CONTENT)
  storage.write_bytes(path, b"short")
  assert storage.read_bytes(path) == b"short"


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_listing_has_the_files_and_folders_of_one_level(folder: str, ending: str):
  for name in ("b.bin", "a.bin", "inner/c.bin", "inner/d.bin"):
    storage.write_bytes(storage.join(folder, *name.split("/")), b"x")
  assert storage.list_names(folder + ending) == ["a.bin", "b.bin", "inner"]


def test_a_bucket_itself_can_be_listed(bucket: str):
  storage.write_bytes(f"{bucket}/a.bin", b"x")
  assert storage.list_names(bucket) == ["a.bin"]


def test_the_console_s_placeholder_of_a_folder_is_not_listed(bucket: str):
  storage.write_bytes(f"{bucket}/shards/", b"")
  storage.write_bytes(f"{bucket}/shards/a.bin", b"x")
  assert storage.list_names(f"{bucket}/shards") == ["a.bin"]


def test_a_folder_that_is_not_there_lists_nothing(folder: str):
  assert storage.list_names(folder) == []


def test_a_missing_file_is_a_data_error_that_names_it(folder: str, tmp_path):
  path = storage.join(folder, "none.bin")
  assert not storage.exists(path)
  with pytest.raises(errors.DataError, match=r"none\.bin does not exist"):
    storage.read_bytes(path)
  with pytest.raises(errors.DataError, match=r"none\.bin does not exist"):
    storage.download(path, str(tmp_path / "here.bin"))
  assert not list(tmp_path.glob("here.bin*"))


@pytest.mark.parametrize(
  "use",
  [
    lambda path, local: storage.read_bytes(path),
    lambda path, local: storage.write_bytes(path, b"x"),
    lambda path, local: storage.upload(local, path),
    lambda path, local: storage.download(path, local),
    lambda path, local: storage.list_names(path),
  ],
)
def test_a_missing_bucket_is_a_data_error(bucket: str, use, tmp_path):
  (tmp_path / "local").write_bytes(b"x")
  with pytest.raises(errors.DataError, match="gs://other/a does not exist"):
    use("gs://other/a", str(tmp_path / "local"))


def test_a_bucket_path_without_a_bucket_is_a_usage_error():
  with pytest.raises(errors.UsageError, match="names no bucket"):
    storage.read_bytes("gs:///a.bin")


def test_removing_twice_is_no_error(folder: str):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, b"x")
  storage.remove(path)
  assert not storage.exists(path)
  storage.remove(path)


def test_upload_and_download_keep_every_byte(folder: str, tmp_path):
  source, target = tmp_path / "source.bin", tmp_path / "new" / "target.bin"
  source.write_bytes(CONTENT)
  path = storage.join(folder, "a.bin")
  storage.upload(str(source), path)
  storage.download(path, str(target))
  assert target.read_bytes() == CONTENT
  assert [path.name for path in target.parent.iterdir()] == ["target.bin"]


def test_join_uses_forward_slashes_in_a_bucket():
  assert storage.join("gs://faces/a", "b", "c.bin") == "gs://faces/a/b/c.bin"
  assert storage.join("a", "b") == os.path.join("a", "b")


def test_crc32c_is_the_castagnoli_checksum(tmp_path):
  # The check value of CRC-32C in the catalogue of CRC algorithms.
  assert storage.crc32c_of(b"123456789") == 0xE3069283
  (tmp_path / "a").write_bytes(CONTENT)
  assert storage.crc32c(str(tmp_path / "a")) == google_crc32c.value(CONTENT)


def test_crc32c_of_a_missing_file_is_a_data_error(tmp_path):
  with pytest.raises(errors.DataError, match="does not exist"):
    storage.crc32c(str(tmp_path / "none"))


def test_a_body_that_fails_leaves_nothing_and_keeps_the_old_content(tmp_path):
  path = tmp_path / "a.bin"
  path.write_bytes(b"old")

  def write_half() -> None:
    with storage.partial_file(str(path)) as partial:
      pathlib.Path(partial).write_bytes(b"ne")
      raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    write_half()
  assert path.read_bytes() == b"old"
  assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_killed_process_leaves_only_a_partial_name(tmp_path):
  program = (
    "import sys, os, signal, pathlib\n"
    "from facedist import storage\n"
    "with storage.partial_file(sys.argv[1]) as partial:\n"
    "  pathlib.Path(partial).write_bytes(b'half')\n"
    "  os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  path = tmp_path / "a.bin"
  killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
  assert killed.returncode == -signal.SIGKILL
  (left,) = tmp_path.iterdir()
  assert left.name.startswith("a.bin.partial-")
  storage.write_bytes(str(path), b"whole")
  assert path.read_bytes() == b"whole"


def test_a_forked_process_makes_its_own_bucket_client(bucket: str):
  storage.write_bytes(f"{bucket}/a.bin", b"x")
  own = storage._client()
  read_end, write_end = os.pipe()
  if os.fork() == 0:
    os.write(write_end, b"same" if storage._client() is own else b"own")
    os._exit(0)
  os.close(write_end)
  with os.fdopen(read_end, "rb") as stream:
    assert stream.read() == b"own"
  os.wait()


def test_local_paths_do_not_import_the_google_libraries(tmp_path):
  program = (
    "import sys\n"
    "from facedist import storage\n"
    "storage.write_bytes(sys.argv[1], b'x')\n"
    "storage.download(sys.argv[1], sys.argv[1] + '2')\n"
    "print('google.cloud.storage' in sys.modules, 'tensorflow' in sys.modules)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "a")],
    check=True,
    capture_output=True,
    text=True,
  )
  assert run.stdout.split() == ["False", "False"]


def test_a_bucket_path_prints_no_warning(bucket: str):
  program = "from facedist import storage; print(storage.exists('gs://faces/none'))"
  run = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  )
  assert (run.stdout, run.stderr) == ("False\n", "")
