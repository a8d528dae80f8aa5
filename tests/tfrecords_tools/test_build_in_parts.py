import concurrent.futures
import itertools
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from facedist import errors, storage
from facedist.data.shards import manifest, shard_index
from tests.tfrecords_tools import folders
from tfrecords_tools import build, verify
from tfrecords_tools.builder import state

SHARDS = 7


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch):
  for name in list(os.environ):
    if name.startswith("SLURM_ARRAY_") or name == "JOB_COMPLETION_INDEX":
      monkeypatch.delenv(name)


@pytest.fixture
def whole(vggface2_dir, build_config, tmp_path):
  """The files of a build by one process."""
  config = build_config(
    vggface2_dir, output_dir=str(tmp_path / "whole"), num_shards=SHARDS
  )
  build.main(config)
  return folders.files_of(config.output_dir)


@pytest.fixture
def config(vggface2_dir, build_config):
  def make(**changes):
    return build_config(vggface2_dir, **({"num_shards": SHARDS} | changes))

  return make


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 9])
def test_any_number_of_tasks_in_any_order_gives_the_bytes_of_one(
  config, whole, num_tasks
):
  tasks = list(range(num_tasks))
  random.Random(0).shuffle(tasks)
  for task in tasks:
    if num_tasks > 1:
      assert not os.path.exists(os.path.join(config().output_dir, "manifest.json"))
    build.main(config(num_tasks=num_tasks, task_index=task))
  build.main(config(num_tasks=num_tasks, finalize=True))
  assert folders.files_of(config().output_dir) == whole
  assert list(verify.verify(config().output_dir, verify.Totals())) == []


def test_the_scheduler_says_which_task_this_is(config, whole, monkeypatch):
  for task in range(2):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    build.main(config())
  build.main(config(finalize=True))
  assert folders.files_of(config().output_dir) == whole


def test_a_part_that_is_done_is_left_alone(config, caplog):
  caplog.set_level("INFO", logger="absl")
  part = config(num_tasks=2, task_index=1)
  build.main(part)
  assert "task 1 of 2 is finished; after the last one say --finalize" in caplog.text
  times = folders.times_of(part.output_dir)
  build.main(part)
  assert "task 1 of 2 is finished; nothing to do" in caplog.text
  assert folders.times_of(part.output_dir) == times


def test_what_is_missing_is_named_by_shard_and_task(config, whole):
  for task in (0, 2):
    build.main(config(num_tasks=3, task_index=task))
  folder = pathlib.Path(config().output_dir)
  (folder / "train-00000-of-00007.tfrecord").write_bytes(b"cut")
  (folder / "train-00005-of-00007.index.npy").unlink()
  (folder / "train-00006-of-00007.tfrecord").unlink()
  marker = folder / ".build" / "train-00001-of-00007.json"
  marker.write_text(marker.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
  with pytest.raises(errors.DataError) as caught:
    build.main(config(num_tasks=3, finalize=True))
  message = str(caught.value)
  wanted = len(whole["train-00000-of-00007.tfrecord"])
  for part in (
    "lacks 6 of 7 shards",
    "train-00000-of-00007.tfrecord (task 0: train-00000-of-00007.tfrecord has 3 bytes, "
    f"not {wanted})",
    "train-00001-of-00007.tfrecord (task 0: of another build)",
    "train-00002-of-00007.tfrecord (task 1: not built)",
    "train-00003-of-00007.tfrecord (task 1: not built)",
    "train-00005-of-00007.tfrecord (task 2: without its index)",
    "train-00006-of-00007.tfrecord (task 2: missing)",
    "run tasks 0,1,2 again, then --finalize",
  ):
    assert part in message
  assert not (folder / "manifest.json").exists()
  for task in range(3):
    build.main(config(num_tasks=3, task_index=task))
  build.main(config(num_tasks=3, finalize=True))
  assert folders.files_of(folder) == whole


def test_many_missing_shards_are_counted(config):
  build.main(config(num_tasks=7, task_index=0))
  with pytest.raises(errors.DataError, match=r"lacks 6 of 7.*; build them, then"):
    build.main(config(finalize=True))


def test_a_folder_that_no_task_has_begun_cannot_be_finalized(config):
  with pytest.raises(errors.DataError, match="holds no build to finalize"):
    build.main(config(finalize=True))
  assert not os.path.exists(config().output_dir)


def test_a_verification_set_that_lacks_an_image_is_never_finalized(
  lfw_dir, build_config
):
  for task in range(2):
    build.main(build_config(lfw_dir, dataset="lfw", num_tasks=2, task_index=task))
  whole = build_config(lfw_dir, dataset="lfw", num_tasks=2, finalize=True)
  folder = pathlib.Path(whole.output_dir, state.FOLDER)
  (marker,) = folder.glob("images-00001-*.json")
  lost = '"skipped": [{"path": "Cher/Cher_0001.jpg", "reason": "it is cut off"}]'
  marker.write_text(marker.read_text().replace('"skipped": []', lost))
  with pytest.raises(errors.DataError, match="it is cut off; a ver") as caught:
    build.main(whole)
  assert "max_bad" not in str(caught.value)
  assert not os.path.exists(os.path.join(whole.output_dir, manifest.MANIFEST_NAME))


@pytest.mark.parametrize(
  ("changes", "reason"),
  [({"seed": 1}, "seed: 0 -> 1"), ({"landmarks": "none"}, "input_crc32c")],
)
def test_tasks_of_another_plan_are_refused(config, changes, reason):
  build.main(config(num_tasks=2, task_index=0))
  for flags in ({"num_tasks": 2, "task_index": 1}, {"finalize": True}):
    with pytest.raises(errors.ConfigError, match=reason):
      build.main(config(**flags, **changes))


def test_all_tasks_together_may_skip_no_more_than_one_build(config, vggface2_dir):
  for path in sorted(vggface2_dir.glob("*/*.jpg"))[::2]:
    path.write_bytes(b"broken")
  for task in range(2):
    part = config(num_tasks=2, task_index=task, max_bad=3)
    assert build.main(part) == errors.ExitCode.DONE
  with pytest.raises(errors.DataError, match="4 images were unreadable in all tasks"):
    build.main(config(finalize=True, max_bad=3))
  assert build.main(config(finalize=True, max_bad=4)) == errors.ExitCode.PARTIAL
  assert len(manifest.load(config().output_dir).skipped) == 4


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"finalize": True, "task_index": 1}, "--finalize concerns all shards"),
    ({"finalize": True, "only_shards": "1"}, "--finalize concerns all shards"),
    ({"num_tasks": 2, "only_shards": "1"}, "--num_tasks=2 and --only_shards exclude"),
  ],
)
def test_flags_that_contradict_each_other_are_refused(config, changes, reason):
  with pytest.raises(errors.UsageError, match=reason):
    build.main(config(**changes))


def test_a_verification_set_is_built_in_parts_too(lfw_dir, build_config, tmp_path):
  flags = {"dataset": "lfw", "num_shards": 3}
  one = build_config(lfw_dir, output_dir=str(tmp_path / "whole"), **flags)
  build.main(one)
  for task in range(2):
    build.main(build_config(lfw_dir, num_tasks=2, task_index=task, **flags))
  folder = build_config(lfw_dir, **flags).output_dir
  assert not os.path.exists(os.path.join(folder, "pairs.npy"))
  build.main(build_config(lfw_dir, finalize=True, **flags))
  assert folders.files_of(folder) == folders.files_of(one.output_dir)


def test_tasks_that_write_the_same_part_at_once_do_no_harm_in_a_bucket(
  config, whole, bucket
):
  changes = {"output_dir": f"{bucket}/shards", "num_tasks": 2}
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(
      pool.map(
        lambda task: build.main(config(task_index=task, **changes)), (0, 1, 0, 1)
      )
    )
  build.main(config(finalize=True, **changes))
  assert _contents(f"{bucket}/shards") == whole


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_tasks_killed_at_any_time_beside_others_of_the_same_part_change_nothing(
  vggface2_dir, build_config, tmp_path, bucket, where
):
  content = (vggface2_dir / "n000003" / "0001_01.jpg").read_bytes()
  for number in range(5, 200):
    (vggface2_dir / "n000003" / f"{number:04d}_01.jpg").write_bytes(content)
  num_shards, rounds = (100, 2) if where == "disk" else (16, 1)
  flags = {"num_shards": num_shards, "image_list": "none", "landmarks": "none"}
  one = build_config(vggface2_dir, output_dir=str(tmp_path / "whole"), **flags)
  build.main(one)
  folder = str(tmp_path / "shards") if where == "disk" else f"{bucket}/shards"
  config = build_config(vggface2_dir, num_tasks=2, output_dir=folder, **flags)
  chance = random.Random(0)
  for _, task in itertools.product(range(rounds), range(2)):
    twins = [_start(config, task), _start(config, task)]
    _wait_for_markers(config, chance.randrange(1, num_shards // 8), twins)
    for twin in twins:
      time.sleep(chance.uniform(0, 0.05))
      twin.kill()
      _end(twin)
    _check_whole(folder)
  last = [_start(config, task) for task in (0, 1, 0, 1)]
  assert [_end(process) for process in last] == [0, 0, 0, 0]
  assert _end(_start(config, None)) == 0
  assert _contents(folder) == folders.files_of(one.output_dir)


def _start(config, task):
  """Starts the builder for a task, or for --finalize without one."""
  given = vars(config) | {"task_index": task}
  given["finalize"] = task is None
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


def _contents(folder):
  """Every file's bytes by its path below a folder, local or in a bucket."""
  return {
    entry.path: storage.read_bytes(storage.join(folder, entry.path))
    for entry in storage.walk(folder)
  }


def _check_whole(folder):
  """What has a final name is whole."""
  names = set(storage.list_names(folder))
  for name in names:
    index = shard_index.index_name(name)
    if name.endswith(".tfrecord") and index in names:
      rows = shard_index.load(storage.join(folder, index))
      assert storage.size(storage.join(folder, name)) == rows["length"].sum()
