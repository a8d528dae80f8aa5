"""Leases on checkpoints, on a disk and in a bucket."""

import json
import pathlib
import time

import pytest

from facedist import storage
from facedist.training.checkpoint import checkpoints


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path: pathlib.Path, bucket: str) -> str:
  return str(tmp_path) if request.param == "disk" else f"{bucket}/run"


def test_all_leases_count_until_they_end(workdir: str):
  assert checkpoints.held_steps(workdir) == set()
  checkpoints.hold(workdir, "one", [100, 200])
  checkpoints.hold(workdir, "two", [200, 300])
  assert checkpoints.held_steps(workdir) == {100, 200, 300}
  checkpoints.hold(workdir, "one", [])
  assert checkpoints.held_steps(workdir) == {200, 300}
  checkpoints.hold(workdir, "two", [300])
  assert checkpoints.held_steps(workdir) == {300}


def test_a_lease_that_is_not_renewed_expires(workdir: str, monkeypatch):
  checkpoints.hold(workdir, "reader", [5])
  now = time.time()
  monkeypatch.setattr(time, "time", lambda: now + checkpoints.LEASE_SECONDS - 10)
  assert checkpoints.held_steps(workdir) == {5}
  monkeypatch.setattr(time, "time", lambda: now + checkpoints.LEASE_SECONDS + 10)
  assert checkpoints.held_steps(workdir) == set()
  checkpoints.hold(workdir, "reader", [5])
  assert checkpoints.held_steps(workdir) == {5}


@pytest.mark.parametrize("content", ["", "[1, 2]", json.dumps({"steps": [1]})])
def test_what_is_no_lease_is_ignored(workdir: str, content: str):
  path = storage.join(workdir, checkpoints.LEASES_FOLDER, "other.json")
  storage.write_bytes(path, content.encode() or b" ")
  checkpoints.hold(workdir, "reader", [7])
  assert checkpoints.held_steps(workdir) == {7}
