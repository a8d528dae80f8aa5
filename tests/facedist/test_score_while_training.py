"""Training with the evaluator beside it, in processes of their own, then embeddings."""

import json
import pathlib
import signal
import time

import numpy as np
import pytest

from facedist import errors
from facedist.data import noise, verification_set
from facedist.evaluation import verification
from tests import noise_sets, processes

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


def _rows(run: pathlib.Path) -> list[dict]:
  """Returns the rows by increasing step."""
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return sorted(map(json.loads, lines), key=lambda row: row["step"])


def _wait_for_first_score(run: pathlib.Path) -> None:
  deadline = time.monotonic() + SECONDS
  while not (run / "metrics.jsonl").exists() or not _rows(run):
    assert time.monotonic() < deadline, "the evaluator scored nothing"
    time.sleep(0.05)


@pytest.mark.slow
def test_two_evaluators_go_on_after_a_killed_one_and_embeddings_reproduce_the_scores(
  tmp_path: pathlib.Path,
):
  run, log, pairs = tmp_path / "run", tmp_path / "log", str(tmp_path / "pairs")
  noise.write_noise_verification_set(
    pairs, num_pairs=40, folds=10, image_size=32, seed=0
  )
  shards = tmp_path / "shards"
  noise_sets.write(shards, identities=4, images=4, val_images=1, size=32, shards=2)
  evaluating = (
    *("facedist.evaluate", f"--workdir={run}", f"--verification_data={pairs}"),
    "--poll_seconds=0.1",
  )
  killed = _start(tmp_path / "killed", *evaluating)
  flags = (
    *(f"--workdir={run}", f"--data_dir={shards}", "--backbone=speck"),
    *("--backbone_weights=none", "--embedding_size=16", "--global_batch=4"),
    *("--head_epochs=1", f"--full_epochs={STEPS[-1] / 4 - 1}", "--keep_last=10"),
    "--checkpoint_every_steps=5",
  )
  training = _start(tmp_path / "training", "facedist.train", *flags)
  _wait_for_first_score(run)
  killed.send_signal(signal.SIGKILL)
  _finish(killed, code=-signal.SIGKILL)
  for process in [_start(each, *evaluating) for each in (log, tmp_path / "second")]:
    _finish(process)
  _finish(training)
  rows, said = _rows(run), log.read_text()
  assert [row["step"] for row in rows] == STEPS, said
  assert "* best" in said
  assert "TF_CONFIG is ignored" in said

  one = tmp_path / "one"
  _finish(_start(one, *evaluating, f"--checkpoint={STEPS[-1]}"))
  (printed,) = [line for line in one.read_text().splitlines() if line[0] == "{"]
  assert json.loads(printed)["fold_accuracies"] == rows[-1]["fold_accuracies"]
  assert _rows(run) == rows

  output = tmp_path / "out.json"
  embedding = ("facedist.embed", f"--workdir={run}", f"--input={pairs}", "--mirror")
  _finish(_start(one, *embedding, f"--output={output}"))
  document = json.loads(output.read_text())
  assert (document["model"], document["step"]) == ("speck-16", STEPS[-1])
  opened = verification_set.load_verification_set(pairs)
  embeddings = np.array([entry["embedding"] for entry in document["embeddings"]])
  cosines = verification.cosine_scores(embeddings, opened.first, opened.second)
  again = verification.verify(cosines, opened.same, opened.folds)
  assert again.auc == pytest.approx(rows[-1]["auc"], abs=0.01)
  assert again.accuracy_mean == pytest.approx(rows[-1]["accuracy_mean"], abs=0.05)
