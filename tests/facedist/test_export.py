"""Exported models: what they are, what they embed, and what stays as it was."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import tensorflow as tf

from facedist import __version__, embed, errors, export, storage
from facedist import config as configs
from facedist.data import noise, verification_set
from facedist.evaluation import evaluator
from facedist.models import onnx_file
from facedist.models.backbones import registry
from facedist.training import config as train_config
from facedist.training import ema, inference, train_state
from facedist.training.checkpoint import checkpoints
from facedist.training.config import resolve
from tests import buckets, files, noise_sets, processes, speck
from tests.facedist.two_workers import SABOTAGE

SIZE = 32
RUN = train_config.TrainConfig(
  backbone="speck",
  backbone_weights="none",
  embedding_size=8,
  ema_decay=0.5,
  dropout=0.5,
)
DATA = {"image_size": SIZE, "data_fingerprint": "0a1b2c3d", "alignment": "arcface"}
STEPS = (3, 7)


@pytest.fixture(scope="module", autouse=True)
def small_backbone() -> Iterator[None]:
  """Makes `--backbone=speck` known for these tests alone."""
  with mock.patch.dict(registry.BACKBONES):
    speck.register()
    yield


@pytest.fixture(scope="module")
def built() -> train_state.TrainState:
  """A network at its start, with an average that is another one."""
  made = train_state.build(resolve(RUN), image_size=SIZE, num_identities=3)
  assert made.average is not None
  weights = ema.weights(made.network)
  for own, weight in zip(made.average.averages, weights, strict=True):
    own.assign(0.5 * weight)
  return made


@pytest.fixture(scope="module")
def run(
  built: train_state.TrainState, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """A run's folder with two checkpoints."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  folder.mkdir()
  (folder / "config.json").write_text(configs.to_json(RUN))
  for step in STEPS:
    checkpoints.save(
      built.checkpoint(), str(folder), step=step, is_chief=True, facts=DATA
    )
  return folder


def _export(workdir: object, output: object, **others) -> None:
  export.main(export.ExportConfig(workdir=str(workdir), output=str(output), **others))


def _facts(folder: str) -> dict:
  path = storage.join(folder, "assets.extra", "facedist.json")
  return json.loads(storage.read_bytes(path))


def _embeddings(folder: pathlib.Path, images: np.ndarray) -> np.ndarray:
  """Returns what a SavedModel embeds images as."""
  serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
  return serve(images=tf.constant(images))["embeddings"].numpy()


def _images(count: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def _pairs(folder: pathlib.Path, *, size: int = SIZE) -> str:
  noise.write_noise_verification_set(
    str(folder), num_pairs=20, folds=5, image_size=size, seed=0
  )
  return str(folder)


def _alone(program: str, *words: object) -> list[Any]:
  """Runs a program that cannot import facedist; returns its lines of JSON."""
  program = f"import json, sys\nsys.modules['facedist'] = None\n{program}"
  result = subprocess.run(
    [sys.executable, "-c", program, *map(str, words)],
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_model_says_what_it_is_and_lies_in_its_folder_alone(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  _export(run, tmp_path / "models" / "1")
  facts = _facts(str(tmp_path / "models" / "1"))
  newest = checkpoints.at(str(run), STEPS[-1])
  assert facts.pop("weights_crc32c") == inference.weights_crc32c(newest, "ema")
  assert facts.pop("tool_version") == __version__
  text = """{
    "model": "speck-8", "checkpoint": "step-00000007", "step": 7, "weights": "ema",
    "embedding_size": 8, "image_size": 32, "normalized": true, "mirrored": false,
    "channels": "RGB", "policy": "float32", "data_fingerprint": "0a1b2c3d",
    "alignment": "arcface", "signatures": ["serving_default", "serving_encoded"]
  }"""
  assert facts == json.loads(text)
  assert [path.name for path in (tmp_path / "models").iterdir()] == ["1"]
  assert {entry.path for entry in storage.walk(str(tmp_path / "models" / "1"))} == {
    *("assets.extra/facedist.json", "fingerprint.pb", "model_card.md"),
    *("saved_model.pb", "variables/variables.index"),
    "variables/variables.data-00000-of-00001",
  }


def test_an_older_checkpoint_goes_from_bucket_to_bucket_and_is_whole_when_seen(
  run: pathlib.Path, bucket: buckets.Bucket
):
  for entry in storage.walk(str(run)):
    storage.upload(str(run / entry.path), f"{bucket}/run/{entry.path}")
  bucket.faults.rate(0.1, seed=2, delay_seconds=0.1)
  bucket.traffic.clear()
  output = f"{bucket}/models/1"
  storage.write_bytes(f"{output}/", b"")  # as a console does for an empty folder
  _export(f"{bucket}/run", f"{output}/", checkpoint="3", weights="trained")
  bucket.faults.clear()
  facts = _facts(output)
  assert (facts["step"], facts["weights"]) == (3, "trained")
  written = [one.path for one in bucket.traffic.exchanges if one.method == "POST"]
  assert written[-1] == f"{output}/saved_model.pb"
  assert f"{output}/variables/variables.index" in written
  is_there = {output: "new or empty", f"{output}/saved_model.pb": "a folder"}
  for path, said in is_there.items():
    with pytest.raises(errors.UsageError, match=rf"--output=gs://\S+ must be {said}"):
      _export(f"{bucket}/run", path)


WITH_ONNXRUNTIME_ALONE = """
import numpy as np, onnxruntime
scaled = (np.load(sys.argv[1]).astype(np.float32) - 127.5) / 127.5
for path in sys.argv[2:]:
  session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
  (takes,) = session.get_inputs()
  given = scaled.transpose(0, 3, 1, 2) if takes.shape[1] == 3 else scaled
  (found,) = session.run(None, {takes.name: given})
  print(json.dumps(found.tolist()))
assert "tensorflow" not in sys.modules
"""


def _mixed(run: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A copy of the run as if it had trained in bfloat16; its weights are float32 too."""
  shutil.copytree(run, folder)
  mixed = dataclasses.replace(RUN, policy="mixed_bfloat16")
  (folder / "config.json").write_text(configs.to_json(mixed))
  return folder


def test_onnx_files_give_a_process_with_onnxruntime_alone_the_run_s_embeddings(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  images = _images(3)
  np.save(tmp_path / "images.npy", images)
  mixed = _mixed(run, tmp_path / "mixed")
  exports: dict[str, tuple[pathlib.Path, dict]] = {
    "plain": (run, {}),
    "trained": (run, {"weights": "trained", "layout": "nhwc"}),
    "mirrored": (run, {"mirror": True, "normalize": False, "checkpoint": "3"}),
    "mixed": (mixed, {}),
  }
  expected, paths = [], []
  for name, (workdir, flags) in exports.items():
    paths.append(str(tmp_path / f"{name}.onnx"))
    _export(workdir, paths[-1], **flags)
    facts = onnx_file.read_facts(paths[-1])
    assert facts["layout"] == flags.pop("layout", "nchw")
    assert facts["policy"] == "float32"
    assert facts["step"] == (3 if name == "mirrored" else 7)
    _export(run, tmp_path / "models" / name, **flags)
    expected.append(_embeddings(tmp_path / "models" / name, images))
  found = _alone(WITH_ONNXRUNTIME_ALONE, tmp_path / "images.npy", *paths)
  for each, wanted in zip(found, expected, strict=True):
    np.testing.assert_allclose(each, wanted, atol=1e-4 * np.linalg.norm(wanted[0]))


WITH_TFLITE_ALONE = """
import numpy as np, tensorflow as tf
for path in sys.argv[2:]:
  interpreter = tf.lite.Interpreter(path)
  interpreter.allocate_tensors()
  (takes,), = [interpreter.get_input_details()]
  (returns,), = [interpreter.get_output_details()]
  found = []
  for image in np.load(sys.argv[1]):
    interpreter.set_tensor(takes["index"], image[None].astype(takes["dtype"]))
    interpreter.invoke()
    found.append(interpreter.get_tensor(returns["index"])[0])
  scale, zero = returns["quantization"]
  found = np.array(found, np.float32)
  print(json.dumps(((found - zero) * scale if scale else found).tolist()))
"""


def test_tflite_files_embed_as_the_run_in_a_process_without_facedist(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  images = _images(8)
  np.save(tmp_path / "images.npy", images)
  (tmp_path / "faces").mkdir()
  for number, image in enumerate(images):
    assert cv2.imwrite(str(tmp_path / "faces" / f"{number}.png"), image[..., ::-1])
  noise_sets.write(tmp_path / "shards", identities=3, images=100, size=SIZE)
  exports = {
    "float32": {"mirror": True},
    "float16": {"precision": "float16"},
    "folder": {"precision": "int8", "calibration": str(tmp_path / "faces")},
    "shards": {"precision": "int8", "calibration": str(tmp_path / "shards")},
  }
  mixed = _mixed(run, tmp_path / "mixed")
  paths = [str(tmp_path / f"{name}.tflite") for name in exports]
  for path, flags in zip(paths, exports.values(), strict=True):
    _export(mixed, path, **flags)
  cards = [pathlib.Path(f"{path}.md").read_text() for path in paths]
  assert "| precision | int8 |\n| calibration_images | 8 |\n" in cards[2]
  assert "| precision | int8 |\n| calibration_images | 256 |\n" in cards[3]
  assert "`uint8[1, 32, 32, 3]`" in cards[3]
  _export(run, tmp_path / "mirrored", mirror=True)
  _export(run, tmp_path / "plain")
  mirrored = _embeddings(tmp_path / "mirrored", images)
  plain = _embeddings(tmp_path / "plain", images)
  float32, float16, *int8 = _alone(WITH_TFLITE_ALONE, tmp_path / "images.npy", *paths)
  np.testing.assert_allclose(float32, mirrored, atol=1e-4)
  np.testing.assert_allclose(float16, plain, atol=5e-3)
  for each in int8:
    cosines = np.sum(each * plain, axis=1) / np.linalg.norm(each, axis=1)
    assert cosines.min() > 0.95


ROW = json.loads("""{
  "step": 7, "set": "lfw", "mirrored": true, "weights": "ema", "num_pairs": 6000,
  "accuracy_mean": 0.98765, "accuracy_std": 0.004, "auc": 0.999, "eer": 0.0125,
  "tar_at_far": [
    {"far": 0.01, "tar": 0.97, "low": 0.96, "high": 0.9812, "threshold": 0.31},
    {"far": 0.001, "tar": 0.91, "low": null, "high": null}
  ],
  "by_group": {"far_limits": [0.01], "largest_accuracy_gap": 0.0321, "groups": [
    {"group": "north", "num_pairs": 40, "accuracy": 0.9432, "tar_at_far": [0.5]},
    {"group": "south", "num_pairs": 50, "accuracy": 0.9111, "tar_at_far": [null]}
  ]},
  "provenance": {"images_crc32c": "89abcdef"}
}""")


def test_a_model_card_has_data_config_scores_provenance_and_limits(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  folder = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
  others = ({"step": 3}, {"weights": "trained"})
  rows = [*(ROW | {"set": "not this"} | each for each in others), ROW]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
  _export(folder, tmp_path / "1")
  _export(folder, tmp_path / "faces.onnx")
  for card, file in (
    (tmp_path / "1" / "model_card.md", tmp_path / "1" / "saved_model.pb"),
    (tmp_path / "faces.onnx.md", tmp_path / "faces.onnx"),
  ):
    text = card.read_text()
    assert text.startswith("# Model card: speck-8, step 7\n")
    assert "## What it must not be used for" in text
    assert "- fingerprint: 0a1b2c3d\n" in text
    assert "- backbone: speck\n" in text
    assert "- ema_decay: 0.5\n" in text
    assert "| lfw | 6000 | yes | 0.9877 ± 0.0040 | 0.9990 | 0.0125 |\n" in text
    assert "| lfw | 0.01 | 0.9700 | 0.9600 to 0.9812 | 0.3100 |\n" in text
    assert "| lfw | 0.001 | 0.9100 |  |  |\n" in text
    assert "largest gap in accuracy is 0.0321" in text
    assert "| north | 40 | 0.9432 | 0.5000 |\n" in text
    assert "| south | 50 | 0.9111 |  |\n" in text
    assert '"images_crc32c": "89abcdef"' in text
    assert f"| {hashlib.sha256(file.read_bytes()).hexdigest()} |\n" in text
    assert f"{SIZE} × {SIZE} pixels" in text
    assert "not this" not in text
    assert str(tmp_path) not in text


def test_an_exported_model_is_scored_itself_and_the_card_says_so(
  run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
  pairs = _pairs(tmp_path / "pairs")
  accuracies = []
  for name, card in (("1", "1/model_card.md"), ("faces.onnx", "faces.onnx.md")):
    _export(run, tmp_path / name, verification_data=pairs)
    row = json.loads(capsys.readouterr().out)
    accuracies.append(row["accuracy_mean"])
    text = (tmp_path / card).read_text()
    assert "**Not measured.**" in text  # the checkpoint, which nobody evaluated
    below = text.partition("## Scores of this exported model")[2]
    assert f"| {row['set']} | 20 | no | {row['accuracy_mean']:.4f} ± " in below
  mirrored = tmp_path / "mirrored.onnx"
  _export(run, mirrored, verification_data=pairs, mirror=True)
  row = json.loads(capsys.readouterr().out)
  sets = verification_set.load_verification_sets(pairs, "cache", cache_gb=0)
  scorer = evaluator.Scorer(
    sets, evaluator.ScoreSettings(str(run), mirror=True, weights="auto", batch_size=8)
  )
  scorer.load(checkpoints.at(str(run), STEPS[-1]))
  expected = scorer.score(scorer.embed(sets[0])).row
  found, wanted = row["provenance"], expected["provenance"]
  assert found["exported"] == "mirrored.onnx"
  for name in wanted.keys() & found.keys() - {"batch_size", "policy"}:
    assert found[name] == wanted[name], name
  assert {"images_crc32c", "weights_crc32c", "alignment"} < wanted.keys() & found.keys()
  assert accuracies[0] == accuracies[1]
  assert row["fold_accuracies"] == list(expected["fold_accuracies"])
  assert row["auc"] == expected["auc"]
  large = _pairs(tmp_path / "large", size=48)
  with pytest.raises(errors.UsageError, match=r"are 48 pixels wide, but the network"):
    _export(run, tmp_path / "2", verification_data=large)


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ({"output": "new", "layout": "nhwc"}, r"--layout=nhwc is for a name .* in \.onnx,"),
    ({"output": "a.onnx", "precision": "int8"}, r"--precision=int8 .* in \.tflite,"),
    ({"output": "a.tflite", "precision": "int8"}, r"--precision=int8 needs --calibr"),
    ({"output": "a.tflite", "calibration": "x"}, r"--calibration=x is for --precision"),
    (
      {"output": "a.tflite", "precision": "int8", "calibration": "x", "mirror": True},
      r"--mirror is not for --precision=int8",
    ),
    ({"output": "mine.onnx"}, r"replace \S+/mine\.onnx, which exists; choose anothe"),
    ({"output": "full"}, r"--output=\S+full must be new or empty, but has mine; choos"),
    ({"output": "full/mine"}, r"--output=\S+mine must be a folder, but a file has tha"),
    (
      {"output": "a[1]"},
      r"=\S+\[1\] has one of .*, which TensorFlow reads as a patter",
    ),
    ({"output": "your.onnx"}, r"replace \S+/your\.onnx\.md, which exists; choose an"),
  ],
)
def test_flags_and_names_that_do_not_fit_a_file_are_refused(
  tmp_path: pathlib.Path, flags: dict[str, Any], said: str
):
  (tmp_path / "full").mkdir()
  there = [tmp_path / name for name in ("full/mine", "mine.onnx", "your.onnx.md")]
  for path in there:
    path.write_bytes(b"0")
  output = tmp_path / flags.pop("output")
  with pytest.raises(errors.UsageError, match=said):
    _export(tmp_path / "no run", output, **flags)
  found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
  assert found == there
  assert {path.read_bytes() for path in found} == {b"0"}


def test_a_model_that_embeds_otherwise_than_the_run_is_refused(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  newest = checkpoints.at(str(run), STEPS[-1])
  network = inference.load_network(str(run), newest)
  settings = export.ExportConfig(workdir=str(run), output="a.onnx", normalize=False)
  source = export.Source(settings, newest, network, facts={})

  def embed_inexactly(images: np.ndarray) -> np.ndarray:
    exact = network.embed(images).numpy()
    return exact + 2e-4 * np.linalg.norm(exact, axis=1, keepdims=True)

  with pytest.raises(RuntimeError, match=r"floats differ by up to 2\.\de-04 of an"):
    export.try_file(source, embed_inexactly)
  export.write_model(settings, network, str(tmp_path))
  network.restore(checkpoints.at(str(run), STEPS[0]))
  export.try_model(settings, network, str(tmp_path))
  kernel = network.network.embedding.get_layer("linear").kernel
  kernel.assign(-kernel)
  with pytest.raises(RuntimeError, match="embeds otherwise than the run's network"):
    export.try_model(settings, network, str(tmp_path))


def test_calibration_images_must_be_there_and_of_the_network_s_size(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  (tmp_path / "faces").mkdir()
  flags = {"precision": "int8", "calibration": str(tmp_path / "faces")}
  with pytest.raises(
    errors.DataError, match="has no image that can be read; check the"
  ):
    _export(run, tmp_path / "a.tflite", **flags)
  wide = np.zeros((SIZE, SIZE + 1, 3), np.uint8)
  assert cv2.imwrite(str(tmp_path / "faces" / "1.png"), wide)
  with pytest.raises(errors.DataError, match=r"1\.png is not 32 x 32 pixels, as the"):
    _export(run, tmp_path / "a.tflite", **flags)
  assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_of_two_exporters_the_second_is_refused_and_the_first_one_s_model_stays(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  refused = []

  def export_model() -> None:
    try:
      _export(run, tmp_path / "out")
    except errors.UsageError as error:
      refused.append(str(error))

  threads = [threading.Thread(target=export_model) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert re.fullmatch(r"--output=\S+ was made by another proc.*", *refused)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  assert _facts(str(tmp_path / "out"))["step"] == 7


def test_a_full_disk_is_one_line_and_leaves_nothing(
  run: pathlib.Path, tmp_path: pathlib.Path
):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # bytes of a file
  try:
    with pytest.raises(errors.DataError, match=r"File too large.*; free space on its"):
      _export(run, tmp_path / "out")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert list(tmp_path.iterdir()) == []


def test_corruption_and_broken_weights_are_refused_as_embed_refuses_them(
  run: pathlib.Path, tmp_path: pathlib.Path, built: train_state.TrainState
):
  folder = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
  (data,) = folder.glob("checkpoints/step-00000007.data-*")
  files.flip_byte(data, 1000)
  with pytest.raises(errors.DataError, match=r"step-00000007\.data-\S+ is corrupt"):
    _export(folder, tmp_path / "out")
  weight = ema.weights(built.network)[-1]
  kept = weight.numpy()
  weight.assign(np.full_like(kept, np.nan))
  checkpoints.save(built.checkpoint(), str(folder), step=9, is_chief=True, facts=DATA)
  weight.assign(kept)
  with pytest.raises(errors.DataError, match=r"a vector that is not finite .* earlier"):
    _export(folder, tmp_path / "out", weights="trained")
  with pytest.raises(errors.DataError, match="not finite"):
    _export(folder, tmp_path / "out.tflite", weights="trained")
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


WITHOUT_FACEDIST = """
import pathlib
import cv2, numpy as np, tensorflow as tf
files = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
images = [cv2.imdecode(np.frombuffer(file, np.uint8), 1)[..., ::-1] for file in files]
for folder in sys.argv[2:]:
  serve = tf.saved_model.load(folder).signatures
  asked = {
    "serving_default": {"images": tf.constant(np.stack(images))},
    "serving_encoded": {"image_bytes": tf.constant(files)},
  }
  found = {name: serve[name](**given)["embeddings"] for name, given in asked.items()}
  assert {each.dtype for each in found.values()} == {tf.float32}
  print(json.dumps({name: each.numpy().tolist() for name, each in found.items()}))
"""
EXPORTS = {
  "trained": ("sharded", {"weights": "trained"}),
  "average": ("sharded", {"weights": "ema"}),
  "mirrored": ("sharded", {"mirror": True, "normalize": False}),
  "half": ("mixed", {}),
}


@pytest.fixture(scope="module")
def trained(
  run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """A folder with a run that the command trained on two devices, and a mixed one."""
  folder = tmp_path_factory.mktemp("trained")
  _mixed(run, folder / "mixed")
  noise_sets.write(folder / "shards", identities=5, images=4, size=SIZE)
  result = processes.run(
    *(SABOTAGE, "two devices", "0", "--"),
    *(f"--data_dir={folder / 'shards'}", f"--workdir={folder / 'sharded'}"),
    *("--backbone=speck", "--backbone_weights=none", "--embedding_size=8"),
    *("--dropout=0.5", "--batch_norm_momentum=0.5", "--ema_decay=0.8"),
    *("--strategy=mirrored", "--head_sharding=sharded", "--global_batch=4"),
    *("--head_epochs=1", "--full_epochs=0"),
  )
  assert result.returncode == 0, result.stderr
  return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Five images, one of them a JPEG."""
  folder = tmp_path_factory.mktemp("faces")
  rng = np.random.default_rng(1)
  for number, ending in enumerate(["png", "jpg", "png", "png", "png"]):
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert cv2.imwrite(str(folder / f"{number}.{ending}"), image)
  return folder


@pytest.fixture(scope="module")
def served(trained: pathlib.Path, faces: pathlib.Path) -> dict[str, dict]:
  """Embeddings by model and signature, from a process that has no facedist."""
  folders = [str(trained / "models" / name) for name in EXPORTS]
  for (run, flags), folder in zip(EXPORTS.values(), folders, strict=True):
    _export(trained / run, folder, **flags)
  lines = _alone(WITHOUT_FACEDIST, faces, *folders)
  return dict(zip(EXPORTS, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_a_process_without_facedist_gets_the_embeddings_of_embed(
  served: dict[str, dict],
  trained: pathlib.Path,
  faces: pathlib.Path,
  tmp_path: pathlib.Path,
  name: str,
):
  run, flags = EXPORTS[name]
  output = str(tmp_path / "out.json")
  paths = {"workdir": str(trained / run), "input": str(faces), "output": output}
  embed.main(embed.EmbedConfig(**paths, **flags))
  entries = json.loads(pathlib.Path(output).read_text())["embeddings"]
  expected = [entry["embedding"] for entry in entries]
  # bfloat16 has 8 bits; fused kernels round less often
  tolerance = 0.02 if name == "half" else 1e-5
  assert set(served[name]) == {"serving_default", "serving_encoded"}
  for found in served[name].values():
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.slow
def test_the_command_exports_a_model(run: pathlib.Path, tmp_path: pathlib.Path):
  flags = (f"--workdir={run}", f"--output={tmp_path / 'out'}")
  result = processes.run("facedist.export", *flags)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "out" / "saved_model.pb").exists()
