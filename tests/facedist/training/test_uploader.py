"""Uploads of checkpoints and logs: their order, faults, kills, and the end of a run."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import tensorflow as tf

from facedist import errors, storage
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.uploader import (
  MAX_WAITING,
  RETRY_SECONDS,
  BucketUploader,
  Uploader,
  open_uploader,
)
from tests import buckets


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: pathlib.Path, monkeypatch) -> None:
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def save(uploader: Uploader, *steps: int) -> None:
  """Saves and publishes as a chief does."""
  for step in steps:
    state = tf.train.Checkpoint(weight=tf.Variable(float(step)))
    checkpoints.save(state, uploader.folder, step=step, is_chief=True, facts={})
    uploader.publish(step)


def steps(workdir: str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(workdir)]


def wait_until(condition) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, "the condition did not become true"
    time.sleep(0.02)


def test_checkpoints_are_uploaded_while_training_continues_and_the_newest_are_kept(
  bucket: str,
):
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=2) as uploader:
    save(uploader, 0)
    wait_until(lambda: steps(workdir) == [0])
    assert not steps(uploader.folder)  # deleted once it is uploaded
    save(uploader, 10, 20, 30)
    assert uploader.finish()
  uploader.check()
  assert steps(workdir) == [20, 30]
  names = storage.list_names(checkpoints.folder(workdir))
  assert names == [
    f"step-000000{step}.{ending}"
    for step in (20, 30)
    for ending in ("data-00000-of-00001", "index", "json")
  ]
  restored = tf.train.Checkpoint(weight=tf.Variable(0.0))
  checkpoints.restore(restored, checkpoints.at(workdir, 30), is_whole=True)
  assert restored.weight.numpy() == 30.0
  assert not os.path.exists(uploader.folder)


@pytest.mark.parametrize("uploads", [0, 1, 2])
def test_a_checkpoint_whose_upload_was_killed_is_never_seen(
  uploads: int, bucket: str, tmp_path: pathlib.Path
):
  program = f"""
import os, signal, sys
import tensorflow as tf
from facedist import storage
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.uploader import open_uploader

uploaded = []
def upload(local, path):
  if len(uploaded) == {uploads}:
    os.kill(os.getpid(), signal.SIGKILL)
  uploaded.append(path)
  original(local, path)

with open_uploader(sys.argv[1], is_chief=True, keep_last=1) as uploader:
  for step in (1, 2):
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    checkpoints.save(state, uploader.folder, step=step, is_chief=True, facts={{}})
    if step == 2:
      while checkpoints.list_checkpoints(uploader.folder)[0].step == 1:
        pass
      original, storage.upload = storage.upload, upload
    uploader.publish(step)
"""
  workdir = f"{bucket}/run"
  killed = subprocess.run(
    [sys.executable, "-c", program, workdir],
    env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    timeout=120,
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  assert steps(workdir) == [1]
  endings = ["data-00000-of-00001", "index"]  # in the order of their upload
  names = storage.list_names(checkpoints.folder(workdir))
  assert [name for name in names if "02" in name] == [
    f"step-00000002.{ending}" for ending in endings[:uploads]
  ]
  with open_uploader(workdir, is_chief=True, keep_last=1) as uploader:
    checkpoints.remove_unfinished(workdir)
    assert os.listdir(uploader.folder) == []  # what the killed process left is gone
    save(uploader, 2)
  assert steps(workdir) == [2]


def test_a_bucket_that_fails_is_tried_again_and_training_continues(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  uploader = BucketUploader(
    workdir, str(tmp_path / "own"), keep_last=9, retry_seconds=0.05
  )
  bucket.faults.always(status=403)
  save(uploader, *range(MAX_WAITING + 2))
  bucket.faults.clear()
  assert uploader.finish()
  # 0 was being uploaded; the oldest after it were deleted when too many waited
  assert steps(workdir) == [0, 3, 4, 5]
  with pytest.raises(
    errors.SavingError, match=r"^step-00000001, step-00000002 did not reach gs://faces"
  ):
    uploader.check()


def test_draining_waits_until_all_is_uploaded(bucket: buckets.Bucket):
  bucket.faults.always("delay", method="POST", delay_seconds=0.2)
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=9) as uploader:
    save(uploader, 0, 4)
    uploader.drain()
    assert steps(workdir) == [0, 4]
    save(uploader, 4)  # a run that went back saves it again
    save(uploader, 8)
  uploader.check()
  assert steps(workdir) == [0, 4, 8]


def test_draining_drops_what_a_failing_bucket_refuses(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  uploader = BucketUploader(
    workdir, str(tmp_path / "own"), keep_last=9, retry_seconds=0.05
  )
  bucket.faults.always(status=403)
  save(uploader, *range(MAX_WAITING + 1))
  uploader.drain()
  assert not storage.list_names(checkpoints.folder(uploader.folder))
  bucket.faults.clear()
  save(
    uploader, *range(MAX_WAITING)
  )  # no more: the uploader may not know yet that the bucket works again
  assert uploader.finish()
  assert steps(workdir) == list(range(MAX_WAITING))
  uploader.check()  # 1 was deleted, but has been saved again since


def test_a_step_that_waits_is_not_queued_twice(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  uploader = BucketUploader(f"{bucket}/run", str(tmp_path / "own"), keep_last=9)
  bucket.faults.always(status=403)
  save(uploader, 0)
  wait_until(lambda: uploader._is_failing)
  save(uploader, 4, 4)
  bucket.faults.clear()
  assert uploader.finish()
  assert steps(f"{bucket}/run") == [0, 4]


def test_a_bucket_that_fails_at_the_end_is_tried_once_more(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  uploader = BucketUploader(f"{bucket}/run", str(tmp_path / "own"), keep_last=9)
  bucket.faults.always(status=403)
  save(uploader, 1, 2)
  pathlib.Path(uploader.folder, "train_metrics.jsonl").write_text("{}\n")
  started = time.monotonic()
  assert not uploader.finish()
  assert time.monotonic() - started < RETRY_SECONDS
  with pytest.raises(errors.SavingError, match="step-00000001, step-00000002 did not"):
    uploader.check()
  assert steps(uploader.folder) == [1, 2]


def test_a_slow_bucket_loses_no_checkpoint_and_gets_each_marker_last(
  bucket: buckets.Bucket,
):
  bucket.faults.always("delay", method="POST", delay_seconds=0.05)
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=20) as uploader:
    save(uploader, *range(3 * MAX_WAITING))
  uploader.check()
  written = [
    one.path.removeprefix(f"{workdir}/checkpoints/")
    for one in bucket.traffic.exchanges
    if one.method == "POST"
  ]
  assert written == [
    f"step-{step:08d}.{ending}"
    for step in range(3 * MAX_WAITING)
    for ending in ("data-00000-of-00001", "index", "json")
  ]


def test_checkpoints_and_logs_are_uploaded_whole_through_faults(bucket: buckets.Bucket):
  workdir = f"{bucket}/run"
  with open_uploader(workdir, is_chief=True, keep_last=20) as uploader:
    bucket.faults.rate(0.2, seed=3)
    save(uploader, *range(10))
    pathlib.Path(uploader.folder, "train_metrics.jsonl").write_text('{"a": 1}\n')
  assert sum(bucket.traffic.faults().values()) > 10
  bucket.faults.clear()
  uploader.check()
  assert steps(workdir) == list(range(10))
  for found in checkpoints.list_checkpoints(workdir):
    restored = tf.train.Checkpoint(weight=tf.Variable(-1.0))
    checkpoints.restore(restored, found, is_whole=True)
    assert restored.weight.numpy() == found.step
  assert storage.read_bytes(f"{workdir}/train_metrics.jsonl") == b'{"a": 1}\n'


def test_logs_are_copied_by_whole_lines_and_appended_to_after_a_restart(
  bucket: str, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  copy = storage.join(workdir, "train_metrics.jsonl")
  for number in (1, 2):
    folder = str(tmp_path / str(number))
    os.makedirs(os.path.join(folder, "tensorboard", "train"))
    uploader = BucketUploader(workdir, folder, keep_last=1, sync_seconds=0.02)
    with open(os.path.join(folder, "train_metrics.jsonl"), "a") as stream:
      stream.write(f'{{"step": {number}}}\n{{"ste')
      stream.flush()
      wait_until(
        lambda number=number: (
          storage.exists(copy)
          and storage.read_bytes(copy).endswith(b'{"step": %d}\n' % number)
        )
      )
      stream.seek(0, os.SEEK_END)
      stream.truncate(stream.tell() - len('{"ste'))
    events = os.path.join(folder, "tensorboard", "train", f"events.{number}")
    pathlib.Path(events).write_bytes(b"\0" * number)
    uploader.finish()
  assert storage.read_bytes(copy) == b'{"step": 1}\n{"step": 2}\n'
  train = storage.join(workdir, "tensorboard", "train")
  assert storage.list_names(train) == ["events.1", "events.2"]
  assert storage.read_bytes(storage.join(train, "events.2")) == b"\0\0"


def test_a_second_process_waits_for_the_uploads_of_the_first(bucket: str):
  workdir = f"{bucket}/run"
  program = """
import sys
from absl import logging
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.uploader import open_uploader
logging.set_verbosity(logging.INFO)
with open_uploader(sys.argv[1], is_chief=True, keep_last=1) as uploader:
  print([found.step for found in checkpoints.list_checkpoints(sys.argv[1])])
"""
  first = open_uploader(workdir, is_chief=True, keep_last=1)
  uploader = first.__enter__()
  with subprocess.Popen(
    [sys.executable, "-c", program, workdir],
    env=os.environ | {"TMPDIR": tempfile.gettempdir()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as second:
    try:
      assert second.stderr
      assert any("still writes to gs://" in line for line in second.stderr)
      save(uploader, 3)
    finally:
      first.__exit__(None, None, None)
    assert second.communicate(timeout=60)[0] == "[3]\n"


def test_workers_other_than_the_chief_upload_nothing_and_need_no_folder(bucket: str):
  with open_uploader(f"{bucket}/run", is_chief=False, keep_last=1) as uploader:
    assert uploader.finish()
  uploader.check()
  assert storage.list_names(f"{bucket}/run") == []
  assert os.listdir(tempfile.gettempdir()) == []
