"""facedist.storage on a disk and against a server of the bucket's interface."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import threading

import google_crc32c
import pytest

from facedist import errors, storage
from facedist.storage import gcs
from tests import buckets

CONTENT = bytes(range(256)) * 300


@pytest.fixture(params=["local", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
  """A folder that does not exist yet, on the disk and in a bucket."""
  if request.param == "local":
    return str(tmp_path / "shards")
  return request.getfixturevalue("bucket") + "/shards"


def test_what_is_written_last_is_read_back(folder: str):
  path = storage.join(folder, "nested", "a.bin")
  for content in (CONTENT, b"short", b""):
    storage.write_bytes(path, content)
    assert storage.read_bytes(path) == content
    assert storage.size(path) == len(content)
    assert storage.exists(path)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_listing_has_the_files_and_folders_of_one_level(folder: str, ending: str):
  for name in ("b.bin", "a.bin", "inner/c.bin", "inner/d.bin"):
    storage.write_bytes(storage.join(folder, *name.split("/")), b"x")
  assert storage.list_names(folder + ending) == ["a.bin", "b.bin", "inner"]


def test_the_console_s_placeholder_of_a_folder_is_not_listed(bucket: str):
  storage.write_bytes(f"{bucket}/shards/", b"")
  storage.write_bytes(f"{bucket}/shards/a.bin", b"x")
  assert storage.list_names(f"{bucket}/shards") == ["a.bin"]


def test_what_is_missing_is_empty_or_a_data_error_that_names_it(folder: str, tmp_path):
  assert storage.list_names(folder) == []
  assert list(storage.walk(folder)) == []
  path = storage.join(folder, "none.bin")
  assert not storage.exists(path)
  for use in (
    storage.read_bytes,
    storage.size,
    storage.generation,
    storage.stored_crc32c if storage.is_bucket(folder) else storage.crc32c,
    lambda path: storage.download(path, str(tmp_path / "here.bin")),
  ):
    with pytest.raises(errors.DataError, match=r"none\.bin does not exist"):
      use(path)
  assert not list(tmp_path.glob("here.bin*"))


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


def test_a_range_has_exactly_the_bytes_asked_for(folder: str):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, CONTENT)
  assert storage.read_range(path, 0, 3) == b"\x00\x01\x02"
  assert storage.read_range(path, 255, 2) == b"\xff\x00"
  assert storage.read_range(path, len(CONTENT) - 1, 1) == b"\xff"
  assert storage.read_range(path, 5, 0) == b""


@pytest.mark.parametrize("start", [76_790, 76_800, 90_000])
def test_a_range_past_the_end_names_the_true_size(folder: str, start: int):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, CONTENT)
  message = rf"a\.bin has 76800 bytes, but bytes {start} to {start + 20} were req"
  with pytest.raises(errors.DataError, match=message):
    storage.read_range(path, start, 20)


def test_a_range_of_a_replaced_file_is_refused(folder: str):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, b"first")
  first = storage.generation(path)
  assert storage.read_range(path, 1, 2, generation=first) == b"ir"
  storage.write_bytes(path, b"other")
  assert storage.generation(path) != first
  with pytest.raises(errors.DataError, match=r"a\.bin was replaced"):
    storage.read_range(path, 1, 2, generation=first)


def test_the_first_writer_wins_where_the_file_must_be_absent(folder: str, tmp_path):
  path, local = storage.join(folder, "a.bin"), tmp_path / "local"
  local.write_bytes(b"third")
  assert storage.write_bytes(path, b"first", if_absent=True)
  assert not storage.write_bytes(path, b"second", if_absent=True)
  assert not storage.upload(str(local), path, if_absent=True)
  with (
    pytest.raises(FileExistsError, match=r"a\.bin"),
    storage.new_file(path, if_absent=True) as name,
  ):
    pathlib.Path(name).write_bytes(b"fourth")
  assert storage.read_bytes(path) == b"first"
  assert storage.list_names(folder) == ["a.bin"]
  assert storage.write_bytes(path, b"second")


def test_a_walk_finds_every_file_in_the_byte_order_of_paths(folder: str):
  # "." < "/" < "0" < "B" < "a" < "é" as bytes; a folder sorts as if it ended in "/".
  in_order = ["B", "a.b", "a/c", "a/d.x", "a/d/e", "a0", "aé"]
  for name in reversed(in_order):
    storage.write_bytes(storage.join(folder, *name.split("/")), b"x" * len(name))
  found = list(storage.walk(folder))
  assert found == [(name, len(name)) for name in in_order]


def test_a_walk_follows_links_but_not_in_circles_or_nowhere(tmp_path):
  storage.write_bytes(f"{tmp_path}/a/1.jpg", b"x")
  (tmp_path / "b").symlink_to(tmp_path / "a")
  assert list(storage.walk(str(tmp_path))) == [("a/1.jpg", 1), ("b/1.jpg", 1)]
  (tmp_path / "a" / "up").symlink_to(tmp_path)
  with pytest.raises(errors.DataError, match="a/up/ links to a folder that holds it"):
    list(storage.walk(str(tmp_path)))
  (tmp_path / "a" / "lost.jpg").symlink_to(tmp_path / "none")
  with pytest.raises(errors.DataError, match=r"lost\.jpg is a link that leads nowhere"):
    list(storage.walk(str(tmp_path)))


def test_listings_go_over_many_pages(bucket: buckets.Bucket):
  bucket.server.max_per_page = 3
  for number in range(10):
    storage.write_bytes(f"{bucket}/in/{number}/a", b"xy")
  assert storage.list_names(f"{bucket}/in") == [str(number) for number in range(10)]
  bucket.traffic.clear()
  walk = storage.walk(f"{bucket}/in")
  assert next(walk) == ("0/a", 2)
  assert bucket.traffic.requests() == 1  # the other pages are not asked for yet
  assert [path for path, _ in walk] == [f"{number}/a" for number in range(1, 10)]
  assert bucket.traffic.requests() == 4


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_lines_are_read_without_their_ends(folder: str, ending: str, monkeypatch):
  monkeypatch.setattr(
    "facedist.storage.paths._LINES_PIECE_BYTES", 3
  )  # cuts lines and characters
  path = storage.join(folder, "list.txt")
  storage.write_bytes(path, ("n1/a.jpg\r\n\nn2/ä.jpg" + ending).encode())
  assert list(storage.open_lines(path)) == ["n1/a.jpg", "", "n2/ä.jpg"]


def test_a_file_that_is_not_text_is_refused_by_line(folder: str):
  path = storage.join(folder, "list.txt")
  storage.write_bytes(path, b"good\nb\xffd\n")
  with pytest.raises(errors.DataError, match=r"list\.txt, line 2 is not UTF-8"):
    list(storage.open_lines(path))
  storage.write_bytes(path, b"a\n" + bytes(2 << 20))
  with pytest.raises(errors.DataError, match="line 2 is longer than 1 MiB"):
    list(storage.open_lines(path))


def test_a_local_copy_has_content_and_ending_and_is_removed(folder: str):
  path = storage.join(folder, "a.tar")
  storage.write_bytes(path, CONTENT)
  with storage.local_copy(path) as local:
    assert pathlib.Path(local).read_bytes() == CONTENT
    assert local.endswith("a.tar")
    assert (local == path) != storage.is_bucket(path)
  assert os.path.exists(local) != storage.is_bucket(path)


def test_crc32c_is_the_castagnoli_checksum_of_bytes_files_and_objects(bucket, tmp_path):
  # The check value of CRC-32C in the catalogue of CRC algorithms.
  assert storage.crc32c_of(b"123456789") == 0xE3069283
  (tmp_path / "a").write_bytes(CONTENT)
  assert storage.crc32c(str(tmp_path / "a")) == google_crc32c.value(CONTENT)
  storage.write_bytes(f"{bucket}/a", CONTENT)
  assert storage.stored_crc32c(f"{bucket}/a") == google_crc32c.value(CONTENT)


def test_a_new_file_is_there_once_its_body_has_succeeded(folder: str):
  path = storage.join(folder, "a.bin")
  with storage.new_file(path) as name:
    pathlib.Path(name).write_bytes(b"new")
    assert not storage.exists(path)
    assert storage.is_bucket(path) or name.startswith(f"{path}.partial-")
  assert storage.read_bytes(path) == b"new"
  assert storage.list_names(folder) == ["a.bin"]


def test_a_body_that_fails_leaves_nothing_and_keeps_the_old_content(folder: str):
  path = storage.join(folder, "a.bin")
  storage.write_bytes(path, b"old")

  def write_half() -> None:
    with storage.new_file(path) as name:
      pathlib.Path(name).write_bytes(b"ne")
      raise OSError("a reason")

  with pytest.raises(OSError, match="a reason"):
    write_half()
  assert storage.read_bytes(path) == b"old"
  assert storage.list_names(folder) == ["a.bin"]


def test_a_forked_process_makes_its_own_bucket_client(bucket: str):
  storage.write_bytes(f"{bucket}/a.bin", b"x")
  own = gcs.client()
  read_end, write_end = os.pipe()
  if os.fork() == 0:
    os.write(write_end, b"same" if gcs.client() is own else b"own")
    os._exit(0)
  os.close(write_end)
  with os.fdopen(read_end, "rb") as stream:
    assert stream.read() == b"own"
  os.wait()


def test_threads_that_start_at_once_share_one_client(bucket: buckets.Bucket):
  storage.close()
  barrier = threading.Barrier(16)

  def first(_: int) -> int:
    barrier.wait()
    return id(gcs.client())

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert len(set(pool.map(first, range(16)))) == 1


def printed_by(program: str, *arguments: object) -> str:
  """Returns what a process of its own prints, warnings included."""
  command = [
    sys.executable,
    "-c",
    f"import sys; from facedist import storage; {program}",
  ]
  return subprocess.run(
    [*command, *map(str, arguments)],
    check=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ).stdout


def test_local_paths_do_not_import_the_google_libraries(tmp_path):
  program = (
    "a = sys.argv[1]; storage.write_bytes(a, b'x'); storage.download(a, a + '2')"
  )
  modules = "{'google.cloud.storage', 'tensorflow'}"
  program += f"; print({modules} & set(sys.modules))"
  assert printed_by(program, tmp_path / "a") == "set()\n"


def test_a_bucket_path_prints_no_warning(bucket: str):
  assert printed_by(f"print(storage.exists('{bucket}/none'))") == "False\n"


def test_a_file_removed_during_a_walk_is_left_out(tmp_path):
  for name in "abc":
    (tmp_path / name).write_bytes(b"12")
  found = storage.walk(str(tmp_path))
  assert next(found) == ("a", 2)
  (tmp_path / "b").unlink()
  assert list(found) == [("c", 2)]
