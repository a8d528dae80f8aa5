"""Training with the evaluator beside it, in processes of their own, then embeddings."""

import dataclasses
import json
import pathlib
import signal
import time

import numpy as np
import pytest

from facedist import errors, storage
from facedist.data import noise, verification_set
from facedist.evaluation import verification
from facedist.training.checkpoint import checkpoints
from tests import buckets, noise_sets, processes

SECONDS = 300  # far more than any of these processes needs, however busy the machine
STEPS = [0, 5, 10, 15]


def _start(log: pathlib.Path, module: str, *flags: str) -> processes.Process:
  """Starts a command as a scheduler would that sets TF_CONFIG for the evaluator too."""
  cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "evaluator"}}
  environment = (
    {"TF_CONFIG": json.dumps(cluster)} if module == "facedist.evaluate" else {}
  )
  return processes.start(module, *flags, log=log, environment=environment)


def _finish(process: processes.Process, *, code: int = errors.ExitCode.DONE) -> None:
  """Waits for a process, which must end with that code."""
  try:
    assert process.wait(SECONDS) == code
  finally:
    process.kill()


def _rows(run: pathlib.Path | str) -> list[dict]:
  """Returns the rows by increasing step."""
  content = storage.read_bytes(storage.join(str(run), "metrics.jsonl"))
  rows = [json.loads(line) for line in content.decode().splitlines()]
  return sorted(rows, key=lambda row: int(row["step"]))


def _wait_for_first_score(run: pathlib.Path) -> None:
  deadline = time.monotonic() + SECONDS
  while not (run / "metrics.jsonl").exists() or not _rows(run):
    assert time.monotonic() < deadline, "the evaluator scored nothing"
    time.sleep(0.05)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """Folders of `pairs` and `shards`, of random patterns."""
  made = {name: str(tmp_path_factory.mktemp(name)) for name in ("pairs", "shards")}
  noise.write_noise_verification_set(
    made["pairs"], num_pairs=40, folds=10, image_size=32, seed=0
  )
  noise_sets.write(
    made["shards"], identities=4, images=4, val_images=1, size=32, shards=2
  )
  return made


def _evaluating(run: pathlib.Path | str, sets: dict[str, str]) -> tuple[str, ...]:
  return (
    "facedist.evaluate",
    f"--workdir={run}",
    f"--verification_data={sets['pairs']}",
    "--poll_seconds=0.1",
  )


def _training(run: pathlib.Path | str, sets: dict[str, str]) -> tuple[str, ...]:
  return (
    "facedist.train",
    f"--workdir={run}",
    f"--data_dir={sets['shards']}",
    "--backbone=tinynet",
    "--backbone_weights=none",
    "--embedding_size=16",
    "--global_batch=4",
    "--head_epochs=1",
    f"--full_epochs={STEPS[-1] / 4 - 1}",
    "--checkpoint_every_steps=5",
    "--keep_last=10",
    "--deterministic",
  )


@dataclasses.dataclass(frozen=True)
class Scored:
  """A run on a disk, scored while it trained; what its last evaluator wrote."""

  run: pathlib.Path
  log: str


@pytest.fixture(scope="module")
def scored(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Scored:
  """Such a run: its first evaluator was killed, and two divided the rest."""
  folder = tmp_path_factory.mktemp("scored")
  run, log = folder / "run", folder / "log"
  evaluating = _evaluating(run, sets)
  evaluator = _start(folder / "killed", *evaluating)
  training = _start(folder / "training", *_training(run, sets))
  _wait_for_first_score(run)
  evaluator.send_signal(signal.SIGKILL)
  _finish(evaluator, code=-signal.SIGKILL)
  both = [_start(each, *evaluating) for each in (log, folder / "second")]
  for process in both:
    _finish(process)
  _finish(training)
  return Scored(run, log.read_text())


def _scores(run: pathlib.Path | str) -> list[tuple]:
  """Returns step, accuracy of each fold and AUC of each checkpoint."""
  return [(row["step"], row["fold_accuracies"], row["auc"]) for row in _rows(run)]


@pytest.mark.slow
def test_a_killed_evaluator_goes_on_and_embeddings_reproduce_its_scores(
  scored: Scored, sets: dict[str, str], tmp_path: pathlib.Path
):
  run, evaluating = scored.run, _evaluating(scored.run, sets)
  rows = _rows(run)
  assert [row["step"] for row in rows] == STEPS, scored.log
  assert "* best" in scored.log
  assert "TF_CONFIG is ignored" in scored.log

  log = tmp_path / "log"
  _finish(_start(log, *evaluating, f"--checkpoint={STEPS[-1]}"))
  (printed,) = [line for line in log.read_text().splitlines() if line[0] == "{"]
  assert json.loads(printed)["fold_accuracies"] == rows[-1]["fold_accuracies"]
  assert _rows(run) == rows

  embedding = (
    "facedist.embed",
    f"--workdir={run}",
    f"--input={sets['pairs']}",
    "--mirror",
  )
  _finish(_start(log, *embedding, f"--output={tmp_path}/out.json"))
  document = json.loads((tmp_path / "out.json").read_text())
  assert document["model"] == "tinynet-16"
  assert document["step"] == STEPS[-1]
  entries = document["embeddings"]
  opened = verification_set.load_verification_set(sets["pairs"])
  cosines = verification.cosine_scores(
    np.array([entry["embedding"] for entry in entries]), opened.first, opened.second
  )
  again = verification.verify(cosines, opened.same, opened.folds)
  assert again.auc == pytest.approx(rows[-1]["auc"], abs=0.01)
  assert again.accuracy_mean == pytest.approx(rows[-1]["accuracy_mean"], abs=0.05)


@pytest.mark.slow
def test_a_bucket_whose_requests_fail_gives_training_and_evaluator_the_same_scores(
  scored: Scored,
  sets: dict[str, str],
  tmp_path: pathlib.Path,
  bucket: buckets.Bucket,
):
  run, log = f"{bucket}/run", tmp_path / "log"
  bucket.faults.rate(0.1, seed=2, delay_seconds=0.1)
  started = [
    _start(log, *_evaluating(run, sets)),
    _start(tmp_path / "training", *_training(run, sets)),
  ]
  for process in started:
    _finish(process)
  assert bucket.traffic.faults().total() > 0
  bucket.faults.clear()
  assert [row["step"] for row in _rows(run)] == STEPS, log.read_text()
  assert _scores(run) == _scores(scored.run)
  assert "* best" in log.read_text()
  assert checkpoints.is_done(run)
  assert [found.step for found in checkpoints.list_checkpoints(run)] == STEPS
