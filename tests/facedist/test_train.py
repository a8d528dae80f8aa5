"""facedist.train as a user runs it: processes, flags, exit codes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data.shards import shard_index
from facedist.distributed.detect import free_addresses
from facedist.training import metric_writer, workdir_lock
from facedist.training.checkpoint import checkpoints
from tests import files, noise_sets, processes
from tests.facedist.two_workers import SABOTAGE

pytestmark = pytest.mark.slow

# At a rate of 0.02 a step multiplies rounding by up to ten, and after twenty of them
# runs that only round differently are apart by more than any tolerance worth the name.
SMALL = (
  "--backbone=speck",
  "--backbone_weights=none",
  "--embedding_size=32",
  "--noembedding_batch_norm",
  "--dropout=0.2",
  "--global_batch=32",
  "--scale=16",
  "--head_epochs=0.3",
  "--head_rate=0.005",
  "--full_epochs=2",
  "--full_rate=0.005",
  "--clip_norm=5",
  "--augment_crop=0.1",
  "--augment_color=0.2",
  "--augment_cutout=0.25",
  "--log_every_steps=5",
  "--checkpoint_every_steps=10",
)
# Of the losses, after 21 such steps; another batch, draw or mask of dropout changes
# their second digit.
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
  folder = str(tmp_path_factory.mktemp("shards"))
  noise_sets.write(folder, identities=10, images=30, val_images=3, size=32, shards=3)
  return folder


def train(*flags: str, environment: dict[str, str] | None = None) -> str:
  """Runs the trainer to its end; returns its log."""
  result = processes.run("facedist.train", *flags, environment=environment)
  assert result.returncode == 0, result.stderr
  return result.stderr


def fails(*flags: str) -> tuple[int, str]:
  """Runs the trainer; returns exit code and the last line on stderr."""
  result = processes.run("facedist.train", *flags)
  return result.returncode, result.stderr.strip().splitlines()[-1]


def train_two_workers(*flags: str) -> None:
  """Runs two workers that form a cluster on loopback."""
  workers = {"worker": free_addresses(2)}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ended:
    started = []
    for index in range(2):
      task = {"cluster": workers, "task": {"type": "worker", "index": index}}
      log = pathlib.Path(folder) / str(index)
      process = processes.start(
        *("facedist.train", "--strategy=multiworker", *flags),
        log=log,
        environment={"TF_CONFIG": json.dumps(task)},
      )
      ended.callback(process.kill)
      started.append((process, log))
    for process, log in started:
      assert process.wait(300) == 0, log.read_text()


def losses(workdir: pathlib.Path | str) -> np.ndarray:
  """Returns the loss of every step, which must all be there."""
  steps, values = zip(*metric_writer.step_losses(str(workdir)), strict=True)
  assert list(steps) == list(range(len(steps)))
  return np.array(values)


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """One worker, batch 32, from start to end in one go."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  train(f"--data_dir={shards}", f"--workdir={workdir}", "--deterministic", *SMALL)
  return workdir


def test_a_run_leaves_config_logs_checkpoints_and_says_it_is_done(
  undisturbed: pathlib.Path,
):
  workdir = str(undisturbed)
  assert checkpoints.load_config(workdir).global_batch == 32
  total = len(losses(undisturbed))
  kept = [found.step for found in checkpoints.list_checkpoints(workdir)]
  assert kept == [10, 20, total]  # the newest three of 0, 10, 20 and the end
  assert checkpoints.is_done(workdir)
  assert list(undisturbed.glob("tensorboard/train/events*"))
  assert list(undisturbed.glob("tensorboard/validation/events*"))
  lines = (undisturbed / metric_writer.LOG_NAME).read_text().splitlines()
  validation = [json.loads(line) for line in lines if '"validation"' in line]
  assert [entry["samples"] for entry in validation] == [30]


def test_two_devices_have_the_losses_of_one(
  undisturbed: pathlib.Path, shards: str, tmp_path: pathlib.Path
):
  flags = (f"--data_dir={shards}", f"--workdir={tmp_path}", "--deterministic", *SMALL)
  result = processes.run(
    SABOTAGE, "two devices", "0", "--", "--strategy=mirrored", *flags
  )
  assert result.returncode == 0, result.stderr
  np.testing.assert_allclose(losses(tmp_path), losses(undisturbed), rtol=ROUNDING)


def test_a_run_in_a_bucket_goes_on_elsewhere_and_is_the_undisturbed_run_to_the_bit(
  undisturbed: pathlib.Path, shards: str, tmp_path: pathlib.Path, bucket: str
):
  workdir = f"{bucket}/runs/a"
  flags = (f"--data_dir={shards}", f"--workdir={workdir}", "--deterministic", *SMALL)
  resumed = ""
  for stop in (2, 13, 0):  # in the first phase, in the second, not at all
    machine = tmp_path / str(stop)  # each sees the bucket and a disk of its own
    machine.mkdir()
    environment = {"TMPDIR": str(machine)}
    log = train(*flags, f"--stop_after_steps={stop}", environment=environment)
    assert resumed in log
    assert checkpoints.is_done(workdir) == (not stop)
    assert not list(machine.rglob("step-*"))
    resumed = f"resumed step-{stop:08d}"
  np.testing.assert_array_equal(losses(workdir), losses(undisturbed))
  there, here = (
    checkpoints.list_checkpoints(str(folder)) for folder in (workdir, undisturbed)
  )
  assert [found.step for found in there] == [13, 20, here[-1].step]
  for name, facts in here[-1].marker()["files"].items():
    if "data" in name:  # every weight and slot, to the bit
      assert there[-1].marker()["files"][name] == facts
  events = storage.list_names(f"{workdir}/tensorboard/train")
  assert len([name for name in events if name.startswith("events")]) == 3


def test_two_workers_go_on_from_a_bucket_where_one_stopped(
  undisturbed: pathlib.Path, shards: str, bucket: str
):
  flags = (f"--data_dir={shards}", f"--workdir={bucket}/a", "--deterministic", *SMALL)
  train(*flags, "--stop_after_steps=7")
  train_two_workers(*flags)
  assert checkpoints.is_done(f"{bucket}/a")
  np.testing.assert_allclose(losses(f"{bucket}/a"), losses(undisturbed), rtol=ROUNDING)


def test_two_workers_that_stream_a_bucket_have_the_losses_of_one_that_reads_a_disk(
  shards: str, tmp_path: pathlib.Path, bucket: str
):
  blocks = ("--shuffle_block=8", "--streams=4", "--deterministic", *SMALL)
  train(f"--data_dir={shards}", f"--workdir={tmp_path}/staged", *blocks)
  for name in os.listdir(shards):
    storage.upload(os.path.join(shards, name), f"{bucket}/shards/{name}")
  train_two_workers(
    f"--data_dir={bucket}/shards",
    f"--workdir={tmp_path}/streamed",
    "--read_mode=stream",
    "--all_reduce_mb=0.01",  # gradients need more than one collective
    *blocks,
  )
  np.testing.assert_allclose(
    losses(tmp_path / "streamed"), losses(tmp_path / "staged"), rtol=ROUNDING
  )


def test_a_second_start_with_another_config_is_refused(
  undisturbed: pathlib.Path, shards: str
):
  code, line = fails(
    f"--data_dir={shards}", f"--workdir={undisturbed}", *SMALL, "--margin=0.1"
  )
  assert code == errors.ExitCode.CONFIG
  assert "margin: 0.35 -> 0.1" in line


def test_a_finished_run_started_again_trains_no_step(
  undisturbed: pathlib.Path, shards: str
):
  before = losses(undisturbed)
  log = train(f"--data_dir={shards}", f"--workdir={undisturbed}", *SMALL)
  assert "resumed" in log
  np.testing.assert_array_equal(losses(undisturbed), before)


def test_other_data_than_the_checkpoint_s_are_refused(
  undisturbed: pathlib.Path, tmp_path: pathlib.Path
):
  noise_sets.write(tmp_path, identities=10, images=30, size=32, seed=1)
  code, line = fails(f"--data_dir={tmp_path}", f"--workdir={undisturbed}", *SMALL)
  assert code == errors.ExitCode.DATA
  assert "not on these" in line


@pytest.fixture
def damaged(shards: str, tmp_path: pathlib.Path) -> pathlib.Path:
  """The shards with a byte changed in each of the first three of a shard's records."""
  folder = pathlib.Path(shutil.copytree(shards, tmp_path / "damaged"))
  shard = str(folder / "train-00000-of-00003.tfrecord")
  for row in shard_index.load(shard_index.index_name(shard))[:3]:
    files.flip_byte(shard, int(row["offset"]) + 100)
  return folder


def test_a_damaged_record_ends_the_run_with_its_place(
  damaged: pathlib.Path, tmp_path: pathlib.Path
):
  code, line = fails(f"--data_dir={damaged}", f"--workdir={tmp_path / 'run'}", *SMALL)
  assert code == errors.ExitCode.DATA
  assert re.search(
    r"train-00000-of-00003.tfrecord, record [012] at byte \d+: CRC", line
  )


def test_damaged_records_are_replaced_alike_by_one_worker_and_by_two(
  damaged: pathlib.Path, tmp_path: pathlib.Path
):
  flags = (f"--data_dir={damaged}", "--on_bad_record=skip", *SMALL)
  log = train(*flags, f"--workdir={tmp_path / 'one'}")
  train_two_workers(*flags, f"--workdir={tmp_path / 'two'}")
  alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
  np.testing.assert_allclose(alone, together, rtol=ROUNDING)
  for name in ("one", "two"):
    lines = (tmp_path / name / "train_metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    damaged_rows = sum(row["damaged"] for row in rows)
    assert damaged_rows in range(6, 10)  # 3 in each of 2.3 epochs
  assert len(re.findall(r"CRC mismatch.*Another record replaces it", log)) == 3
  assert re.search(r"[1-3] damaged replaced", log)


def test_more_damaged_records_than_allowed_end_the_run_though_it_was_resumed(
  damaged: pathlib.Path, tmp_path: pathlib.Path
):
  flags = (
    f"--data_dir={damaged}",
    f"--workdir={tmp_path / 'run'}",
    "--on_bad_record=skip",
    "--max_bad_records=2",
    *SMALL,
  )
  log = train(*flags, "--stop_after_steps=1")
  assert len(re.findall(r"Another record replaces it", log)) >= 1
  code, line = fails(*flags)
  assert code == errors.ExitCode.DATA
  assert "3 damaged records by step 1 of epoch 0" in line
  assert "--max_bad_records=2" in line


def test_a_second_chief_of_a_workdir_ends_before_it_writes(shards: str, bucket: str):
  workdir = f"{bucket}/run"
  lost: list[errors.ConfigError] = []
  with workdir_lock.held(
    workdir, on_loss=lost.append, grace_seconds=0, refresh_seconds=0.1
  ):
    code, line = fails(
      *(f"--data_dir={shards}", f"--workdir={workdir}", "--grace_seconds=1", *SMALL)
    )
  assert code == errors.ExitCode.CONFIG
  assert line.startswith(f"error: --workdir={workdir} is in use: process ")
  assert storage.list_names(workdir) == [workdir_lock.FOLDER_NAME]
  assert not lost


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ((), "--data_dir is required"),
    (("--data_dir=/nowhere",), "--workdir is required"),
    (("--data_dir=/nowhere", "--workdir=W"), "/nowhere/manifest.json does not exist"),
    (("--data_dir=D", "--workdir=gs://no/run"), "there is no bucket gs://no;"),
    (("--data_dir=D", "--workdir=W", "--head=x"), "choose one of adaface, arcface"),
  ],
)
def test_what_the_first_checks_find_is_one_line(
  flags: tuple[str, ...], says: str, shards: str, tmp_path: pathlib.Path, bucket: str
):
  code, line = fails(
    *(flag.replace("=D", f"={shards}").replace("=W", f"={tmp_path}") for flag in flags)
  )
  assert code in (errors.ExitCode.USAGE, errors.ExitCode.DATA)
  assert says in line
