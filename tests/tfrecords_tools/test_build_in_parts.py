import concurrent.futures
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index
from tests.tfrecords_tools.folders import files_of, problems_of, times_of
from tfrecords_tools import build
from tfrecords_tools.builder import state


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch):
  for name in list(os.environ):
    if name.startswith("SLURM_ARRAY_") or name == "JOB_COMPLETION_INDEX":
      monkeypatch.delenv(name)


@pytest.fixture
def make(vggface2_dir, build_set):
  """Builds in seven shards; returns the folder."""
  return lambda **changes: build_set(vggface2_dir, **({"num_shards": 7} | changes))


@pytest.fixture
def whole(make):
  """The files of a build by one process."""
  return files_of(make(output_dir="whole"))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 9])
def test_any_number_of_tasks_in_any_order_gives_the_bytes_of_one(
  make, whole, num_tasks
):
  tasks = list(range(num_tasks))
  random.Random(0).shuffle(tasks)
  for task in tasks:
    folder = make(num_tasks=num_tasks, task_index=task)
    assert os.path.exists(f"{folder}/manifest.json") == (num_tasks == 1)
  make(num_tasks=num_tasks, finalize=True)
  assert files_of(folder) == whole
  assert problems_of(folder) == []


def test_the_scheduler_says_which_task_this_is(make, whole, monkeypatch):
  for task in range(2):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    make()
  assert files_of(make(finalize=True)) == whole


def test_a_part_that_is_done_is_left_alone(make, caplog):
  caplog.set_level("INFO", logger="absl")
  folder = make(num_tasks=2, task_index=1)
  assert "task 1 of 2 is finished; after the last one say --finalize" in caplog.text
  times = times_of(folder)
  make(num_tasks=2, task_index=1)
  assert "task 1 of 2 is finished; nothing to do" in caplog.text
  assert times_of(folder) == times


def test_what_is_missing_is_named_by_shard_and_task(make, whole):
  make(num_tasks=3, task_index=0)
  folder = pathlib.Path(make(num_tasks=3, task_index=2))
  (folder / "train-00000-of-00007.tfrecord").write_bytes(b"cut")
  (folder / "train-00005-of-00007.index.npy").unlink()
  (folder / "train-00006-of-00007.tfrecord").unlink()
  marker = folder / ".build" / "train-00001-of-00007.json"
  marker.write_text(marker.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
  with pytest.raises(errors.DataError) as caught:
    make(num_tasks=3, finalize=True)
  wanted = len(whole["train-00000-of-00007.tfrecord"])
  for part in (
    "lacks 6 of 7 shards",
    f"(task 0: train-00000-of-00007.tfrecord has 3 bytes, not {wanted})",
    "train-00001-of-00007.tfrecord (task 0: of another build)",
    "train-00002-of-00007.tfrecord (task 1: not built)",
    "train-00003-of-00007.tfrecord (task 1: not built)",
    "train-00005-of-00007.tfrecord (task 2: without its index)",
    "train-00006-of-00007.tfrecord (task 2: missing)",
    "run tasks 0,1,2 again, then --finalize",
  ):
    assert part in str(caught.value)
  assert not (folder / "manifest.json").exists()
  for task in range(3):
    make(num_tasks=3, task_index=task)
  assert files_of(make(num_tasks=3, finalize=True)) == whole


def test_missing_shards_of_no_task_are_counted(make):
  make(num_tasks=7, task_index=0)
  with pytest.raises(errors.DataError, match=r"lacks 6 of 7.*; build them, then"):
    make(finalize=True)


def test_a_folder_that_no_task_has_begun_cannot_be_finalized(make, tmp_path):
  with pytest.raises(errors.DataError, match="holds no build to finalize"):
    make(finalize=True)
  assert not (tmp_path / "shards").exists()


def test_a_verification_set_that_lacks_an_image_is_never_finalized(lfw_dir, build_set):
  for task in range(2):
    folder = build_set(lfw_dir, dataset="lfw", num_tasks=2, task_index=task)
  (marker,) = pathlib.Path(folder, state.FOLDER).glob("images-00001-*.json")
  lost = '"skipped": [{"path": "Cher/Cher_0001.jpg", "reason": "it is cut off"}]'
  marker.write_text(marker.read_text().replace('"skipped": []', lost))
  with pytest.raises(errors.DataError, match="it is cut off; a ver") as caught:
    build_set(lfw_dir, dataset="lfw", num_tasks=2, finalize=True)
  assert "max_bad" not in str(caught.value)
  assert not os.path.exists(f"{folder}/manifest.json")


@pytest.mark.parametrize(
  ("changes", "reason"),
  [({"seed": 1}, "seed: 0 -> 1"), ({"landmarks": "none"}, "input_crc32c")],
)
def test_tasks_of_another_plan_are_refused(make, changes, reason):
  make(num_tasks=2, task_index=0)
  for flags in ({"num_tasks": 2, "task_index": 1}, {"finalize": True}):
    with pytest.raises(errors.ConfigError, match=reason):
      make(**flags, **changes)


def test_all_tasks_together_may_skip_no_more_than_one_build(vggface2_dir, build_config):
  for path in sorted(vggface2_dir.glob("*/*.jpg"))[::2]:
    path.write_bytes(b"broken")
  for task in range(2):
    part = build_config(vggface2_dir, num_tasks=2, task_index=task, max_bad=3)
    assert build.main(part) == errors.ExitCode.DONE
  with pytest.raises(errors.DataError, match="4 images were unreadable in all tasks"):
    build.main(build_config(vggface2_dir, finalize=True, max_bad=3))
  config = build_config(vggface2_dir, finalize=True, max_bad=4)
  assert build.main(config) == errors.ExitCode.PARTIAL
  assert len(manifest.load(config.output_dir).skipped) == 4


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"finalize": True, "task_index": 1}, "--finalize concerns all shards"),
    ({"finalize": True, "only_shards": "1"}, "--finalize concerns all shards"),
    ({"num_tasks": 2, "only_shards": "1"}, "--num_tasks=2 and --only_shards exclude"),
  ],
)
def test_flags_that_contradict_each_other_are_refused(make, changes, reason):
  with pytest.raises(errors.UsageError, match=reason):
    make(**changes)


def test_a_verification_set_is_built_in_parts_too(lfw_dir, build_set):
  flags = {"dataset": "lfw", "num_shards": 3}
  whole = files_of(build_set(lfw_dir, output_dir="whole", **flags))
  for task in range(2):
    folder = build_set(lfw_dir, num_tasks=2, task_index=task, **flags)
  assert not os.path.exists(f"{folder}/pairs.npy")
  assert files_of(build_set(lfw_dir, finalize=True, **flags)) == whole


def test_tasks_that_write_the_same_part_at_once_do_no_harm_in_a_bucket(
  make, whole, bucket
):
  def build_part(task):
    return make(output_dir=f"{bucket}/shards", num_tasks=2, task_index=task)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(build_part, (0, 1, 0, 1)))
  assert files_of(make(output_dir=f"{bucket}/shards", finalize=True)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_tasks_killed_at_any_time_beside_others_of_the_same_part_change_nothing(
  vggface2_dir, build_config, build_set, bucket, where
):
  content = (vggface2_dir / "n000003" / "0001_01.jpg").read_bytes()
  for number in range(5, 200):
    (vggface2_dir / "n000003" / f"{number:04d}_01.jpg").write_bytes(content)
  num_shards, killed = (100, (0, 1, 0)) if where == "disk" else (16, (0, 1))
  flags = {"num_shards": num_shards, "image_list": "none", "landmarks": "none"}
  whole = files_of(build_set(vggface2_dir, output_dir="whole", **flags))
  flags |= {"num_tasks": 2, "num_processes": 2 if where == "disk" else 1}
  folder = "shards" if where == "disk" else f"{bucket}/shards"
  config = build_config(vggface2_dir, output_dir=folder, **flags)
  chance = random.Random(0)
  for task in killed:
    twins = [_start(config, task), _start(config, task)]
    _wait_for_markers(config, chance.randrange(1, num_shards // 8), twins)
    for twin in twins:
      time.sleep(chance.uniform(0, 0.05))
      twin.kill()
      _end(twin)
    _check_whole(config.output_dir)
  last = [_start(config, task) for task in (0, 1, 0, 1)]
  assert [_end(process) for process in last] == [0, 0, 0, 0]
  assert _end(_start(config, None)) == 0
  assert files_of(config.output_dir) == whole


def _start(config, task):
  """Starts the builder for a task, or for --finalize without one."""
  given = vars(config) | {"task_index": task, "finalize": task is None}
  flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
  command = [sys.executable, "-m", "tfrecords_tools.build", *flags]
  return subprocess.Popen(command, stderr=subprocess.PIPE)


def _end(process):
  """Returns a process's exit code; what it said is shown if a test fails."""
  _, said = process.communicate(timeout=120)
  print(said.decode())
  return process.returncode


def _wait_for_markers(config, more, processes):
  """Waits until so many more shards are done, or a process is."""
  folder = storage.join(config.output_dir, state.FOLDER)
  before = len(storage.list_names(folder))
  deadline = time.monotonic() + 120
  while len(storage.list_names(folder)) <= before + more:  # one is settings.json
    if any(process.poll() is not None for process in processes):
      return
    assert time.monotonic() < deadline
    time.sleep(0.002)


def _check_whole(folder):
  """What has a final name is whole."""
  names = set(storage.list_names(folder))
  for name in names:
    index = shard_index.index_name(name)
    if name.endswith(".tfrecord") and index in names:
      rows = shard_index.load(storage.join(folder, index))
      assert storage.size(storage.join(folder, name)) == rows["length"].sum()
