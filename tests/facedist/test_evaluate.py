"""The evaluator on runs of linear networks: order, restarts, several sets, errors."""

import dataclasses
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import google_crc32c
import numpy as np
import pytest

from facedist import config, errors, evaluate, storage
from facedist.data import noise, verification_set
from facedist.data.shards import manifest
from facedist.data.verification_set import VerificationSet
from facedist.evaluation import evaluator, explain, report
from facedist.evaluation.evaluator import Scorer, ScoreSettings
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from tests import files, processes
from tests.facedist import pixel_runs

SIZE = pixel_runs.SIZE
FLOATS = SIZE * SIZE * 3 // 16
# Every fourth pixel of every fourth row, less their mean.
PATTERN = np.zeros((SIZE, SIZE, 3, FLOATS), np.float32)
PATTERN[::4, ::4] = np.eye(FLOATS).reshape(SIZE // 4, SIZE // 4, 3, FLOATS)
PATTERN = PATTERN.reshape(-1, FLOATS)
PATTERN -= PATTERN.mean(axis=1, keepdims=True)
# All images as one direction.
NOTHING = np.zeros_like(PATTERN)
NOTHING[:, 0] = 1


@pytest.fixture(scope="module", autouse=True)
def _backbone() -> Iterator[None]:
  with pixel_runs.backbone():
    yield


@pytest.fixture(autouse=True)
def _quick_picture(monkeypatch) -> None:
  """Leaves out the drawing, which has tests of its own and takes most of the time."""
  monkeypatch.setattr(report, "picture", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A verification set of 20 pairs of random patterns."""
  folder = str(tmp_path_factory.mktemp("pairs"))
  noise.write_noise_verification_set(
    folder, num_pairs=20, folds=5, image_size=SIZE, seed=0
  )
  return folder


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> str:
  """A run that has started and saved nothing yet."""
  return pixel_runs.start(tmp_path / "run", embedding_size=FLOATS)


def _save(workdir: str, *steps: int, alignment: str | None = None) -> None:
  """Saves networks that tell patterns apart; that of step 2 does not."""
  for step in steps:
    kernel = NOTHING if step == 2 else PATTERN
    pixel_runs.save(workdir, step, kernel=kernel, alignment=alignment)


def _settings(workdir: str, pairs: str, **others) -> evaluate.EvaluateConfig:
  quick = {"poll_seconds": 0.01, "batch_size": 16, "report": False} | others
  return evaluate.EvaluateConfig(workdir=workdir, verification_data=pairs, **quick)


class Watched(Scorer):
  """Keeps the steps that it loads, and calls a function before each."""

  def __init__(
    self,
    settings: evaluate.EvaluateConfig,
    before: Callable[[int], object] = lambda step: None,
  ):
    sets = verification_set.load_verification_sets(
      settings.verification_data, "cache", cache_gb=0
    )
    super().__init__(sets, config.subset(ScoreSettings, settings))
    self.before, self.loaded = before, []

  def load(self, checkpoint: checkpoints.Checkpoint) -> None:
    self.before(checkpoint.step)
    super().load(checkpoint)
    self.loaded.append(checkpoint.step)


def _rows(workdir: str, name: str = "metrics.jsonl") -> list[dict]:
  return [json.loads(line) for line in storage.open_lines(f"{workdir}/{name}")]


def _steps(workdir: str) -> list[int]:
  """Returns the steps in the order of their scores."""
  return [row["step"] for row in _rows(workdir)]


def test_another_alignment_than_in_training_is_a_warning_or_an_error_with_both(
  workdir, pairs, tmp_path, caplog
):
  pairs = str(shutil.copytree(pairs, tmp_path / "pairs"))
  alignment = {"template": "centre_crop", "images": {"centre_crop": 40}}
  cut = dataclasses.replace(manifest.load(pairs), alignment=alignment)
  manifest.save(cut, pairs)
  _save(workdir, 1, alignment="arcface")
  for options in ({"checkpoint": "1"}, {"once": True}):
    with pytest.raises(errors.DataError, match="or leave out --strict_alignment"):
      evaluate.main(_settings(workdir, pairs, strict_alignment=True, **options))
  assert evaluate.main(_settings(workdir, pairs, once=True)) == errors.ExitCode.DONE
  assert "images aligned by centre_crop" in caplog.text
  assert "trained on images aligned by arcface" in caplog.text


def test_scores_by_group_come_with_the_flag(workdir, pairs, tmp_path):
  names = verification_set.load_verification_set(pairs).read_names()
  groups = tmp_path / "groups.csv"
  lines = [f"{name},{'ab'[n // 20]}" for n, name in enumerate(names)]
  groups.write_text("\n".join(lines))
  _save(workdir, 1)
  settings = _settings(workdir, pairs, once=True, groups=str(groups))
  assert evaluate.main(settings) == errors.ExitCode.DONE
  found = _rows(workdir)[0]["by_group"]
  of_groups = [
    (each["group"], each["num_pairs"], each["accuracy"]) for each in found["groups"]
  ]
  assert of_groups == [("a", 10, 1.0), ("b", 10, 1.0)]
  assert (found["far_limits"], found["largest_tar_gaps"]) == ([0.1], [0.0])


def test_every_checkpoint_is_scored_in_step_order(workdir, pairs, capsys):
  _save(workdir, 3, 1, 2)
  checkpoints.mark_done(workdir, step=3)
  load = mock.Mock(wraps=inference.load_network)
  with mock.patch.object(inference, "load_network", load):
    assert evaluate.main(_settings(workdir, pairs)) == errors.ExitCode.DONE
  assert load.call_count == 1  # one network takes the weights of all checkpoints
  rows = _rows(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3]
  # Patterns of one identity are alike, and a network that says nothing guesses: all
  # pairs score 1, so all are classified alike.
  assert [row["accuracy_mean"] for row in rows] == [1.0, 0.5, 1.0]
  # FAR 1e-1 allows one of 10 different pairs; where all scores tie, none is accepted.
  tars = [(at["far"], at["tar"]) for row in rows for at in row["tar_at_far"]]
  assert tars == [(0.1, 1.0), (0.1, 0.0), (0.1, 1.0)]
  first = {"set": "noise", "images": 40, "mirrored": True}
  assert rows[0].items() >= (first | {"checkpoint": "step-00000001"}).items()
  assert "* best" in capsys.readouterr().out.splitlines()[1]
  assert list(pathlib.Path(workdir, "tensorboard", "evaluation").iterdir())
  assert not os.listdir(os.path.join(checkpoints.folder(workdir), "holds"))


def test_a_row_says_what_it_was_computed_from_and_with(workdir, pairs):
  _save(workdir, 1, alignment="arcface")
  evaluate.main(_settings(workdir, pairs, once=True))
  made = verification_set.load_verification_set(pairs)
  images = made.read(np.arange(40))  # in one batch, not three
  assert images.shape == (40, SIZE, SIZE, 3)
  saved = sorted(checkpoints.at(workdir, 1).marker()["files"].items())
  checksums = json.dumps([facts["crc32c"] for _, facts in saved]).encode()
  found = _rows(workdir)[0]["provenance"]
  versions = found.pop("versions")
  assert versions["numpy"] == np.__version__
  assert set(versions) == {"facedist", "tensorflow", "python", "numpy", "simplejpeg"}
  assert found.pop("device")
  hashed = {
    "pairs_crc32c": np.load(os.path.join(pairs, "pairs.npy")).tobytes(),
    "images_crc32c": images.tobytes(),
    "identities_crc32c": made.labels.tobytes(),
    "weights_crc32c": checksums,
  }
  for name, content in hashed.items():
    assert found.pop(name) == f"{google_crc32c.value(content):08x}", name
  assert found.pop("fingerprint") == made.fingerprint
  assert found.pop("alignment") == made.alignment
  text = """{
    "set": "noise", "groups_crc32c": null, "model": "pixels-48",
    "checkpoint": "step-00000001", "step": 1, "weights": "trained",
    "embedding_size": 48, "image_size": 16, "normalized": true, "mirrored": true,
    "pixel_normalization": "x", "policy": "float32", "training_data": null,
    "training_alignment": "arcface", "batch_size": 16
  }"""
  assert found == json.loads(text)


def _with_another_pixel(pair_set: VerificationSet) -> VerificationSet:
  """Changes one value of image 7."""

  def read(numbers: np.ndarray) -> np.ndarray:
    images = pair_set.read(numbers).copy()
    images[numbers == 7, 3, 4, 1] ^= 1
    return images

  return dataclasses.replace(pair_set, read=read)


@pytest.mark.parametrize(
  ("change", "mirror", "reasons"),
  [
    (None, True, []),
    (_with_another_pixel, True, ["The images differ in their pixels: the files and"]),
    (None, False, ["A embeds each image together with its mirror"]),
  ],
)
def test_what_was_changed_between_two_scores_of_the_same_weights_is_explained(
  workdir, pairs, change, mirror, reasons
):
  _save(workdir, 1)
  (pair_set,) = verification_set.load_verification_sets(pairs, "cache", cache_gb=0)

  def score(pair_set: VerificationSet, *, mirror: bool) -> dict:
    settings = ScoreSettings(workdir, mirror=mirror, weights="auto", batch_size=16)
    scorer = Scorer((pair_set,), settings)
    scorer.load(evaluator.find_checkpoint(workdir, "1"))
    return scorer.score(scorer.embed(pair_set)).row

  changed = change(pair_set) if change else pair_set
  before, after = score(pair_set, mirror=True), score(changed, mirror=mirror)
  found = explain.explain(before, after)
  assert len(found.differs) == len(reasons), found.differs
  for said, start in zip(found.differs, reasons, strict=True):
    assert said.startswith(start)
  assert not found.unknown


def test_two_files_are_explained_without_a_run_and_other_numbers_of_files_are_refused(
  workdir, pairs, tmp_path, capsys
):
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, checkpoint="1"))
  path = tmp_path / "a.json"
  path.write_text(capsys.readouterr().out)
  done = processes.run("facedist.evaluate", "--explain", str(path), str(path))
  assert done.returncode == errors.ExitCode.DONE
  assert f"B: noise, step 1, of {path}" in done.stderr  # which has all output
  assert "the figures are equal" in done.stderr
  with pytest.raises(SystemExit) as ended:
    explain.run([f"--explain={path}"])
  assert ended.value.code == errors.ExitCode.USAGE
  assert capsys.readouterr().err == (
    "error: --explain needs two files, not 1; write --explain A.json B.json.\n"
  )


def test_a_restart_scores_nothing_twice_and_repairs_a_torn_line(workdir, pairs):
  settings = _settings(workdir, pairs, once=True)
  _save(workdir, 1, 3)
  evaluate.main(settings)
  path = pathlib.Path(workdir, "metrics.jsonl")
  first, second = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + second[:50])
  _save(workdir, 5)
  again = Watched(settings)
  evaluate.score_run(settings, again)
  assert _steps(workdir) == [1, 3, 5]
  assert again.loaded == [3, 5]


def test_two_sets_are_scored_with_each_checkpoint(workdir, pairs, tmp_path, capsys):
  other = str(tmp_path / "other")
  noise.write_noise_verification_set(
    other, num_pairs=12, folds=2, image_size=SIZE, seed=5
  )
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  both = _settings(workdir, f"{pairs}, {other}", once=True)
  evaluate.main(both)
  names = ["noise", os.path.basename(pairs), "other"]
  assert [row["set"] for row in _rows(workdir)] == names
  assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["mean", "1"]
  again = Watched(both)
  evaluate.score_run(both, again)
  assert (len(_rows(workdir)), again.loaded) == (3, [])


@pytest.mark.parametrize(
  ("given", "names"),
  [
    ("lfw=PAIRS,PAIRS", ["lfw", "noise"]),
    ("lfw=PAIRS,cfp_fp=PAIRS,PAIRS", ["lfw", "cfp_fp", "noise"]),
    ("lfw=./a=b", ["lfw"]),
    ("./a=b,./d", ["a=b", "d"]),  # of the same data set
    ("a=b", ["noise"]),  # exists
    ("c=a=b", ["c"]),
    ("d, e", ["noise"]),  # exists
  ],
)
def test_sets_have_the_names_that_they_are_given(
  pairs, given, names, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for other in ("a=b", "d", "d, e"):
    os.symlink(pairs, other)
  sets = evaluate.load_verification_sets(
    given.replace("PAIRS", pairs), "cache", cache_gb=0
  )
  assert [each.name for each in sets] == names


def test_the_average_is_scored_where_the_run_keeps_one_and_beside_the_trained_weights(
  workdir, pairs
):
  pixel_runs.start(workdir, embedding_size=FLOATS, ema_decay=0.9)
  pixel_runs.save(workdir, 1, kernel=NOTHING, average=PATTERN)
  for weights in ("auto", "ema", "trained"):
    evaluate.main(_settings(workdir, pairs, once=True, weights=weights))
  scores = [(row["weights"], row["accuracy_mean"]) for row in _rows(workdir)]
  assert scores == [("ema", 1.0), ("trained", 0.5)]  # auto was ema, not scored twice
  boards = sorted(os.listdir(os.path.join(workdir, "tensorboard")))
  assert boards == ["evaluation", "evaluation_ema"]


def test_the_average_of_a_run_that_keeps_none_is_refused(workdir, pairs):
  _save(workdir, 1)
  with pytest.raises(errors.UsageError, match=r"keeps no average .*--weights=trained"):
    evaluate.main(_settings(workdir, pairs, once=True, weights="ema"))


def test_one_checkpoint_is_printed_and_nothing_written(workdir, pairs, capsys):
  _save(workdir, 1, 3)
  evaluate.main(_settings(workdir, pairs, checkpoint="3"))
  (line,) = capsys.readouterr().out.splitlines()
  assert json.loads(line).items() >= {"step": 3, "accuracy_mean": 1.0}.items()
  assert sorted(os.listdir(workdir)) == ["checkpoints", "config.json"]


def test_it_waits_for_training_and_follows_it_to_its_end(workdir, tmp_path, pairs):
  _save(workdir, 0, 1)
  checkpoints.mark_done(workdir, step=1)
  run = str(tmp_path / "later")
  training = threading.Timer(0.2, lambda: os.rename(workdir, run))
  training.start()
  assert evaluate.main(_settings(run, pairs)) == errors.ExitCode.DONE
  training.join()
  assert _steps(run) == [0, 1]


def test_a_run_that_never_starts_is_given_up(tmp_path, pairs):
  settings = _settings(str(tmp_path / "never"), pairs, start_timeout_seconds=0.05)
  with pytest.raises(errors.DataError, match=r"config.json did not appear within 0.05"):
    evaluate.main(settings)


def test_training_that_saves_nothing_more_is_given_up(workdir, pairs):
  _save(workdir, 1)
  with pytest.raises(errors.DataError, match="no new checkpoint within"):
    evaluate.main(_settings(workdir, pairs, idle_timeout_seconds=0.05))
  assert _steps(workdir) == [1]


def test_a_corrupt_checkpoint_is_named_and_the_others_are_scored(
  workdir, pairs, caplog
):
  _save(workdir, 3, 4, 5)
  files.flip_byte(f"{checkpoints.at(workdir, 4).path}.index", 9)
  checkpoints.mark_done(workdir, step=5)
  assert evaluate.main(_settings(workdir, pairs)) == errors.ExitCode.PARTIAL
  assert _steps(workdir) == [3, 5]
  assert "step-00000004.index is corrupt" in caplog.text


def test_a_bucket_that_refuses_a_checkpoint_ends_the_evaluator(workdir, pairs, bucket):
  _save(workdir, 3, 4)
  checkpoints.mark_done(workdir, step=4)
  for entry in storage.walk(workdir):
    storage.upload(f"{workdir}/{entry.path}", f"{bucket}/run/{entry.path}")
  bucket.faults.always(status=403, matching="*step-00000004.index", content_only=True)
  with pytest.raises(errors.AccessError, match=r"permission denied"):
    evaluate.main(_settings(f"{bucket}/run", pairs))


def test_a_checkpoint_deleted_while_it_is_loaded_is_recorded_as_missed(
  workdir, pairs, capsys
):
  def delete(step: int) -> None:
    if step == 4:
      checkpoints.remove(checkpoints.at(workdir, 4))

  _save(workdir, 3, 4, 5)
  checkpoints.mark_done(workdir, step=5)
  settings = _settings(workdir, pairs)
  done = evaluate.score_run(settings, Watched(settings, delete))
  assert done == errors.ExitCode.DONE
  assert _steps(workdir) == [3, 5]
  assert capsys.readouterr().out.splitlines()[-1] == "noise: steps 4 missed"


def test_with_latest_the_newest_is_scored_and_the_others_stay_skipped_until_asked_for(
  workdir, pairs, capsys
):
  _save(workdir, 1, 2, 3)
  latest = _settings(workdir, pairs, once=True, policy="latest")
  evaluate.main(latest)
  assert capsys.readouterr().out.splitlines()[-1] == "noise: steps 1, 2 skipped"
  _save(workdir, 4, 5)
  evaluate.main(latest)
  evaluate.main(latest)
  assert _steps(workdir) == [3, 5]
  unscored = _rows(workdir, "unscored.jsonl")
  skipped = [(step, "skipped") for step in (1, 2, 4)]
  assert [(row["step"], row["reason"]) for row in unscored] == skipped
  assert unscored[0]["checkpoint"] == "step-00000001"
  capsys.readouterr()
  evaluate.main(_settings(workdir, pairs, once=True))
  assert _steps(workdir) == [3, 5, 1, 2, 4]
  assert "skipped" not in capsys.readouterr().out


def test_two_evaluators_embed_no_checkpoint_twice(workdir, pairs):
  both = threading.Barrier(2)
  _save(workdir, *range(8))
  checkpoints.mark_done(workdir, step=7)
  settings = _settings(workdir, pairs)
  scorers = [Watched(settings), Watched(settings)]
  for each in scorers:  # goes on when both have claimed a checkpoint
    each.before = lambda step, each=each: each.loaded or both.wait(60)
  threads = [
    threading.Thread(target=evaluate.score_run, args=(settings, each))
    for each in scorers
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(_steps(workdir)) == list(range(8))
  assert sorted(scorers[0].loaded + scorers[1].loaded) == list(range(8))
  for name in ("holds", "claims"):
    assert not os.listdir(os.path.join(checkpoints.folder(workdir), name))


def test_checkpoints_of_keep_every_stay_after_training(workdir, pairs):
  pixel_runs.start(workdir, embedding_size=FLOATS, keep_last=1, keep_every=2)
  _save(workdir, 1, 2, 3, 4, 5)
  checkpoints.mark_done(workdir, step=5)
  evaluate.main(_settings(workdir, pairs))
  assert evaluator.list_steps(workdir) == [2, 4, 5]


def test_the_best_is_kept_after_training_and_by_later_evaluators(
  workdir, pairs, capsys
):
  pixel_runs.start(workdir, embedding_size=FLOATS, keep_last=1)
  _save(workdir, 2, 3, 4, 5)  # step 2 tells nothing, the others are equally good
  evaluate.main(_settings(workdir, pairs, once=True, keep_best="accuracy"))
  checkpoints.prune(workdir, keep_last=1)  # as training does after each save
  assert evaluator.list_steps(workdir) == [3, 5]
  _save(workdir, 6)
  checkpoints.mark_done(workdir, step=6)
  evaluate.main(_settings(workdir, pairs))  # without the flag
  assert evaluator.list_steps(workdir) == [3, 6]
  capsys.readouterr()
  evaluate.main(_settings(workdir, pairs, checkpoint="best"))
  assert json.loads(capsys.readouterr().out)["step"] == 3
  with pytest.raises(errors.ConfigError, match=r"best by accuracy on noise .*remove"):
    evaluate.main(_settings(workdir, pairs, keep_best="auc"))


def test_training_cannot_delete_what_is_being_scored(workdir, pairs):
  left = []

  def prune(step: int) -> None:
    checkpoints.prune(workdir, keep_last=1)
    left.append(set(evaluator.list_steps(workdir)))

  _save(workdir, 1, 3, 5)
  settings = _settings(workdir, pairs, once=True)
  evaluate.score_run(settings, Watched(settings, prune))
  for waiting, steps in zip(({1, 3, 5}, {3, 5}, {5}), left, strict=True):
    assert waiting <= steps


def test_images_of_another_size_are_refused_with_the_fix(workdir, pairs):
  pixel_runs.save(workdir, 1, kernel=np.zeros((24 * 24 * 3, FLOATS), np.float32))
  with pytest.raises(errors.UsageError, match=r"noise are 16 .* --image_size=24"):
    evaluate.main(_settings(workdir, pairs, once=True))


def test_a_run_without_checkpoints_has_nothing_to_score_once(workdir, pairs):
  with pytest.raises(errors.DataError, match="no complete checkpoint"):
    evaluate.main(_settings(workdir, pairs, once=True))


@pytest.mark.parametrize("folders", ["", " , ", "PAIRS,PAIRS", "a=PAIRS,a=PAIRS"])
def test_no_set_or_the_same_twice_is_refused(workdir, pairs, folders):
  folders = folders.replace("PAIRS", pairs)
  with pytest.raises(errors.UsageError, match="one or more folders"):
    evaluate.main(_settings(workdir, folders, once=True))


def test_a_set_in_a_bucket_scores_as_on_a_disk(workdir, pairs, bucket, tmp_path):
  for path, _ in storage.walk(pairs):
    storage.upload(os.path.join(pairs, path), f"{bucket}/pairs/{path}")
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  (row,) = _rows(workdir)
  os.remove(os.path.join(workdir, "metrics.jsonl"))
  cache = str(tmp_path / "cache")
  evaluate.main(_settings(workdir, f"{bucket}/pairs", once=True, cache_dir=cache))
  (again,) = _rows(workdir)
  for name in ("set", "fold_accuracies", "auc"):
    assert again[name] == row[name]


def test_a_run_in_a_bucket_is_followed_and_a_restart_scores_nothing_twice(
  workdir, pairs, bucket
):
  run = f"{bucket}/run"
  storage.upload(f"{workdir}/config.json", f"{run}/config.json")

  def save(*steps: int) -> None:
    _save(workdir, *steps)
    for step in steps:
      checkpoints.upload(checkpoints.at(workdir, step), run)

  save(1, 3)
  evaluate.main(_settings(run, pairs, once=True))
  save(5, 6, 7, 8)
  checkpoints.mark_done(run, step=8)
  bucket.faults.rate(0.1, seed=1, delay_seconds=0.1)
  settings = _settings(run, pairs)
  again = Watched(settings)
  assert evaluate.score_run(settings, again) == errors.ExitCode.DONE
  bucket.faults.clear()
  assert _steps(run) == [1, 3, 5, 6, 7, 8]
  assert again.loaded == [5, 6, 7, 8]
  assert len(storage.list_names(f"{run}/tensorboard/evaluation")) == 2
  # the lease let more than --keep_last stay; its end leaves exactly those
  assert evaluator.list_steps(run) == [6, 7, 8]


def test_a_run_in_a_bucket_gets_its_report_and_all_pictures_there(
  workdir, pairs, bucket
):
  _save(workdir, 1)
  run = f"{bucket}/run"
  for entry in storage.walk(workdir):
    storage.upload(f"{workdir}/{entry.path}", f"{run}/{entry.path}")
  settings = _settings(run, pairs, once=True, report=True)
  assert evaluate.main(settings) == errors.ExitCode.DONE
  assert "noise, step 1" in storage.read_bytes(f"{run}/report.html").decode()
  (events,) = storage.walk(f"{run}/tensorboard/evaluation")
  content = storage.read_bytes(f"{run}/tensorboard/evaluation/{events.path}")
  assert b"noise/accuracy_mean" in content
  assert b"noise/scores" in content  # written after the score
