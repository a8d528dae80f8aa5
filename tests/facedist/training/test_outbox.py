"""Checkpoints and logs on their way to a bucket: order, faults, kills, the end."""

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
from facedist.training.checkpoint import checkpoints, uploader
from facedist.training.checkpoint.uploader import MOST_WAITING, BucketUploader
from tests import buckets


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: pathlib.Path, monkeypatch) -> None:
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def save(box: uploader.Uploader, *steps: int) -> None:
  """Saves as a chief does, and hands over."""
  for step in steps:
    state = tf.train.Checkpoint(weight=tf.Variable(float(step)))
    checkpoints.save(state, box.folder, step=step, is_chief=True, facts={})
    box.publish(step)


def steps(workdir: str) -> list[int]:
  return [found.step for found in checkpoints.list_checkpoints(workdir)]


def wait_until(condition) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, "it did not happen"
    time.sleep(0.02)


def test_checkpoints_arrive_while_training_goes_on_and_the_newest_stay(bucket: str):
  workdir = f"{bucket}/run"
  with uploader.open_uploader(workdir, is_chief=True, keep_last=2) as box:
    save(box, 0)
    wait_until(lambda: steps(workdir) == [0])
    assert not steps(box.folder)  # nothing stays behind
    save(box, 10, 20, 30)
    assert box.finish()
  box.check()
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
  assert not os.path.exists(box.folder)


@pytest.mark.parametrize("uploads", [0, 1, 2])
def test_a_save_killed_between_its_files_is_never_seen(
  uploads: int, bucket: str, tmp_path: pathlib.Path
):
  program = f"""
import os, signal, sys
import tensorflow as tf
from facedist import storage
from facedist.training.checkpoint import checkpoints, uploader

sent = []
def upload(local, path):
  if len(sent) == {uploads}:
    os.kill(os.getpid(), signal.SIGKILL)
  sent.append(path)
  send(local, path)

with uploader.open_uploader(sys.argv[1], is_chief=True, keep_last=1) as box:
  for step in (1, 2):
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    checkpoints.save(state, box.folder, step=step, is_chief=True, facts={{}})
    if step == 2:
      while checkpoints.list_checkpoints(box.folder)[0].step == 1:
        pass
      send, storage.upload = storage.upload, upload
    box.publish(step)
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
  endings = ["data-00000-of-00001", "index"]  # in the order in which they are sent
  names = storage.list_names(checkpoints.folder(workdir))
  assert [name for name in names if "02" in name] == [
    f"step-00000002.{ending}" for ending in endings[:uploads]
  ]
  with uploader.open_uploader(workdir, is_chief=True, keep_last=1) as box:
    checkpoints.remove_unfinished(workdir)
    assert os.listdir(box.folder) == []  # the killed one's leftovers are gone
    save(box, 2)
  assert steps(workdir) == [2]


def test_a_bucket_that_fails_is_tried_again_and_training_goes_on(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  box = BucketUploader(workdir, str(tmp_path / "own"), keep_last=9, retry_seconds=0.05)
  bucket.faults.always(status=403)
  save(box, *range(MOST_WAITING + 2))
  bucket.faults.clear()
  assert box.finish()
  # 0 was being sent; of those behind it the oldest went when too many waited
  assert steps(workdir) == [0, 3, 4, 5]
  with pytest.raises(
    errors.SavingError, match=r"^step-00000001, step-00000002 did not reach gs://faces"
  ):
    box.check()


def test_what_is_on_its_way_arrives_before_a_run_goes_back(bucket: buckets.Bucket):
  bucket.faults.always("delay", method="POST", delay_seconds=0.2)
  workdir = f"{bucket}/run"
  with uploader.open_uploader(workdir, is_chief=True, keep_last=9) as box:
    save(box, 0, 4)
    box.settle()
    assert steps(workdir) == [0, 4]
    save(box, 4)  # the rewound run comes by again
    save(box, 8)
  box.check()
  assert steps(workdir) == [0, 4, 8]


def test_what_a_failing_bucket_refuses_is_dropped_when_a_run_goes_back(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  box = BucketUploader(workdir, str(tmp_path / "own"), keep_last=9, retry_seconds=0.05)
  bucket.faults.always(status=403)
  save(box, *range(MOST_WAITING + 1))
  box.settle()
  assert not storage.list_names(checkpoints.folder(box.folder))
  bucket.faults.clear()
  save(box, *range(MOST_WAITING))  # no more: the box may not know yet that it mended
  assert box.finish()
  assert steps(workdir) == list(range(MOST_WAITING))
  box.check()  # 1 was given up, but has arrived since


def test_a_step_that_waits_is_not_queued_twice(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  box = BucketUploader(f"{bucket}/run", str(tmp_path / "own"), keep_last=9)
  bucket.faults.always(status=403)
  save(box, 0)
  wait_until(lambda: box._is_failing)
  save(box, 4, 4)
  bucket.faults.clear()
  assert box.finish()
  assert steps(f"{bucket}/run") == [0, 4]


def test_a_bucket_that_fails_at_the_end_is_told_within_one_more_attempt(
  bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  box = BucketUploader(f"{bucket}/run", str(tmp_path / "own"), keep_last=9)
  bucket.faults.always(status=403)
  save(box, 1, 2)
  pathlib.Path(box.folder, "train_metrics.jsonl").write_text("{}\n")
  started = time.monotonic()
  assert not box.finish()
  assert time.monotonic() - started < uploader.RETRY_SECONDS
  with pytest.raises(errors.SavingError, match="step-00000001, step-00000002 did not"):
    box.check()
  assert steps(box.folder) == [1, 2]


def test_a_slow_bucket_loses_no_checkpoint_and_gets_each_marker_last(
  bucket: buckets.Bucket,
):
  bucket.faults.always("delay", method="POST", delay_seconds=0.05)
  workdir = f"{bucket}/run"
  with uploader.open_uploader(workdir, is_chief=True, keep_last=20) as box:
    save(box, *range(3 * MOST_WAITING))
  box.check()
  written = [
    one.path.removeprefix(f"{workdir}/checkpoints/")
    for one in bucket.traffic.exchanges
    if one.method == "POST"
  ]
  assert written == [
    f"step-{step:08d}.{ending}"
    for step in range(3 * MOST_WAITING)
    for ending in ("data-00000-of-00001", "index", "json")
  ]


def test_checkpoints_and_logs_arrive_whole_through_faults(bucket: buckets.Bucket):
  workdir = f"{bucket}/run"
  with uploader.open_uploader(workdir, is_chief=True, keep_last=20) as box:
    bucket.faults.rate(0.2, seed=3)
    save(box, *range(10))
    pathlib.Path(box.folder, "train_metrics.jsonl").write_text('{"a": 1}\n')
  assert sum(bucket.traffic.faults().values()) > 10
  bucket.faults.clear()
  box.check()
  assert steps(workdir) == list(range(10))
  for found in checkpoints.list_checkpoints(workdir):
    restored = tf.train.Checkpoint(weight=tf.Variable(-1.0))
    checkpoints.restore(restored, found, is_whole=True)
    assert restored.weight.numpy() == found.step
  assert storage.read_bytes(f"{workdir}/train_metrics.jsonl") == b'{"a": 1}\n'


def test_logs_are_copied_as_they_grow_by_whole_lines_and_written_on_after_a_restart(
  bucket: str, tmp_path: pathlib.Path
):
  workdir = f"{bucket}/run"
  copy = storage.join(workdir, "train_metrics.jsonl")
  for number in (1, 2):
    folder = str(tmp_path / str(number))
    os.makedirs(os.path.join(folder, "tensorboard", "train"))
    box = BucketUploader(workdir, folder, keep_last=1, sync_seconds=0.02)
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
    box.finish()
  assert storage.read_bytes(copy) == b'{"step": 1}\n{"step": 2}\n'
  train = storage.join(workdir, "tensorboard", "train")
  assert storage.list_names(train) == ["events.1", "events.2"]
  assert storage.read_bytes(storage.join(train, "events.2")) == b"\0\0"


def test_a_second_process_waits_for_the_first_to_finish_sending(bucket: str):
  workdir = f"{bucket}/run"
  program = """
import sys
from absl import logging
from facedist.training.checkpoint import checkpoints
from facedist.training.checkpoint import uploader
logging.set_verbosity(logging.INFO)
with uploader.open_uploader(sys.argv[1], is_chief=True, keep_last=1) as box:
  print([found.step for found in checkpoints.list_checkpoints(sys.argv[1])])
"""
  first = uploader.open_uploader(workdir, is_chief=True, keep_last=1)
  box = first.__enter__()
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
      save(box, 3)
    finally:
      first.__exit__(None, None, None)
    assert second.communicate(timeout=60)[0] == "[3]\n"


def test_workers_other_than_the_chief_send_nothing_and_need_no_folder(bucket: str):
  with uploader.open_uploader(f"{bucket}/run", is_chief=False, keep_last=1) as box:
    assert box.finish()
  box.check()
  assert storage.list_names(f"{bucket}/run") == []
  assert os.listdir(tempfile.gettempdir()) == []
