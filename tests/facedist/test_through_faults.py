"""Training with a bucket whose requests fail: the same to the bit."""

import pathlib
from typing import Any

import numpy as np
import pytest

from facedist import storage
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
  """A folder on a disk with `shards` of random patterns."""
  folder = tmp_path_factory.mktemp("local")
  noise_sets.write(
    folder / "shards", identities=4, images=8, val_images=2, size=32, shards=5
  )
  return folder


@pytest.fixture
def data(bucket: buckets.Bucket, local: pathlib.Path) -> buckets.Bucket:
  """The bucket with the same `shards`."""
  for path, _ in storage.walk(str(local)):
    storage.upload(str(local / path), f"{bucket}/{path}")
  return bucket


def train(
  data: buckets.Bucket | pathlib.Path, workdir: str, cache: pathlib.Path, *others: str
) -> None:
  """Trains on a bucket's or a disk's shards, with a cache of its own."""
  given = (f"--data_dir={data}/shards", f"--workdir={workdir}", f"--cache_dir={cache}")
  trained = processes.run("facedist.train", *given, *SMALL, *others, timeout=280)
  assert trained.returncode == 0, trained.stderr


def outcome(workdir: str) -> dict:
  """Returns what a run has left: the loss of every step, the last checkpoint's data."""
  newest = checkpoints.list_checkpoints(workdir)[-1].marker()["files"]
  return {
    "losses": list(metric_writer.step_losses(workdir)),
    "weights": {name: facts for name, facts in newest.items() if "data" in name},
  }


@pytest.mark.parametrize(("mode", "seed"), [("stage", 1), ("stream", 3)])
def test_a_run_through_faults_is_the_undisturbed_run_to_the_bit(
  data: buckets.Bucket,
  local: pathlib.Path,
  tmp_path: pathlib.Path,
  mode: str,
  seed: int,
):
  undisturbed, cache = str(tmp_path / "undisturbed"), tmp_path / "cache"
  order = READING[mode][1:] if mode == "stream" else ()  # a bucket alone is streamed
  train(local, undisturbed, cache, *order)
  expected = outcome(undisturbed)
  assert len(expected["losses"]) >= 10
  assert all(np.isfinite(loss) for _, loss in expected["losses"])
  data.traffic.clear()
  data.faults.rate(0.1, seed=seed)
  train(data, f"{data}/run", cache, *READING[mode])
  assert data.traffic.faults().total() > 0
  data.faults.clear()
  assert outcome(f"{data}/run") == expected


FORBIDDEN = {"status": 403, "message": "not yours"}
OUT_OF_ORDER = {  # only the content of shards, so that the first checks find all well
  "status": 503,
  "matching": "gs://faces/shards/*.tfrecord",
  "content_only": True,
}


@pytest.mark.parametrize(
  ("fault", "mode", "code", "said"),
  [
    (FORBIDDEN, "stage", 4, "permission denied (403 not yours)"),
    (OUT_OF_ORDER, "stage", 145, "no success in 2 s and "),
    (OUT_OF_ORDER, "stream", 145, "no success in 2 s and "),
  ],
)
def test_a_run_whose_bucket_fails_ends_in_one_line(
  data: buckets.Bucket,
  tmp_path: pathlib.Path,
  fault: dict[str, Any],
  mode: str,
  code: int,
  said: str,
):
  data.faults.always(**fault)
  failed = processes.run(
    "facedist.train",
    f"--data_dir={data}/shards",
    f"--workdir={tmp_path}/run",
    f"--cache_dir={tmp_path}/cache",
    "--storage_deadline_seconds=2",
    *(*SMALL, *READING[mode]),
  )
  assert failed.returncode == code, failed.stderr
  last = failed.stderr.strip().splitlines()[-1]
  assert last.startswith("error: gs://faces/shards/")
  assert said in last
  assert "Traceback" not in failed.stderr
