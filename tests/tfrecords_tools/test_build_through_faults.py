"""The builder with its shards in a bucket whose requests fail."""

import concurrent.futures
import pathlib
import subprocess
import sys

import pytest

from facedist import storage
from tests import buckets
from tfrecords_tools.builder import state

pytestmark = pytest.mark.slow


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
  """Runs a tool as a user does, with processes of its own."""
  return subprocess.run(
    [sys.executable, "-m", f"tfrecords_tools.{module}", *flags],
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )


def content(folder: str) -> dict[str, bytes]:
  """Returns every file below the folder, less the builder's own notes."""
  return {
    path: storage.read_bytes(storage.join(folder, path))
    for path, _ in storage.walk(folder)
    if not path.startswith(state.FOLDER)
  }


def flags(vggface2_dir: pathlib.Path | str, output_dir: str) -> tuple[str, ...]:
  """Returns the flags of a build with two processes."""
  return (
    "--dataset=vggface2",
    f"--input_dir={vggface2_dir}",
    f"--output_dir={output_dir}",
    "--image_size=64",
    "--num_shards=4",
    "--val_fraction=0.25",
    "--num_processes=2",
  )


def run_tasks(num_tasks: int, *flags: str) -> None:
  """Builds in tasks, all at a time, and puts their parts together."""
  given = (*flags, f"--num_tasks={num_tasks}")
  parts = [(*given, f"--task_index={task}") for task in range(num_tasks)]
  with concurrent.futures.ThreadPoolExecutor(num_tasks) as pool:
    for done in pool.map(lambda part: run("build", *part), parts):
      assert done.returncode == 0, done.stderr
  done = run("build", *given, "--finalize")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("share", "seed", "num_tasks"), [(0.1, 1, 1), (0.1, 2, 2), (0.3, 3, 1)]
)
def test_a_build_through_faults_has_the_bytes_of_one_without(
  vggface2_dir: pathlib.Path,
  bucket: buckets.Bucket,
  tmp_path: pathlib.Path,
  share: float,
  seed: int,
  num_tasks: int,
):
  local = str(tmp_path / "shards")
  assert run("build", *flags(vggface2_dir, local)).returncode == 0
  bucket.faults.rate(share, seed=seed)
  given = flags(vggface2_dir, f"{bucket}/shards")
  if num_tasks > 1:
    run_tasks(num_tasks, *given)
  else:
    built = run("build", *given)
    assert built.returncode == 0, built.stderr
  assert bucket.traffic.faults().total() > 0
  verified = run("verify", f"{bucket}/shards")
  assert verified.returncode == 0, verified.stderr
  bucket.faults.clear()
  assert content(f"{bucket}/shards") == content(local)


def test_images_and_tables_are_read_from_a_bucket_through_faults(
  vggface2_dir: pathlib.Path, bucket: buckets.Bucket, tmp_path: pathlib.Path
):
  local = str(tmp_path / "shards")
  assert run("build", *flags(vggface2_dir, local)).returncode == 0
  for path, _ in storage.walk(str(vggface2_dir.parent)):
    storage.upload(str(vggface2_dir.parent / path), f"{bucket}/in/{path}")
  bucket.faults.rate(0.1, seed=4)
  built = run("build", *flags(f"{bucket}/in/train", f"{bucket}/shards"))
  assert built.returncode == 0, built.stderr
  assert bucket.traffic.faults().total() > 0
  bucket.faults.clear()
  shards = content(f"{bucket}/shards")
  assert shards.keys() == content(local).keys()
  different = [name for name, held in content(local).items() if shards[name] != held]
  assert different == []


def test_a_build_without_permission_ends_in_one_line(vggface2_dir, bucket):
  bucket.faults.always(status=403, message="trainer lacks storage.objects.create")
  failed = run("build", *flags(vggface2_dir, f"{bucket}/shards"))
  assert failed.returncode == 4
  last = failed.stderr.strip().splitlines()[-1]
  assert last.startswith("error: gs://faces/shards")
  assert "permission denied (403 trainer lacks storage.objects.create)" in last
  assert "Traceback" not in failed.stderr


def test_a_build_into_a_bucket_that_fell_silent_ends_in_time(vggface2_dir, bucket):
  bucket.faults.always(status=503)
  given = flags(vggface2_dir, f"{bucket}/shards")
  failed = run("build", *given, "--storage_deadline_seconds=2")
  assert failed.returncode == 145
  last = failed.stderr.strip().splitlines()[-1]
  assert last.startswith("error: gs://faces/shards")
  assert "no success in 2 s" in last
  assert "Traceback" not in failed.stderr
