"""Uploads of checkpoints and logs: their order, faults, kills, and the end of a run."""

import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent import futures

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

ENDINGS = ("data-00000-of-00001", "index", "json")  # in the order of their upload


@pytest.fixture
def workdir(bucket: buckets.Bucket, temporary_folder: pathlib.Path) -> str:
  """A run's folder in the bucket; what is staged lies in a temporary folder."""
  return f"{bucket}/run"


@pytest.fixture
def uploader(workdir: str, tmp_path: pathlib.Path) -> BucketUploader:
  """One that tries again at once."""
  return BucketUploader(workdir, str(tmp_path / "own"), keep_last=9, retry_seconds=0.05)


def save(uploader: Uploader, *steps: int) -> None:
  """Saves and publishes as a chief does."""
  for step in steps:
    state = tf.train.Checkpoint(weight=tf.Variable(float(step)))
    checkpoints.save(state, uploader.folder, step=step, is_chief=True, facts={})
    uploader.publish(step)


def steps(workdir: str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(workdir)]


def names(workdir: str) -> list[str]:
  return storage.list_names(checkpoints.folder(workdir))


def wait_until(condition: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, "the condition did not become true"
    time.sleep(0.02)


def test_checkpoints_are_uploaded_while_training_continues_and_the_newest_are_kept(
  workdir: str,
):
  with open_uploader(workdir, is_chief=True, keep_last=2) as uploader:
    save(uploader, 0)
    wait_until(lambda: steps(workdir) == [0])
    assert not steps(uploader.folder)  # deleted once it is uploaded
    save(uploader, 10, 20, 30)
    assert uploader.finish()
  uploader.check()
  assert steps(workdir) == [20, 30]
  assert names(workdir) == [
    f"step-000000{step}.{ending}" for step in (20, 30) for ending in ENDINGS
  ]
  assert not os.path.exists(uploader.folder)


UPLOADS_TWO = """
import sys
import tensorflow as tf
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint.uploader import open_uploader

with open_uploader(sys.argv[1], is_chief=True, keep_last=1) as uploader:
  for step in (1, 2):
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    checkpoints.save(state, uploader.folder, step=step, is_chief=True, facts={})
    uploader.publish(step)
"""


def test_a_checkpoint_whose_upload_was_killed_is_never_seen(
  workdir: str, bucket: buckets.Bucket
):
  index = "gs://*/step-00000002.index"
  bucket.faults.always(status=503, matching=index)
  with subprocess.Popen(
    [sys.executable, "-c", UPLOADS_TWO, workdir],
    env=os.environ | {"TMPDIR": tempfile.gettempdir()},
  ) as uploading:
    wait_until(lambda: bucket.traffic.requests(index) > 0)
    uploading.kill()
  bucket.faults.clear()
  assert steps(workdir) == [1]
  assert [name for name in names(workdir) if "02" in name] == [
    f"step-00000002.{ENDINGS[0]}"
  ]
  with open_uploader(workdir, is_chief=True, keep_last=1) as uploader:
    checkpoints.remove_unfinished(workdir)
    assert os.listdir(uploader.folder) == []  # what the killed process left is gone
    save(uploader, 2)
  assert steps(workdir) == [2]


def test_a_bucket_that_fails_is_tried_again_and_training_continues(
  workdir: str, bucket: buckets.Bucket, uploader: BucketUploader
):
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


def test_draining_waits_until_all_is_uploaded(workdir: str, bucket: buckets.Bucket):
  bucket.faults.always("delay", method="POST", delay_seconds=0.2)
  with open_uploader(workdir, is_chief=True, keep_last=9) as uploader:
    save(uploader, 0, 4)
    uploader.drain()
    assert steps(workdir) == [0, 4]
    save(uploader, 4, 8)  # as a run that went back to step 0
  uploader.check()
  assert steps(workdir) == [0, 4, 8]


def test_draining_drops_what_a_failing_bucket_refuses(
  workdir: str, bucket: buckets.Bucket, uploader: BucketUploader
):
  bucket.faults.always(status=403)
  save(uploader, *range(MAX_WAITING + 1))
  uploader.drain()
  assert not names(uploader.folder)
  bucket.faults.clear()
  # no more, since the uploader may not know yet that the bucket works again
  save(uploader, *range(MAX_WAITING))
  assert uploader.finish()
  assert steps(workdir) == list(range(MAX_WAITING))
  uploader.check()  # 1 was deleted, but has been saved again since


def test_a_step_that_waits_is_not_queued_twice(
  workdir: str, bucket: buckets.Bucket, uploader: BucketUploader
):
  bucket.faults.always(status=403)
  save(uploader, 0, 4, 4)
  bucket.faults.clear()
  assert uploader.finish()
  assert steps(workdir) == [0, 4]


def test_a_bucket_that_fails_at_the_end_is_tried_once_more(
  workdir: str, bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  uploader = BucketUploader(workdir, str(tmp_path / "own"), keep_last=9)
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
  workdir: str, bucket: buckets.Bucket
):
  bucket.faults.always("delay", method="POST", delay_seconds=0.05)
  with open_uploader(workdir, is_chief=True, keep_last=20) as uploader:
    save(uploader, *range(3 * MAX_WAITING))
  uploader.check()
  sent = [one.path for one in bucket.traffic.exchanges if one.method == "POST"]
  assert sent == [
    f"{checkpoints.at(workdir, step).path}.{ending}"
    for step in range(3 * MAX_WAITING)
    for ending in ENDINGS
  ]


def test_checkpoints_and_logs_are_uploaded_whole_through_faults(
  workdir: str, bucket: buckets.Bucket
):
  with open_uploader(workdir, is_chief=True, keep_last=20) as uploader:
    bucket.faults.rate(0.2, seed=3)
    save(uploader, *range(10))
    pathlib.Path(uploader.folder, "train_metrics.jsonl").write_text('{"a": 1}\n')
  assert sum(bucket.traffic.faults().values()) > 10
  bucket.faults.clear()
  uploader.check()
  assert steps(workdir) == list(range(10))
  restored = tf.train.Checkpoint(weight=tf.Variable(-1.0))
  for found in checkpoints.list_checkpoints(workdir):
    checkpoints.restore(restored, found, is_whole=True)
    assert restored.weight.numpy() == found.step
  assert storage.read_bytes(f"{workdir}/train_metrics.jsonl") == b'{"a": 1}\n'


def test_logs_are_copied_by_whole_lines_and_appended_to_after_a_restart(
  workdir: str, tmp_path: pathlib.Path
):
  copy = f"{workdir}/train_metrics.jsonl"

  def run(name: str, expected: bytes) -> None:
    """Logs a line, a part of one that it cuts off again, and an event."""
    (tmp_path / name / "tensorboard").mkdir(parents=True)
    uploader = BucketUploader(
      workdir, str(tmp_path / name), keep_last=1, sync_seconds=0.02
    )
    log = tmp_path / name / "train_metrics.jsonl"
    with open(log, "ab") as stream:
      stream.write(f"{name}\nhalf a li".encode())
    wait_until(lambda: storage.exists(copy) and storage.read_bytes(copy) == expected)
    os.truncate(log, len(expected))
    (tmp_path / name / "tensorboard" / name).write_text(name)
    uploader.finish()
    assert storage.read_bytes(copy) == expected

  run("first", b"first\n")
  run("second", b"first\nsecond\n")
  events = storage.join(workdir, "tensorboard")
  assert storage.list_names(events) == ["first", "second"]
  assert storage.read_bytes(storage.join(events, "second")) == b"second"


def test_a_second_process_waits_for_the_uploads_of_the_first(
  workdir: str, caplog: pytest.LogCaptureFixture
):
  caplog.set_level(logging.INFO, logger="absl")

  def start_second() -> list[int]:
    with open_uploader(workdir, is_chief=True, keep_last=1):
      return steps(workdir)

  with futures.ThreadPoolExecutor() as pool:
    with open_uploader(workdir, is_chief=True, keep_last=1) as first:
      second = pool.submit(start_second)  # a lock is of an open file, as of a process
      wait_until(lambda: f"still writes to {workdir}" in caplog.text)
      save(first, 3)
    assert second.result(timeout=60) == [3]


def test_workers_other_than_the_chief_upload_nothing_and_need_no_folder(
  workdir: str, bucket: buckets.Bucket
):
  with open_uploader(workdir, is_chief=False, keep_last=1) as uploader:
    assert uploader.finish()
  uploader.check()
  assert storage.list_names(f"{bucket}/run") == []
  assert os.listdir(tempfile.gettempdir()) == []
