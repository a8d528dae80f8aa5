"""The evaluator on fake checkpoints: order, restarts, several sets, errors."""

import dataclasses
import json
import os
import pathlib
import threading

import google_crc32c
import numpy as np
import pytest

from facedist import config, errors, evaluate, storage
from facedist.data import noise, verification_set
from facedist.data.shards import manifest
from facedist.evaluation import evaluator, explain, report
from facedist.evaluation.evaluator import Scorer, ScoreSettings
from facedist.evaluation.score_log import ScoreLog
from facedist.training import inference
from facedist.training.checkpoint import checkpoints
from facedist.training.config import TrainConfig
from tests import processes


class FakeNetwork:
  """Embeds an image as its pixels less their mean, shrunk; step 2 tells nothing."""

  name = "fake-192@step"
  weights = "trained"
  embedding_size = 192
  policy = "float32"
  pixel_normalization = "x"

  def __init__(self, workdir: str, checkpoint: checkpoints.Checkpoint):
    self.restored = [checkpoint.step]
    self.image_size = checkpoint.marker()["image_size"]

  @property
  def step(self) -> int:
    return self.restored[-1]

  def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
    self.restored.append(checkpoint.step)

  def embed(self, images: np.ndarray) -> np.ndarray:
    small = images[:, ::4, ::4].reshape(len(images), -1).astype(np.float32)
    if self.step == 2:
      return np.ones_like(small)
    return small - small.mean(1, keepdims=True)


@pytest.fixture(autouse=True)
def _quick_picture(monkeypatch) -> None:
  """Leaves out the drawing, which has tests of its own and takes most of the time."""
  monkeypatch.setattr(report, "picture", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))


@pytest.fixture
def networks(monkeypatch) -> list[FakeNetwork]:
  """The networks that were loaded."""
  loaded: list[FakeNetwork] = []

  def load_network(
    workdir: str, checkpoint: checkpoints.Checkpoint, *, weights: str
  ) -> FakeNetwork:
    assert weights == "trained"
    loaded.append(FakeNetwork(workdir, checkpoint))
    return loaded[-1]

  monkeypatch.setattr(inference, "load_network", load_network)
  return loaded


@pytest.fixture
def pairs(tmp_path: pathlib.Path) -> str:
  """A verification set of 20 pairs of random patterns, 32 pixels wide."""
  folder = str(tmp_path / "pairs")
  noise.write_noise_verification_set(
    folder, num_pairs=20, folds=5, image_size=32, seed=0
  )
  return folder


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> str:
  """A run that has started and saved nothing yet."""
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.json").write_text(config.to_json(TrainConfig()))
  return str(folder)


def _save(
  workdir: str, *steps: int, image_size: int = 32, alignment: str | None = None
) -> None:
  folder = pathlib.Path(checkpoints.folder(workdir))
  folder.mkdir(exist_ok=True)
  for step in steps:
    name = f"step-{step:08d}.index"
    (folder / name).write_bytes(b"")
    files = {name: {"bytes": 0, "crc32c": storage.crc32c_of(b"")}}
    marker = {"step": step, "image_size": image_size, "files": files}
    marker["alignment"] = alignment
    (folder / f"step-{step:08d}.json").write_text(json.dumps(marker))


def _settings(workdir: str, pairs: str, **others) -> evaluate.EvaluateConfig:
  quick = {"poll_seconds": 0.01, "batch_size": 16, "report": False} | others
  return evaluate.EvaluateConfig(workdir=workdir, verification_data=pairs, **quick)


def _rows(workdir: str, name: str = "metrics.jsonl") -> list[dict]:
  lines = pathlib.Path(workdir, name).read_text().splitlines()
  return [json.loads(line) for line in lines]


def _cut_from_the_centre(pairs: str) -> None:
  """Makes the manifest say how the images were cut."""
  made = manifest.load(pairs)
  alignment = {"template": "centre_crop", "images": {"centre_crop": 40}}
  manifest.save(dataclasses.replace(made, alignment=alignment), pairs)


def test_another_alignment_than_in_training_is_a_warning_with_both(
  workdir, pairs, networks, caplog
):
  _cut_from_the_centre(pairs)
  _save(workdir, 1, alignment="arcface")
  assert evaluate.main(_settings(workdir, pairs, once=True)) == errors.ExitCode.DONE
  assert "images aligned by centre_crop" in caplog.text
  assert "trained on images aligned by arcface" in caplog.text


def test_another_alignment_is_an_error_where_asked_for(workdir, pairs, networks):
  _cut_from_the_centre(pairs)
  _save(workdir, 1, alignment="arcface")
  settings = _settings(workdir, pairs, checkpoint="1", strict_alignment=True)
  with pytest.raises(errors.DataError, match="or leave out --strict_alignment"):
    evaluate.main(settings)


def test_scores_by_group_come_with_the_flag(workdir, pairs, networks, tmp_path):
  names = verification_set.load_verification_set(pairs).read_names()
  groups = tmp_path / "groups.csv"
  lines = [f"{name},{'ab'[n // 20]}" for n, name in enumerate(names)]
  groups.write_text("\n".join(lines))
  _save(workdir, 1)
  settings = _settings(workdir, pairs, once=True, groups=str(groups))
  assert evaluate.main(settings) == errors.ExitCode.DONE
  (row,) = _rows(workdir)
  found = row["by_group"]
  assert [(each["group"], each["num_pairs"]) for each in found["groups"]] == [
    ("a", 10),
    ("b", 10),
  ]
  assert [each["accuracy"] for each in found["groups"]] == [1.0, 1.0]
  assert (found["far_limits"], found["largest_tar_gaps"]) == ([0.1], [0.0])


def test_every_checkpoint_is_scored_in_step_order_by_one_network(
  workdir, pairs, networks, capsys
):
  _save(workdir, 3, 1, 2)
  checkpoints.mark_done(workdir, step=3)
  assert evaluate.main(_settings(workdir, pairs)) == errors.ExitCode.DONE
  rows = _rows(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3]
  # Patterns of one identity are alike, and a network that says nothing guesses: all
  # pairs score 1, so all are classified alike.
  assert [row["accuracy_mean"] for row in rows] == [1.0, 0.5, 1.0]
  assert rows[0]["set"] == "noise"
  assert rows[0]["images"] == 40
  assert rows[0]["mirrored"] is True
  # FAR 1e-1 allows one of 10 different pairs; where all scores tie, none is accepted.
  assert [[(at["far"], at["tar"]) for at in row["tar_at_far"]] for row in rows] == [
    [(0.1, 1.0)],
    [(0.1, 0.0)],
    [(0.1, 1.0)],
  ]
  assert rows[0]["checkpoint"] == "step-00000001"
  assert [network.restored for network in networks] == [[1, 2, 3]]
  assert "* best" in capsys.readouterr().out.splitlines()[1]
  assert list(pathlib.Path(workdir, "tensorboard", "evaluation").iterdir())
  assert not os.listdir(os.path.join(checkpoints.folder(workdir), "holds"))


def test_a_row_says_what_it_was_computed_from_and_with(workdir, pairs, networks):
  _save(workdir, 1, alignment="arcface")
  evaluate.main(_settings(workdir, pairs, once=True))
  made = verification_set.load_verification_set(pairs)
  images = made.read(np.arange(40))  # in one batch, not three
  assert images.shape == (40, 32, 32, 3)
  table = np.load(os.path.join(pairs, "pairs.npy"))
  (row,) = _rows(workdir)
  found = row["provenance"]
  versions = found.pop("versions")
  assert versions["numpy"] == np.__version__
  assert set(versions) == {"facedist", "tensorflow", "python", "numpy", "simplejpeg"}
  assert found.pop("device")
  assert found == {
    "set": "noise",
    "fingerprint": made.fingerprint,
    "pairs_crc32c": f"{google_crc32c.value(table.tobytes()):08x}",
    "images_crc32c": f"{google_crc32c.value(images.tobytes()):08x}",
    "identities_crc32c": f"{google_crc32c.value(made.labels.tobytes()):08x}",
    "groups_crc32c": None,
    "alignment": made.alignment,
    "model": "fake-192",
    "checkpoint": "step-00000001",
    "step": 1,
    "weights": "trained",
    # of the JSON of the checksums of the checkpoint's files: one, which is empty
    "weights_crc32c": f"{google_crc32c.value(b'[0]'):08x}",
    "embedding_size": 192,
    "image_size": 32,
    "normalized": True,
    "mirrored": True,
    "pixel_normalization": "x",
    "policy": "float32",
    "training_data": None,
    "training_alignment": "arcface",
    "batch_size": 16,
  }


def _change_one_pixel(
  pair_set: verification_set.VerificationSet,
) -> verification_set.VerificationSet:
  """Makes one value of image 7 another."""

  def read(numbers: np.ndarray) -> np.ndarray:
    images = pair_set.read(numbers).copy()
    images[numbers == 7, 3, 4, 1] ^= 1
    return images

  return dataclasses.replace(pair_set, read=read)


def _change_one_pair(
  pair_set: verification_set.VerificationSet,
) -> verification_set.VerificationSet:
  """Makes the first image of a different pair another."""
  first = pair_set.first.copy()
  first[np.flatnonzero(~pair_set.same)[0]] += 1
  return dataclasses.replace(pair_set, first=first)


@pytest.mark.parametrize(
  ("change", "mirror", "size", "reasons"),
  [
    (lambda same: same, True, 32, []),
    (_change_one_pixel, True, 32, ["The images differ in their pixels: the files and"]),
    (_change_one_pair, True, 32, ["The pairs differ: both are 20 pairs in 5 folds"]),
    (lambda same: same, False, 32, ["A embeds each image together with its mirror"]),
    (
      lambda same: same,
      True,
      64,
      ["The images differ in their pixels: they are 32 pixels wide in A, 64 in B"],
    ),
  ],
)
def test_what_was_changed_between_two_scores_of_the_same_weights_is_explained(
  workdir, pairs, networks, tmp_path, change, mirror, size, reasons
):
  def score(folder: str, change, mirror: bool, size: int) -> dict:
    (pair_set,) = verification_set.load_verification_sets(
      f"set={folder}", "cache", cache_gb=0
    )
    _save(workdir, 1, image_size=size)
    settings = ScoreSettings(workdir, mirror=mirror, weights="auto", batch_size=16)
    scorer = Scorer((change(pair_set),), settings)
    scorer.load(evaluator.find_checkpoint(workdir, "1"))
    return scorer.score(scorer.embed(scorer.plan.sets[0])).row

  before = score(pairs, lambda same: same, True, 32)
  if size != 32:
    pairs = str(tmp_path / "large")
    noise.write_noise_verification_set(
      pairs, num_pairs=20, folds=5, image_size=size, seed=0
    )
  found = explain.explain(before, score(pairs, change, mirror, size))
  assert len(found.differs) == len(reasons), found.differs
  for said, start in zip(found.differs, reasons, strict=True):
    assert said.startswith(start)
  assert not found.unknown


def test_two_files_are_explained_without_a_run_and_other_numbers_of_files_are_refused(
  workdir, pairs, networks, tmp_path, capsys
):
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, checkpoint="1"))
  path = tmp_path / "a.json"
  path.write_text(capsys.readouterr().out)
  done = processes.run("facedist.evaluate", "--explain", str(path), str(path))
  assert done.returncode == errors.ExitCode.DONE
  assert f"B: noise, step 1, of {path}" in done.stderr  # which has all output
  assert "the figures are equal" in done.stderr
  done = processes.run("facedist.evaluate", f"--explain={path}")
  assert done.returncode == errors.ExitCode.USAGE
  assert done.stderr == (
    "error: --explain needs two files, not 1; write --explain A.json B.json.\n"
  )


def test_a_restart_scores_nothing_twice_and_repairs_a_torn_line(
  workdir, pairs, networks
):
  _save(workdir, 1, 3)
  evaluate.main(_settings(workdir, pairs, once=True))
  path = pathlib.Path(workdir, "metrics.jsonl")
  first, second = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + second[:50])
  _save(workdir, 5)
  evaluate.main(_settings(workdir, pairs, once=True))
  assert [row["step"] for row in _rows(workdir)] == [1, 3, 5]
  assert networks[1].restored == [3, 5]


def test_two_sets_are_scored_with_each_checkpoint(
  workdir, pairs, networks, tmp_path, capsys
):
  other = str(tmp_path / "other")
  noise.write_noise_verification_set(
    other, num_pairs=12, folds=2, image_size=32, seed=5
  )
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  both = _settings(workdir, f"{pairs}, {other}", once=True)
  evaluate.main(both)
  assert [(row["step"], row["set"]) for row in _rows(workdir)] == [
    (1, "noise"),
    (1, "pairs"),
    (1, "other"),
  ]
  assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["mean", "1"]
  evaluate.main(both)
  assert len(_rows(workdir)) == 3
  assert len(networks) == 2  # the third run had nothing to load one for


@pytest.mark.parametrize(
  ("given", "names"),
  [
    ("lfw=PAIRS,PAIRS", ["lfw", "noise"]),
    ("lfw=PAIRS,cfp_fp=PAIRS,PAIRS", ["lfw", "cfp_fp", "noise"]),
    ("lfw=./a=b", ["lfw"]),
    ("./a=b,PAIRS", ["a=b", "pairs"]),  # of the same data set
    ("a=b", ["noise"]),  # exists
    ("c=a=b", ["c"]),
    ("d, e", ["noise"]),  # exists
  ],
)
def test_sets_have_the_names_that_they_are_given(pairs, given, names, monkeypatch):
  monkeypatch.chdir(os.path.dirname(pairs))
  for other in ("a=b", "d, e"):
    os.symlink(pairs, other)
  sets = evaluate.load_verification_sets(
    given.replace("PAIRS", pairs), "cache", cache_gb=0
  )
  assert [each.name for each in sets] == names


def test_without_the_mirror_image_it_is_another_score(workdir, pairs, networks):
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  evaluate.main(_settings(workdir, pairs, once=True, mirror=False))
  assert [row["mirrored"] for row in _rows(workdir)] == [True, False]


def test_the_average_is_scored_where_the_run_keeps_one_and_beside_the_trained_weights(
  workdir, pairs, monkeypatch
):
  asked = []

  def load_network(
    workdir: str, checkpoint: checkpoints.Checkpoint, *, weights: str
  ) -> FakeNetwork:
    asked.append(weights)
    return FakeNetwork(workdir, checkpoint)

  monkeypatch.setattr(inference, "load_network", load_network)
  text = config.to_json(TrainConfig(ema_decay=0.9))
  pathlib.Path(workdir, "config.json").write_text(text)
  _save(workdir, 1)
  for weights in ("auto", "ema", "trained"):
    evaluate.main(_settings(workdir, pairs, once=True, weights=weights))
  assert [row["weights"] for row in _rows(workdir)] == ["ema", "trained"]
  assert asked == ["ema", "trained"]  # ema was auto, and is not scored twice
  boards = sorted(os.listdir(os.path.join(workdir, "tensorboard")))
  assert boards == ["evaluation", "evaluation_ema"]


def test_the_average_of_a_run_that_keeps_none_is_refused(workdir, pairs, networks):
  _save(workdir, 1)
  with pytest.raises(errors.UsageError, match=r"keeps no average .*--weights=trained"):
    evaluate.main(_settings(workdir, pairs, once=True, weights="ema"))
  assert not networks


@pytest.mark.parametrize("wanted", ["3", "step-00000003", "PATH", "PATH.index"])
def test_one_checkpoint_is_printed_and_nothing_written(
  workdir, pairs, networks, capsys, wanted
):
  _save(workdir, 1, 3)
  wanted = wanted.replace("PATH", checkpoints.list_checkpoints(workdir)[1].path)
  evaluate.main(_settings(workdir, pairs, checkpoint=wanted))
  (line,) = capsys.readouterr().out.splitlines()
  assert json.loads(line)["step"] == 3
  assert json.loads(line)["accuracy_mean"] == 1.0
  assert sorted(os.listdir(workdir)) == ["checkpoints", "config.json"]


def test_it_waits_for_training_and_follows_it_to_its_end(
  tmp_path, pairs, networks, capsys
):
  run = str(tmp_path / "later")

  def train() -> None:
    os.makedirs(run)
    text = config.to_json(TrainConfig())  # read at once, so it must appear whole
    storage.write_bytes(os.path.join(run, "config.json"), text.encode())
    _save(run, 0)
    _save(run, 1)
    checkpoints.mark_done(run, step=1)

  training = threading.Timer(0.2, train)
  training.start()
  assert evaluate.main(_settings(run, pairs)) == errors.ExitCode.DONE
  training.join()
  assert [row["step"] for row in _rows(run)] == [0, 1]


def test_a_run_that_never_starts_is_given_up(tmp_path, pairs):
  settings = _settings(str(tmp_path / "never"), pairs, start_timeout_seconds=0.05)
  with pytest.raises(errors.DataError, match=r"config.json did not appear within 0.05"):
    evaluate.main(settings)


def test_training_that_saves_nothing_more_is_given_up(workdir, pairs, networks):
  _save(workdir, 1)
  with pytest.raises(errors.DataError, match="no new checkpoint within"):
    evaluate.main(_settings(workdir, pairs, idle_timeout_seconds=0.05))
  assert [row["step"] for row in _rows(workdir)] == [1]


def test_a_corrupt_checkpoint_is_named_and_the_others_are_scored(
  workdir, pairs, networks, monkeypatch
):
  def restore(self, checkpoint) -> None:
    if checkpoint.step == 4:
      raise errors.DataError("step-00000004.index is corrupt.")
    self.restored.append(checkpoint.step)

  monkeypatch.setattr(FakeNetwork, "restore", restore)
  _save(workdir, 3, 4, 5)
  checkpoints.mark_done(workdir, step=5)
  assert evaluate.main(_settings(workdir, pairs)) == errors.ExitCode.PARTIAL
  assert [row["step"] for row in _rows(workdir)] == [3, 5]


def test_a_bucket_that_refuses_a_checkpoint_ends_the_evaluator(
  workdir, pairs, networks, monkeypatch
):
  def restore(self, checkpoint) -> None:
    raise errors.AccessError("step-00000004.index: permission denied (403).")

  monkeypatch.setattr(FakeNetwork, "restore", restore)
  _save(workdir, 3, 4)
  checkpoints.mark_done(workdir, step=4)
  with pytest.raises(errors.AccessError, match=r"permission denied \(403\)"):
    evaluate.main(_settings(workdir, pairs))


def test_a_checkpoint_deleted_while_it_is_loaded_is_recorded_as_missed(
  workdir, pairs, networks, monkeypatch, capsys
):
  def restore(self, checkpoint) -> None:
    if checkpoint.step == 4:
      os.remove(checkpoint.path + ".json")
      raise errors.DataError("step-00000004.index does not exist.")
    self.restored.append(checkpoint.step)

  monkeypatch.setattr(FakeNetwork, "restore", restore)
  _save(workdir, 3, 4, 5)
  checkpoints.mark_done(workdir, step=5)
  assert evaluate.main(_settings(workdir, pairs)) == errors.ExitCode.DONE
  assert [row["step"] for row in _rows(workdir)] == [3, 5]
  assert capsys.readouterr().out.splitlines()[-1] == "noise: steps 4 missed"


def test_with_latest_the_newest_is_scored_and_the_others_stay_skipped_until_asked_for(
  workdir, pairs, networks, capsys
):
  _save(workdir, 1, 2, 3)
  latest = _settings(workdir, pairs, once=True, policy="latest")
  evaluate.main(latest)
  assert capsys.readouterr().out.splitlines()[-1] == "noise: steps 1, 2 skipped"
  _save(workdir, 4, 5)
  evaluate.main(latest)
  evaluate.main(latest)
  assert [row["step"] for row in _rows(workdir)] == [3, 5]
  unscored = _rows(workdir, "unscored.jsonl")
  assert [(row["step"], row["reason"]) for row in unscored] == [
    (1, "skipped"),
    (2, "skipped"),
    (4, "skipped"),
  ]
  assert unscored[0]["checkpoint"] == "step-00000001"
  capsys.readouterr()
  evaluate.main(_settings(workdir, pairs, once=True))
  assert [row["step"] for row in _rows(workdir)] == [3, 5, 1, 2, 4]
  assert "skipped" not in capsys.readouterr().out


def test_two_evaluators_embed_no_checkpoint_twice(
  workdir, pairs, networks, monkeypatch
):
  both = threading.Barrier(2)
  restore = FakeNetwork.__init__

  def meet(self, workdir: str, checkpoint: checkpoints.Checkpoint) -> None:
    restore(self, workdir, checkpoint)
    both.wait(60)  # both have claimed a checkpoint now

  monkeypatch.setattr(FakeNetwork, "__init__", meet)
  _save(workdir, *range(8))
  checkpoints.mark_done(workdir, step=7)
  settings = _settings(workdir, pairs)
  threads = [threading.Thread(target=evaluate.main, args=(settings,)) for _ in "ab"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(row["step"] for row in _rows(workdir)) == list(range(8))
  restored = [step for network in networks for step in network.restored]
  assert (len(networks), sorted(restored)) == (2, list(range(8)))
  for name in ("holds", "claims"):
    assert not os.listdir(os.path.join(checkpoints.folder(workdir), name))


def test_checkpoints_of_keep_every_stay_after_training(workdir, pairs, networks):
  text = config.to_json(TrainConfig(keep_last=1, keep_every=2))
  pathlib.Path(workdir, "config.json").write_text(text)
  _save(workdir, 1, 2, 3, 4, 5)
  checkpoints.mark_done(workdir, step=5)
  evaluate.main(_settings(workdir, pairs))
  assert [each.step for each in checkpoints.list_checkpoints(workdir)] == [2, 4, 5]


def test_the_best_is_kept_after_training_and_by_later_evaluators(
  workdir, pairs, networks, capsys
):
  text = config.to_json(TrainConfig(keep_last=1))
  pathlib.Path(workdir, "config.json").write_text(text)
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


def test_training_cannot_delete_what_is_being_scored(
  workdir, pairs, networks, monkeypatch
):
  left = []

  def embed(self, images: np.ndarray) -> np.ndarray:
    checkpoints.prune(workdir, keep_last=1)
    left.append({each.step for each in checkpoints.list_checkpoints(workdir)})
    return images[:, 0, 0].astype(np.float32)

  monkeypatch.setattr(FakeNetwork, "embed", embed)
  _save(workdir, 1, 3, 5)
  evaluate.main(_settings(workdir, pairs, once=True, batch_size=40))
  assert len(left) == 6  # each image and its mirror image, of three checkpoints
  for waiting, both in (({1, 3, 5}, left[:2]), ({3, 5}, left[2:4]), ({5}, left[4:])):
    assert all(waiting <= steps for steps in both)


def test_the_training_cluster_is_left(workdir, pairs, networks, monkeypatch):
  monkeypatch.setenv("TF_CONFIG", json.dumps({"task": {"type": "evaluator"}}))
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  assert "TF_CONFIG" not in os.environ


def test_images_of_another_size_are_refused_with_the_fix(workdir, pairs, networks):
  _save(workdir, 1, image_size=112)
  with pytest.raises(errors.UsageError, match=r"noise are 32 .* --image_size=112"):
    evaluate.main(_settings(workdir, pairs, once=True))


def test_a_run_without_checkpoints_has_nothing_to_score_once(workdir, pairs):
  with pytest.raises(errors.DataError, match="no complete checkpoint"):
    evaluate.main(_settings(workdir, pairs, once=True))


def test_an_unknown_checkpoint_is_an_error_that_lists_the_known(workdir, pairs):
  _save(workdir, 1, 3)
  with pytest.raises(errors.DataError, match=r"--checkpoint=2 .*\(it has 1, 3\)"):
    evaluate.main(_settings(workdir, pairs, checkpoint="2"))


@pytest.mark.parametrize("folders", ["", " , ", "PAIRS,PAIRS", "a=PAIRS,a=PAIRS"])
def test_no_set_or_the_same_twice_is_refused(workdir, pairs, folders):
  folders = folders.replace("PAIRS", pairs)
  with pytest.raises(errors.UsageError, match="one or more folders"):
    evaluate.main(_settings(workdir, folders, once=True))


def test_a_set_in_a_bucket_scores_as_on_a_disk(
  workdir, pairs, networks, bucket, tmp_path
):
  for path, _ in storage.walk(pairs):
    storage.upload(os.path.join(pairs, path), f"{bucket}/pairs/{path}")
  _save(workdir, 1)
  evaluate.main(_settings(workdir, pairs, once=True))
  (row,) = _rows(workdir)
  os.remove(os.path.join(workdir, "metrics.jsonl"))
  cache = str(tmp_path / "cache")
  evaluate.main(_settings(workdir, f"{bucket}/pairs", once=True, cache_dir=cache))
  (again,) = _rows(workdir)
  assert again["fold_accuracies"] == row["fold_accuracies"]
  assert (again["set"], again["auc"]) == (row["set"], row["auc"])


def test_a_run_in_a_bucket_is_followed_and_a_restart_scores_nothing_twice(
  workdir, pairs, networks, bucket
):
  run = f"{bucket}/run"

  def copy(*steps: int) -> None:
    _save(workdir, *steps)
    for name in ("config.json", *(f"checkpoints/step-{n:08d}.json" for n in steps)):
      storage.upload(os.path.join(workdir, name), f"{run}/{name}")

  copy(1, 3)
  evaluate.main(_settings(run, pairs, once=True))
  copy(5, 6, 7, 8)
  checkpoints.mark_done(run, step=8)
  bucket.faults.rate(0.1, seed=1)
  assert evaluate.main(_settings(run, pairs)) == errors.ExitCode.DONE
  bucket.faults.clear()
  rows = [json.loads(line) for line in storage.open_lines(f"{run}/metrics.jsonl")]
  assert [row["step"] for row in rows] == [1, 3, 5, 6, 7, 8]
  assert networks[1].restored == [5, 6, 7, 8]
  assert len(storage.list_names(f"{run}/tensorboard/evaluation")) == 2
  # the lease let more than --keep_last stay; its end leaves exactly those
  assert [each.step for each in checkpoints.list_checkpoints(run)] == [6, 7, 8]


def test_two_evaluators_append_to_one_object_and_lose_no_row(bucket):
  path = f"{bucket}/metrics.jsonl"

  def append(name: str) -> None:
    for step in range(8):
      assert ScoreLog(path).append({"step": step, "set": name})

  threads = [threading.Thread(target=append, args=(name,)) for name in "ab"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  keys = {(row["step"], row["set"]) for row in ScoreLog(path).rows()}
  assert keys == {(step, name) for step in range(8) for name in "ab"}
  assert not ScoreLog(path).append({"step": 0, "set": "a"})


def test_a_run_in_a_bucket_gets_its_report_and_all_pictures_there(
  workdir, pairs, networks, bucket
):
  _save(workdir, 1)
  for path in filter(pathlib.Path.is_file, pathlib.Path(workdir).rglob("*")):
    name = path.relative_to(workdir).as_posix()
    storage.write_bytes(f"gs://faces/run/{name}", path.read_bytes())
  settings = _settings("gs://faces/run", pairs, once=True, report=True)
  assert evaluate.main(settings) == errors.ExitCode.DONE
  assert "noise, step 1" in storage.read_bytes("gs://faces/run/report.html").decode()
  (events,) = storage.walk("gs://faces/run/tensorboard/evaluation")
  content = storage.read_bytes(f"gs://faces/run/tensorboard/evaluation/{events.path}")
  assert b"noise/accuracy_mean" in content
  assert b"noise/scores" in content  # written after the score
