"""Settings of buckets: flags, their way to child processes, their rules."""

import pathlib
import subprocess
import sys

import pytest

from facedist import errors, storage
from facedist.data.shards import manifest
from facedist.storage import retry
from tests import buckets
from tests.tfrecords_tools.conftest import draw_image, jpeg_of


def test_child_processes_use_the_flags_of_their_command(
  bucket: buckets.Bucket, tmp_path: pathlib.Path, monkeypatch
):
  for name in ("n1/1.jpg", "n2/1.jpg"):
    storage.write_bytes(f"{bucket}/faces/{name}", jpeg_of(draw_image(0)))
  bucket.faults.requester_pays = True
  monkeypatch.delenv("STORAGE_EMULATOR_HOST")
  monkeypatch.delenv("FACEDIST_STORAGE_DEADLINE_SECONDS")
  flags = (
    *("--dataset=vggface2", f"--input_dir={bucket}/faces", "--num_processes=2"),
    *(f"--output_dir={tmp_path}/shards", f"--storage_endpoint={bucket.endpoint}"),
    "--storage_user_project=mine",
  )
  subprocess.run([sys.executable, "-m", "tfrecords_tools.build", *flags], check=True)
  assert manifest.load(f"{tmp_path}/shards").splits["train"].records == 2


@pytest.mark.usefixtures("small_pieces")
def test_every_operation_names_the_project_that_pays(
  bucket: buckets.Bucket, tmp_path: pathlib.Path, monkeypatch
):
  bucket.faults.requester_pays = True
  message = "/a: the bucket's requester pays; give --storage_user_project=PROJECT.$"
  with pytest.raises(errors.AccessError, match=message):
    storage.exists(f"{bucket}/a")
  bucket.traffic.clear()
  monkeypatch.setenv("FACEDIST_STORAGE_USER_PROJECT", "mine")
  local, copy = tmp_path / "large", tmp_path / "copy"
  local.write_bytes(bytes(9_000_000))
  assert storage.write_bytes(f"{bucket}/small", b"12345")
  assert storage.upload(str(local), f"{bucket}/large")
  assert bucket.traffic.requests(method="PUT") == 5  # a session, in pieces
  storage.download(f"{bucket}/large", str(copy))
  assert copy.read_bytes() == local.read_bytes()
  assert storage.read_range(f"{bucket}/small", 1, 3) == b"234"
  assert storage.size(f"{bucket}/small") == 5
  assert storage.list_names(str(bucket)) == ["large", "small"]
  assert [entry.path for entry in storage.walk(str(bucket))] == ["large", "small"]
  storage.remove(f"{bucket}/small")
  assert not storage.exists(f"{bucket}/small")
  assert {one.status for one in bucket.traffic.exchanges} <= {200, 204, 206, 308, 404}


@pytest.mark.parametrize(
  ("variable", "value", "message"),
  [
    ("ENDPOINT", "storage.example", "--storage_endpoint=storage.example is no addr"),
    *(
      ("DEADLINE_SECONDS", value, f"--storage_deadline_seconds={value} must be a numb")
      for value in ("0", "nan", "soon")
    ),
  ],
)
def test_a_variable_that_breaks_its_rule_is_a_usage_error(
  bucket, monkeypatch, variable, value, message
):
  monkeypatch.setenv(f"FACEDIST_STORAGE_{variable}", value)
  with pytest.raises(errors.UsageError, match=message):
    storage.exists(f"{bucket}/a")


@pytest.mark.parametrize(
  ("deadline", "left", "waits"),
  [(20, 20, (5, 5)), (20, 3, (3, 3)), (300, 300, (10, 30))],
)
def test_no_wait_is_longer_than_a_quarter_of_the_deadline(deadline, left, waits):
  settings = retry.StorageSettings(None, None, deadline_seconds=deadline)
  assert settings.timeout_seconds(left) == waits
