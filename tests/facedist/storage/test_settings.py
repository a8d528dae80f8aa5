"""Settings of buckets: flags, their way to child processes, their rules."""

import json
import multiprocessing
import os
import pathlib
import subprocess
import sys

import pytest

from facedist import errors, storage
from facedist.storage import gcs, retry
from tests import buckets

COMMAND = '''"""Reads one object in a spawned process."""
import dataclasses
import multiprocessing
from facedist import config, storage

@dataclasses.dataclass(frozen=True)
class ReadConfig:
  path: str = config.setting(help="What to read.")

def main(settings):
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    print(pool.apply(storage.read_bytes, (settings.path,)).decode())

if __name__ == "__main__":
  config.run_command(main, ReadConfig)
'''


@pytest.fixture
def command(tmp_path: pathlib.Path) -> pathlib.Path:
  """A command that reads `--path` in a child."""
  path = tmp_path / "read.py"
  path.write_text(COMMAND)
  return path


def run(command: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
  """Runs the command without any of the test's settings in its environment."""
  dropped = ("STORAGE_EMULATOR_HOST", "FACEDIST_STORAGE_DEADLINE_SECONDS")
  environment = {key: value for key, value in os.environ.items() if key not in dropped}
  return subprocess.run(
    [sys.executable, str(command), *arguments],
    check=False,
    capture_output=True,
    text=True,
    env=environment,
  )


def test_a_child_process_uses_the_flags_of_its_command(bucket: buckets.Bucket, command):
  storage.write_bytes(f"{bucket}/a", b"read")
  bucket.faults.requester_pays = True
  endpoint = f"--storage_endpoint={bucket.endpoint}"
  path = f"--path={bucket}/a"
  done = run(command, path, endpoint, "--storage_user_project=mine")
  assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
  failed = run(command, path, endpoint)
  assert failed.returncode == errors.ExitCode.DATA
  line = "the bucket's requester pays; give --storage_user_project=PROJECT."
  assert failed.stderr == f"error: {bucket}/a: {line}\n"


def test_every_operation_names_the_project_that_pays(
  bucket: buckets.Bucket, tmp_path: pathlib.Path, monkeypatch
):
  monkeypatch.setattr(gcs, "_UPLOAD_PIECE_BYTES", 4 << 20)
  monkeypatch.setenv("FACEDIST_STORAGE_USER_PROJECT", "mine")
  bucket.faults.requester_pays = True
  local, copy = tmp_path / "large", tmp_path / "copy"
  local.write_bytes(bytes(9 << 20))
  assert storage.write_bytes(f"{bucket}/small", b"12345")
  assert storage.upload(str(local), f"{bucket}/large")
  assert bucket.traffic.requests(method="PUT") == 3  # a session, in pieces
  storage.download(f"{bucket}/large", str(copy))
  assert copy.read_bytes() == local.read_bytes()
  assert storage.read_range(f"{bucket}/small", 1, 3) == b"234"
  assert storage.size(f"{bucket}/small") == 5
  assert storage.list_names(str(bucket)) == ["large", "small"]
  assert [entry.path for entry in storage.walk(str(bucket))] == ["large", "small"]
  storage.remove(f"{bucket}/small")
  assert not storage.exists(f"{bucket}/small")
  assert {one.status for one in bucket.traffic.exchanges} <= {200, 204, 206, 308, 404}


def test_a_spawned_process_has_what_was_configured(bucket: buckets.Bucket, monkeypatch):
  # setenv, so that the test's end undoes what configure sets
  monkeypatch.setenv("FACEDIST_STORAGE_USER_PROJECT", "")
  storage.configure(user_project="mine", deadline_seconds=7)
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    found = pool.apply(retry.current)
  expected = retry.StorageSettings(
    endpoint=bucket.endpoint, user_project="mine", deadline_seconds=7.0
  )
  assert found == expected


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"endpoint": "storage.example"}, "--storage_endpoint=storage.example is no addr"),
    ({"deadline_seconds": 0}, "--storage_deadline_seconds=0 must be a number of"),
    ({"deadline_seconds": float("nan")}, "--storage_deadline_seconds=nan must be"),
  ],
)
def test_a_setting_that_breaks_its_rule_sets_nothing(bucket, setting, message):
  before = retry.current()
  with pytest.raises(errors.UsageError, match=message):
    storage.configure(**setting)
  assert retry.current() == before


def test_a_variable_that_is_no_number_is_a_usage_error(bucket, monkeypatch):
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "soon")
  with pytest.raises(errors.UsageError, match="_seconds=soon must be a number"):
    storage.exists(f"{bucket}/a")


def test_no_wait_is_longer_than_a_quarter_of_the_deadline():
  limits = retry.StorageSettings(endpoint=None, user_project=None, deadline_seconds=20)
  assert limits.timeout_seconds(20) == (5, 5)
  assert limits.timeout_seconds(3) == (3, 3)
  long = retry.StorageSettings(endpoint=None, user_project=None, deadline_seconds=300)
  assert long.timeout_seconds(300) == (10, 30)


def test_credentials_are_not_sent_without_encryption(
  bucket: buckets.Bucket, tmp_path, monkeypatch
):
  """Default credentials are there, and would be used over https."""
  key = {
    "type": "authorized_user",
    "client_id": "someone",
    "client_secret": "very-secret",
    "refresh_token": "very-secret",
  }
  (tmp_path / "key.json").write_text(json.dumps(key))
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
  storage.write_bytes(f"{bucket}/a", b"x")
  assert bucket.traffic.requests() > 0
  assert not bucket.traffic.authorized()
