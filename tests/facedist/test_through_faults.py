"""Training and evaluation with a bucket whose requests fail: the same to the bit."""

import json
import pathlib
import subprocess

import numpy as np
import pytest

from facedist import storage
from facedist.data import noise
from facedist.training import metric_writer
from facedist.training.checkpoint import checkpoints
from tests import buckets, noise_sets, processes

pytestmark = pytest.mark.slow

SMALL = (
  "--backbone=speck",
  "--backbone_weights=none",
  "--embedding_size=16",
  "--global_batch=8",
  "--head_epochs=0",
  "--full_epochs=3",
  "--log_every_steps=3",
  "--checkpoint_every_steps=6",
  "--deterministic",
)
READING = {
  "stage": ("--read_mode=stage", "--cache_gb=1"),
  "stream": ("--read_mode=stream", "--shuffle_block=2", "--streams=8"),
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder on a disk with `shards` and `pairs` of random patterns."""
  folder = tmp_path_factory.mktemp("local")
  noise_sets.write(
    folder / "shards", identities=4, images=8, val_images=2, size=32, shards=5
  )
  noise.write_noise_verification_set(
    str(folder / "pairs"), num_pairs=40, folds=10, image_size=32, seed=0
  )
  return folder


@pytest.fixture
def data(bucket: buckets.Bucket, local: pathlib.Path) -> buckets.Bucket:
  """The bucket with the same `shards` and `pairs`."""
  for path, _ in storage.walk(str(local)):
    storage.upload(str(local / path), f"{bucket}/{path}")
  return bucket


@pytest.fixture(scope="module")
def undisturbed(
  local: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
  """The workdir of a run on the disk's shards, for the order of each way to read."""
  folder = tmp_path_factory.mktemp("undisturbed")
  for mode, flags in READING.items():
    order = flags[1:] if mode == "stream" else ()  # a stream is of a bucket alone
    train(local, str(folder / mode), folder / "cache", *order)
  return {mode: str(folder / mode) for mode in READING}


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
  """Runs a command of facedist to its end."""
  return processes.run(f"facedist.{module}", *flags, timeout=280)


def train(
  data: buckets.Bucket | pathlib.Path, workdir: str, cache: pathlib.Path, *others: str
) -> None:
  """Trains on a bucket's or a disk's shards, with a cache of its own."""
  given = (f"--data_dir={data}/shards", f"--workdir={workdir}", f"--cache_dir={cache}")
  trained = run("train", *given, *SMALL, *others)
  assert trained.returncode == 0, trained.stderr


def outcome(workdir: str) -> dict:
  """Returns what a run has left: the loss of every step, the last checkpoint's data."""
  newest = checkpoints.list_checkpoints(workdir)[-1].marker()["files"]
  return {
    "losses": list(metric_writer.step_losses(workdir)),
    "weights": {name: facts for name, facts in newest.items() if "data" in name},
  }


def brought_here(folder: str, local: pathlib.Path) -> str:
  """Copies all files below a folder in a bucket; returns the copy's path."""
  for path, _ in storage.walk(folder):
    storage.download(f"{folder}/{path}", str(local / path))
  return str(local)


def scores(data: str, workdir: str, cache: pathlib.Path) -> list[tuple]:
  """Scores the checkpoints, as if none were scored, on the pairs in the bucket."""
  pathlib.Path(workdir, "metrics.jsonl").unlink(missing_ok=True)
  pairs = (f"--verification_data={data}/pairs", f"--cache_dir={cache}")
  scored = run("evaluate", f"--workdir={workdir}", *pairs, "--once")
  assert scored.returncode == 0, scored.stderr
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [(row["step"], row["fold_accuracies"], row["auc"]) for row in rows]


@pytest.mark.parametrize(("mode", "seed"), [("stage", 1), ("stream", 3)])
def test_a_run_through_faults_is_the_undisturbed_run_to_the_bit(
  data: buckets.Bucket,
  undisturbed: dict[str, str],
  tmp_path: pathlib.Path,
  mode: str,
  seed: int,
):
  expected = outcome(undisturbed[mode])
  assert len(expected["losses"]) >= 10
  assert all(np.isfinite(loss) for _, loss in expected["losses"])
  data.traffic.clear()
  data.faults.rate(0.1, seed=seed)
  train(data, f"{data}/run", tmp_path / "cache", *READING[mode])
  assert data.traffic.faults().total() > 0
  data.faults.clear()
  assert outcome(brought_here(f"{data}/run", tmp_path / "disturbed")) == expected


def test_scores_of_a_set_read_through_faults_are_the_same(
  data: buckets.Bucket, undisturbed: dict[str, str], tmp_path: pathlib.Path
):
  workdir = undisturbed["stage"]
  expected = scores(data, workdir, tmp_path / "cache0")
  assert len(expected) > 1
  data.traffic.clear()
  data.faults.rate(0.3, seed=1)
  assert scores(data, workdir, tmp_path / "cache1") == expected
  assert data.traffic.faults().total() > 0


@pytest.mark.parametrize(
  ("status", "code", "said"),
  [
    (403, 4, "permission denied (403 not yours); give the account a role"),
    (503, 145, "no success in 2 s and "),
  ],
)
def test_a_run_whose_bucket_fails_ends_in_one_line(
  data: buckets.Bucket, tmp_path: pathlib.Path, status: int, code: int, said: str
):
  data.faults.always(status=status, message="not yours")
  assert said in end_of_training(data, tmp_path, code=code)


@pytest.mark.parametrize("mode", READING)
def test_a_bucket_that_fails_while_training_asks_for_a_restart(data, tmp_path, mode):
  shards = "gs://faces/shards/*.tfrecord"  # whose sizes the checks before may ask for
  data.faults.always(status=503, matching=shards, content_only=True)
  line = end_of_training(data, tmp_path, *READING[mode], code=145)
  assert "no success in 2 s and " in line


def end_of_training(data, folder: pathlib.Path, *others: str, code: int) -> str:
  """Trains from a bucket that fails; returns the one line that it ends with."""
  failed = run(
    "train",
    f"--data_dir={data}/shards",
    f"--workdir={folder}/run",
    f"--cache_dir={folder}/cache",
    "--storage_deadline_seconds=2",
    *SMALL,
    *others,
  )
  assert failed.returncode == code, failed.stderr
  last = failed.stderr.strip().splitlines()[-1]
  assert last.startswith("error: gs://faces/shards/")
  assert "Traceback" not in failed.stderr
  return last
