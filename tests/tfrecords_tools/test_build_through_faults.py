"""The builder with its shards in a bucket whose requests fail."""

import concurrent.futures
import subprocess
import sys

import pytest

from facedist import errors
from tests.tfrecords_tools.folders import files_of, upload

SETTINGS = {"image_size": 64, "num_shards": 4, "val_fraction": 0.25}


def run(module: str, *flags: str) -> None:
  """Runs a tool as a user does, with processes of its own."""
  command = [sys.executable, "-m", f"tfrecords_tools.{module}", *flags]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=280, check=False
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("share", "seed", "num_tasks", "source"), [(0.1, 2, 2, "bucket"), (0.3, 3, 1, "disk")]
)
def test_a_build_through_faults_has_the_bytes_of_one_without(
  vggface2_dir, build_set, bucket, share, seed, num_tasks, source
):
  local = build_set(vggface2_dir, **SETTINGS)
  if source == "bucket":
    vggface2_dir = f"{upload(vggface2_dir.parent, f'{bucket}/in')}/train"
  bucket.faults.rate(share, seed=seed)
  settings = SETTINGS | {"dataset": "vggface2", "num_processes": 2}
  settings |= {"input_dir": vggface2_dir, "output_dir": f"{bucket}/shards"}
  flags = [f"--{name}={value}" for name, value in settings.items()]
  if num_tasks > 1:
    flags.append(f"--num_tasks={num_tasks}")
    with concurrent.futures.ThreadPoolExecutor(num_tasks) as pool:
      parts = [(*flags, f"--task_index={task}") for task in range(num_tasks)]
      list(pool.map(lambda part: run("build", *part), parts))
    flags.append("--finalize")
  run("build", *flags)
  run("verify", f"{bucket}/shards")
  assert bucket.traffic.faults().total() > 0
  bucket.faults.clear()
  assert files_of(f"{bucket}/shards") == files_of(local)


@pytest.mark.parametrize(
  ("fault", "code", "reason"),
  [
    (
      {"status": 403, "message": "trainer lacks storage.objects.create"},
      errors.ExitCode.DATA,
      r"permission denied \(403 trainer lacks storage\.objects\.create\)",
    ),
    ({"status": 503}, errors.ExitCode.UNREACHABLE, "no success in 2 s"),
  ],
)
def test_a_build_into_a_bucket_that_refuses_or_is_silent_ends_in_one_line(
  vggface2_dir, build_set, bucket, monkeypatch, fault, code, reason
):
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "2")
  bucket.faults.always(**fault)
  with pytest.raises(errors.FacedistError, match=reason) as caught:
    build_set(vggface2_dir, output_dir=f"{bucket}/shards")
  assert str(caught.value).startswith("gs://faces/shards")
  assert caught.value.exit_code == code
