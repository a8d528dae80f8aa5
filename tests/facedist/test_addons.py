"""facedist.addons: our own functions against tensorflow-addons, and without it."""

import json
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow as tf

from facedist import addons, embed, errors, evaluate, train
from facedist.data import noise
from facedist.data.shards import manifest
from facedist.training import metric_writer
from tests import test_configs
from tfrecords_tools import build
from tfrecords_tools.builder import options

CONFIG = test_configs.FOLDER / "mnist_vgg8_arcface.flags"
LAMB = {
  "learning_rate": 0.1,
  "weight_decay": 0.01,
  "beta_1": 0.8,
  "beta_2": 0.9,
  "epsilon": 1e-6,
  "exclude_from_weight_decay": ["bias", "scale"],
  "exclude_from_layer_adaptation": ["bias"],
}


@pytest.fixture
def package():
  """tensorflow_addons; skips where this TensorFlow has none."""
  if addons.get("lamb") is addons.Lamb:
    pytest.skip("tensorflow-addons is of the reference lane alone")
  return addons.get


def test_addons_are_imported_when_asked_for_and_silently(package):
  program = (
    "import sys\n"
    "from facedist import addons\n"
    "print('tensorflow_addons' in sys.modules)\n"
    "addons.get('lamb')\n"
    "print(sys.modules['tensorflow_addons'].__version__)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  )
  assert run.stdout.split() == ["False", "0.23.0"]
  assert run.stderr == ""


@pytest.mark.parametrize("name", addons.FEATURES)
def test_without_the_package_our_own_serves(name: str, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  assert addons.get(name) is addons.FEATURES[name][1]


@pytest.mark.parametrize("metric", ["L2", "squared-L2"])
@pytest.mark.parametrize("name", ["triplet_semihard", "triplet_hard"])
@pytest.mark.parametrize("seed", range(4))
def test_our_losses_and_gradients_are_the_package_s(
  name: str, metric: str, seed: int, package
):
  rng = np.random.default_rng(seed)
  labels = tf.constant(rng.integers(0, 5, 24), tf.int32)
  vectors = rng.normal(size=(24, 6)) + 2 * rng.normal(size=(5, 6))[labels.numpy()]
  vectors = tf.constant(vectors / np.linalg.norm(vectors, axis=1)[:, None], tf.float32)
  results = []
  for function in (package(name), addons.FEATURES[name][1]):
    with tf.GradientTape() as tape:
      tape.watch(vectors)
      loss = function(labels, vectors, 0.4, distance_metric=metric)
    results.append((loss.numpy(), tape.gradient(loss, vectors).numpy()))
  assert results[0][0] > 0.01
  np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
  np.testing.assert_allclose(results[1][1], results[0][1], atol=1e-6)


@pytest.mark.parametrize("side", [0, 2, 6, 20])
def test_cutout_covers_the_square_that_the_package_s_does(side: int):
  package = pytest.importorskip("tensorflow_addons")
  rng = np.random.default_rng(side)
  images = tf.constant(rng.normal(size=(40, 9, 12, 3)), tf.float32)
  centers = tf.constant(rng.integers(0, (9, 12), (40, 2)), tf.int32)
  expected = package.image.cutout(images, side, centers, 7.0)
  np.testing.assert_array_equal(addons.cutout(images, side, centers, 7.0), expected)


def trained(make, gradients) -> tuple[tf.keras.optimizers.Optimizer, list[tf.Variable]]:
  """Three variables after an update for each gradient, and their optimizer."""
  rng = np.random.default_rng(0)
  variables = [
    tf.Variable(rng.normal(size=shape), name=name, dtype=tf.float32)
    for name, shape in {"kernel": [4, 3], "bias": [3], "scale": [3]}.items()
  ]
  variables.append(tf.Variable(tf.zeros([2]), name="zero"))  # has no trust ratio
  optimizer = make(**LAMB)
  optimizer._create_all_weights(variables)
  for scale in gradients:
    update = [
      tf.constant(scale * np.cos(np.arange(v.shape.num_elements())), tf.float32)
      for v in variables
    ]
    shaped = [tf.reshape(g, v.shape) for g, v in zip(update, variables, strict=True)]
    optimizer.apply_gradients(zip(shaped, variables, strict=True))
  return optimizer, variables


def test_our_lamb_updates_as_the_package_s(package):
  updates = [1.0, -0.5, 3.0, 0.0, 0.25]
  _, theirs = trained(package("lamb"), updates)
  _, ours = trained(addons.Lamb, updates)
  for one, other in zip(theirs, ours, strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-7, err_msg=one.name)


@pytest.mark.parametrize("saves_ours", [True, False])
def test_a_checkpoint_of_one_lamb_is_restored_by_the_other(
  saves_ours: bool, package, tmp_path: pathlib.Path
):
  first, second = (addons.Lamb, package("lamb"))[:: 1 if saves_ours else -1]
  optimizer, variables = trained(first, [1.0, -0.5])
  path = tf.train.Checkpoint(optimizer=optimizer, variables=variables).write(
    str(tmp_path / "lamb")
  )
  other, restored = trained(second, [])
  state = tf.train.Checkpoint(optimizer=other, variables=restored)
  state.read(path).assert_consumed()
  assert other.iterations.numpy() == 2
  for slot in "mv":
    for one, two in zip(variables, restored, strict=True):
      np.testing.assert_array_equal(
        optimizer.get_slot(one, slot), other.get_slot(two, slot)
      )


@pytest.mark.slow
def test_digits_are_trained_scored_and_drawn_where_addons_cannot_be_imported(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  digits, workdir, pairs = (str(tmp_path / name) for name in ("digits", "run", "pairs"))
  building = options.BuildConfig(
    dataset="digits",
    output_dir=digits,
    image_size=16,
    val_fraction=0.1,
    max_images_per_identity=30,
    num_processes=1,
  )
  build.main(building)
  flags = (f"--flagfile={CONFIG}", f"--data_dir={digits}", f"--workdir={workdir}")
  small = ("--global_batch=32", "--full_epochs=3", "--log_every_steps=10")
  train.main(test_configs.parse(*flags, *small))
  losses = [loss for _, loss in metric_writer.step_losses(workdir)]
  assert len(losses) == 29  # 3 epochs of 300 images, 32 a step; the last step is whole
  assert np.mean(losses[-7:]) < np.mean(losses[:7])

  noise.write_noise_verification_set(pairs, num_pairs=4, folds=2, image_size=16, seed=0)
  scoring = evaluate.EvaluateConfig(workdir, pairs, once=True)
  assert evaluate.main(scoring) == errors.ExitCode.DONE
  rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert json.loads(rows[-1])["step"] == 29

  picture, document = tmp_path / "sphere.png", tmp_path / "digits.json"
  drawing = embed.EmbedConfig(
    workdir=workdir, input=digits, output=str(document), split="val", plot=str(picture)
  )
  assert embed.main(drawing) == errors.ExitCode.DONE
  held_out = manifest.load(digits).split("val", digits).records
  embeddings = json.loads(document.read_text())["embeddings"]
  assert len(embeddings) == held_out
  assert {entry["identity"] for entry in embeddings} == set("0123456789")
  assert cv2.imread(str(picture)).shape == (530, 1000, 3)
