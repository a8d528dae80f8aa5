"""facedist.storage while requests fail: the same results, or one line in time."""

import concurrent.futures
import errno
import os
import pathlib
import random
import resource
import socket
import time

import pytest

from facedist import errors, storage
from tests import buckets

CONTENT = random.Random(0).randbytes(9_000_000)  # the library sends it in pieces


@pytest.fixture
def large(tmp_path: pathlib.Path) -> pathlib.Path:
  """A local file with CONTENT."""
  path = tmp_path / "large.bin"
  path.write_bytes(CONTENT)
  return path


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_pieces")
def test_every_operation_gives_the_same_through_faults(
  bucket: buckets.Bucket, large: pathlib.Path, tmp_path: pathlib.Path, seed: int
):
  bucket.server.max_per_page = 4
  bucket.faults.rate(0.3, seed=seed, delay_seconds=0.05)
  for number in range(10):
    assert storage.write_bytes(f"{bucket}/small/{number}", b"%d" % number)
    assert storage.write_bytes(f"{bucket}/once/{number}", b"1", if_absent=True)
    assert not storage.write_bytes(f"{bucket}/once/{number}", b"2", if_absent=True)
  assert storage.upload(str(large), f"{bucket}/large")
  assert not storage.upload(str(large), f"{bucket}/large", if_absent=True)
  storage.download(f"{bucket}/large", str(tmp_path / "copy"))
  assert (tmp_path / "copy").read_bytes() == CONTENT
  assert storage.read_bytes(f"{bucket}/large") == CONTENT
  assert storage.size(f"{bucket}/large") == len(CONTENT)
  generation = storage.generation(f"{bucket}/large")
  assert generation == storage.generation(f"{bucket}/large")
  for start in range(0, 1_000_000, 200_000):
    for pinned in (None, generation):
      found = storage.read_range(f"{bucket}/large", start, 150_000, generation=pinned)
      assert found == CONTENT[start : start + 150_000]
  for number in range(0, 10, 2):
    storage.remove(f"{bucket}/small/{number}")
  assert storage.list_names(f"{bucket}/small") == ["1", "3", "5", "7", "9"]
  names = [f"once/{number}" for number in range(10)]
  names += [f"small/{number}" for number in range(1, 10, 2)]
  assert [path for path, _ in storage.walk(str(bucket))] == ["large", *names]
  assert storage.read_bytes(f"{bucket}/small/3") == b"3"
  assert storage.exists(f"{bucket}/small/3")
  assert not storage.exists(f"{bucket}/small/2")
  assert len(bucket.traffic.faults()) == len(buckets.KINDS)


OPERATIONS = {
  "read": lambda path, local: storage.read_bytes(path),
  "range": lambda path, local: storage.read_range(path, 0, 1),
  "status": lambda path, local: storage.status(path),
  "checksum": lambda path, local: storage.stored_crc32c(path),
  "exists": lambda path, local: storage.exists(path),
  "download": lambda path, local: storage.download(path, local + ".copy"),
  "write": lambda path, local: storage.write_bytes(path, b"x"),
  "write once": lambda path, local: storage.write_bytes(path, b"x", if_absent=True),
  "upload": lambda path, local: storage.upload(local, path),
  "list": lambda path, local: storage.list_names(path),
  "walk": lambda path, local: list(storage.walk(path)),
  "remove": lambda path, local: storage.remove(path),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_permission_is_one_line_after_one_request(
  bucket: buckets.Bucket, large: pathlib.Path, operation: str
):
  bucket.faults.always(status=403, message="me@project lacks\nstorage.objects.get")
  with pytest.raises(errors.AccessError) as caught:
    OPERATIONS[operation](f"{bucket}/a", str(large))
  assert str(caught.value) == (
    "gs://faces/a: permission denied (403 me@project lacks storage.objects.get); give "
    "the account a role on the bucket, roles/storage.objectViewer to read or "
    "roles/storage.objectUser to write."
  )
  assert bucket.traffic.requests() == 1


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_an_access_error(large: pathlib.Path, operation: str):
  with pytest.raises(errors.AccessError, match="there is no bucket gs://other; create"):
    OPERATIONS[operation]("gs://other/a", str(large))


@pytest.mark.parametrize("operation", ["read", "download", "write", "walk", "remove"])
def test_a_bucket_that_never_answers_is_one_line_at_the_deadline(
  bucket: buckets.Bucket, large: pathlib.Path, operation: str, monkeypatch
):
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "0.5")
  bucket.faults.always(status=503, message="try later")
  with pytest.raises(errors.UnreachableError) as caught:
    OPERATIONS[operation](f"{bucket}/a", str(large))
  line = str(caught.value)
  assert line.startswith("gs://faces/a: no success in 0.5 s and ")
  assert "(last: 503 try later); check the network" in line
  assert "\n" not in line
  assert bucket.traffic.requests() > 1
  assert not list(large.parent.glob("*.copy*"))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_transient_status_is_retried(bucket: buckets.Bucket, status: int):
  storage.write_bytes(f"{bucket}/a", b"x")
  bucket.traffic.clear()
  bucket.faults.always(status=status, times=3)
  assert storage.read_bytes(f"{bucket}/a") == b"x"
  assert [one.status for one in bucket.traffic.exchanges] == [status] * 3 + [200]


def test_a_request_whose_answer_stalls_is_retried(bucket: buckets.Bucket, monkeypatch):
  storage.write_bytes(f"{bucket}/a", b"x")
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "4")
  bucket.faults.always("delay", times=1, delay_seconds=20)
  assert storage.read_bytes(f"{bucket}/a") == b"x"


def test_a_bucket_that_only_stalls_is_an_error_in_time(bucket, monkeypatch):
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "1")
  bucket.faults.always("delay", delay_seconds=20)
  started = time.monotonic()
  with pytest.raises(errors.UnreachableError, match=r"last: .*Timeout.*timed out"):
    storage.read_bytes(f"{bucket}/a")
  assert time.monotonic() - started < 15


@pytest.mark.parametrize("operation", ["read", "download"])
def test_a_body_that_trickles_is_cut_off_at_the_deadline(
  bucket: buckets.Bucket, large: pathlib.Path, operation: str, monkeypatch
):
  storage.upload(str(large), f"{bucket}/a")
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "1")
  bucket.faults.always("trickle", matching="gs://faces/a", delay_seconds=0.1)
  started = time.monotonic()
  with pytest.raises(errors.UnreachableError, match="gs://faces/a: no success in 1 s"):
    OPERATIONS[operation](f"{bucket}/a", str(large))
  assert time.monotonic() - started < 8  # all of it would take 14 s


def test_a_refused_connection_is_named_as_the_reason(monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "0.2")
  with pytest.raises(errors.UnreachableError, match="Connection refused"):
    storage.read_bytes("gs://faces/a")
  storage.close()


@pytest.mark.parametrize("kind", ["429", "drop", "lose", "truncate"])
def test_a_write_whose_answer_was_lost_has_happened_once(bucket, kind: str):
  bucket.faults.always(kind, method="POST", times=1)
  assert storage.write_bytes(f"{bucket}/a", b"x", if_absent=True)
  bucket.faults.always(kind, method="POST", times=1)
  assert storage.write_bytes(f"{bucket}/a", b"y")
  assert storage.read_bytes(f"{bucket}/a") == b"y"
  # Where it had taken effect, the repetition was refused: a late one is, too.
  refused = sum(one.status == 412 for one in bucket.traffic.exchanges)
  assert refused == (2 if kind in ("lose", "truncate") else 0)


@pytest.mark.parametrize("kind", ["503", "drop", "lose"])
def test_a_removal_whose_answer_was_lost_has_happened(bucket, kind: str):
  storage.write_bytes(f"{bucket}/a", b"x")
  bucket.faults.always(kind, method="DELETE", times=1)
  storage.remove(f"{bucket}/a")
  assert not storage.exists(f"{bucket}/a")
  assert bucket.traffic.requests(method="DELETE") == 2


def test_one_of_many_writers_is_first_even_if_answers_are_lost(bucket: buckets.Bucket):
  bucket.faults.rate(0.3, seed=3, kinds=("503", "lose"))

  def write(number: int) -> bool:
    return storage.write_bytes(f"{bucket}/a", b"%d" % number, if_absent=True)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    won = list(pool.map(write, range(8)))
  bucket.faults.clear()
  assert sum(won) == 1
  assert storage.read_bytes(f"{bucket}/a") == b"%d" % won.index(True)


@pytest.mark.usefixtures("small_pieces")
def test_a_large_file_does_not_replace_one_written_meanwhile(bucket, large):
  bucket.faults.always(
    method="PUT",
    times=1,
    meanwhile=lambda: storage.write_bytes(f"{bucket}/a", b"first"),
  )
  assert not storage.upload(str(large), f"{bucket}/a", if_absent=True)
  assert storage.read_bytes(f"{bucket}/a") == b"first"


@pytest.mark.usefixtures("small_pieces")
def test_a_download_resumes_after_a_cut_at_the_missing_byte(bucket, large, tmp_path):
  storage.upload(str(large), f"{bucket}/a")
  bucket.traffic.clear()
  bucket.faults.always("truncate", matching="gs://faces/a", method="GET", times=4)
  storage.download(f"{bucket}/a", str(tmp_path / "copy"))
  assert (tmp_path / "copy").read_bytes() == CONTENT
  assert bucket.traffic.faults() == {"truncate": 4}
  assert bucket.traffic.bytes_read() == len(CONTENT)


@pytest.mark.usefixtures("small_pieces")
def test_an_upload_resumes_after_a_cut_with_the_missing_piece(bucket, large):
  bucket.faults.always("lose", method="PUT", times=1)
  storage.upload(str(large), f"{bucket}/a")
  assert storage.read_bytes(f"{bucket}/a") == CONTENT
  # Of its five pieces only the one without an answer was sent again.
  assert bucket.traffic.requests(method="PUT") == 6


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("status", [308, 404, 410])
def test_a_lost_upload_session_is_replaced_by_a_new_one(bucket, large, status: int):
  bucket.faults.always(status=status, method="PUT", times=1)
  storage.upload(str(large), f"{bucket}/a")
  assert storage.read_bytes(f"{bucket}/a") == CONTENT


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_changes_while_it_is_uploaded_is_refused(bucket, large):
  bucket.faults.always(
    method="POST", times=1, meanwhile=lambda: large.write_bytes(bytes(len(CONTENT)))
  )
  with pytest.raises(errors.DataError, match="was the file written to meanwhile"):
    storage.upload(str(large), f"{bucket}/a")
  assert not storage.exists(f"{bucket}/a")


@pytest.mark.usefixtures("small_pieces")
def test_an_object_replaced_during_its_download_is_never_mixed(bucket, large, tmp_path):
  storage.upload(str(large), f"{bucket}/a")
  bucket.faults.always(
    content_only=True,
    times=1,
    meanwhile=lambda: storage.write_bytes(f"{bucket}/a", b"other"),
  )
  with pytest.raises(errors.DataError, match="gs://faces/a was replaced"):
    storage.download(f"{bucket}/a", str(tmp_path / "copy"))
  assert not list(tmp_path.glob("copy*"))


def test_a_range_cut_in_two_is_not_mixed_from_two_objects(bucket):
  """Without a generation a range starts over after a cut."""
  storage.write_bytes(f"{bucket}/a", b"1" * 1000)
  bucket.faults.always(
    "truncate",
    method="GET",
    times=1,
    meanwhile=lambda: storage.write_bytes(f"{bucket}/a", b"2" * 1000),
  )
  assert storage.read_range(f"{bucket}/a", 0, 900) == b"2" * 900


def test_many_threads_read_at_once_through_faults(bucket: buckets.Bucket, caplog):
  storage.write_bytes(f"{bucket}/a", CONTENT)
  bucket.faults.rate(0.1, seed=5, delay_seconds=0.05)

  def read(start: int) -> bool:
    piece = storage.read_range(f"{bucket}/a", start, 20_000)
    return piece == CONTENT[start : start + 20_000]

  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    assert all(pool.map(read, range(0, 1_400_000, 20_000)))
  assert bucket.traffic.faults().total() > 2
  assert "pool is full" not in caplog.text


def test_a_full_disk_is_one_line_and_leaves_nothing(bucket, tmp_path):
  """A limit on the size of files stands in for the disk's end."""
  storage.write_bytes(f"{bucket}/a", CONTENT)
  bucket.traffic.clear()
  path = str(tmp_path / "cache" / "a")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    with pytest.raises(errors.DataError) as caught:
      storage.download(f"{bucket}/a", path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  reason = os.strerror(errno.EFBIG)
  advice = "free space on its disk or name another folder."
  assert str(caught.value) == f"{path}: {reason}; {advice}"
  assert not list((tmp_path / "cache").iterdir())
  assert bucket.traffic.requests() == 2  # its size, and its content once
