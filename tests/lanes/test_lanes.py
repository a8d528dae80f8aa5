"""The two lanes of TensorFlow agree: losses, checkpoints, embeddings, exported models.

Runs where FACEDIST_OTHER_PYTHON names the Python of the other lane's environment:
`make setup TENSORFLOW=2.21 VENV=.venv-2.21`, then
`FACEDIST_OTHER_PYTHON=.venv-2.21/bin/python make test PYTEST_ARGS=tests/lanes`.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import noise_sets

pytestmark = [pytest.mark.slow, pytest.mark.lanes]

ROOT = pathlib.Path(__file__).parents[2]
OTHER = "FACEDIST_OTHER_PYTHON"
# Learning rates. At usual ones, batch norm over 8 images of noise would double the
# difference that rounding makes at every step.
BACKBONES = {"resnet50": 1e-5, "iresnet18": 1e-5, "mobilefacenet": 1e-6}
TRAINED = ("--backbone=mobilefacenet", "--full_rate=0.001", "--ema_decay=0.9")
NUM_STEPS = 20
STOP = 9
SIZE = 32
FLAGS = (
  "--strategy=one",
  "--backbone_weights=none",
  "--embedding_size=32",
  "--global_batch=8",
  "--head_epochs=0",
  "--full_epochs=1",
  "--scale=16",
  "--log_every_steps=1",
  "--checkpoint_every_steps=100",
)
RESUMED = {
  "sharded, EMA": ("--head_sharding=sharded", "--full_rate=0.001", "--ema_decay=0.9"),
  "LAMB, EMA": ("--optimizer=lamb", "--full_rate=0.0005", "--ema_decay=0.9"),
  "AdamW": ("--optimizer=adamw", "--full_rate=0.0001"),
}


@pytest.fixture(scope="module")
def lanes() -> tuple[str, str]:
  """The Pythons of this lane and of the other."""
  other = os.environ.get(OTHER)
  if not other:
    pytest.skip(f"{OTHER} is not set; it names the Python of the other lane")
  here, there = (version(python) for python in (sys.executable, other))
  assert here != there, f"{OTHER}={other} has the same TensorFlow, {here}"
  return sys.executable, other


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Noise of eight identities, 160 images."""
  folder = tmp_path_factory.mktemp("lanes") / "shards"
  noise_sets.write(folder, identities=8, images=NUM_STEPS, size=SIZE, shards=2)
  return folder


def version(python: str) -> str:
  """Returns the version of a Python's TensorFlow."""
  program = "from importlib import metadata; print(metadata.version('tensorflow'))"
  return run(python, "-c", program)


def run(python: str, *words: str) -> str:
  """Runs a Python in the repository to its end; returns what it prints."""
  variables = os.environ | {"PYTHONPATH": str(ROOT)}
  variables.pop("TF_USE_LEGACY_KERAS", None)  # set for this lane alone
  done = subprocess.run(
    [python, *words],
    cwd=ROOT,
    env=variables,
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def train(
  python: str, shards: pathlib.Path, workdir: pathlib.Path, *flags: str
) -> np.ndarray:
  """Trains a run, or the rest of it; returns the losses of all its steps so far."""
  folders = (f"--data_dir={shards}", f"--workdir={workdir}")
  run(python, "-m", "facedist.train", *folders, *FLAGS, *flags)
  rows = map(json.loads, (workdir / "train_metrics.jsonl").read_text().splitlines())
  losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
  return np.array([losses[step] for step in sorted(losses)])


@pytest.mark.parametrize(("backbone", "rate"), BACKBONES.items())
def test_twenty_steps_have_the_same_losses(
  backbone: str, rate: float, lanes, shards: pathlib.Path, tmp_path: pathlib.Path
):
  flags = (f"--backbone={backbone}", f"--full_rate={rate}")
  here, there = (
    train(python, shards, tmp_path / str(place), *flags)
    for place, python in enumerate(lanes)
  )
  assert len(here) == NUM_STEPS
  np.testing.assert_allclose(there, here, rtol=1e-4)


@pytest.mark.parametrize("flags", RESUMED.values(), ids=list(RESUMED))
def test_a_run_of_one_lane_resumes_on_the_other(
  flags: tuple[str, ...], lanes, shards: pathlib.Path, tmp_path: pathlib.Path
):
  flags = ("--backbone=tinynet", *flags)
  whole = train(lanes[0], shards, tmp_path / "whole", *flags)
  assert len(whole) == NUM_STEPS
  for first, second in (lanes, lanes[::-1]):
    workdir = tmp_path / ("out" if first == lanes[0] else "back")
    head = train(first, shards, workdir, *flags, f"--stop_after_steps={STOP}")
    assert len(head) == STOP
    found = train(second, shards, workdir, *flags)
    np.testing.assert_allclose(found, whole, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(
  lanes: tuple[str, str], shards: pathlib.Path, tmp_path_factory
) -> pathlib.Path:
  """A run of this lane, with an average of its weights."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train(lanes[0], shards, workdir, *TRAINED)
  return workdir


def embed(python: str, shards: pathlib.Path, workdir: pathlib.Path) -> np.ndarray:
  """Embeds the images of the shards with the newest checkpoint of a run."""
  output = workdir.parent / "embeddings.json"
  output.unlink(missing_ok=True)
  words = (f"--workdir={workdir}", f"--input={shards}", f"--output={output}")
  run(python, "-m", "facedist.embed", *words)
  entries = json.loads(output.read_text())["embeddings"]
  return np.array([each["embedding"] for each in entries])


def test_embeddings_of_one_checkpoint_agree(
  lanes: tuple[str, str], shards: pathlib.Path, trained: pathlib.Path
):
  here, there = (embed(python, shards, trained) for python in lanes)
  np.testing.assert_allclose(there, here, atol=1e-5)


SERVE = """
import json, sys
import numpy as np, tensorflow as tf
embed = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
found = embed(images=tf.constant(np.load(sys.argv[2])))["embeddings"]
print(json.dumps(found.numpy().tolist()))
"""


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_exported_by_one_lane_is_served_by_the_other(
  place: int, lanes: tuple[str, str], trained: pathlib.Path, tmp_path: pathlib.Path
):
  exporter, server = lanes[place], lanes[1 - place]
  model = tmp_path / "model"
  run(exporter, "-m", "facedist.export", f"--workdir={trained}", f"--output={model}")
  images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
  np.save(tmp_path / "images.npy", images)
  words = ("-c", SERVE, str(model), str(tmp_path / "images.npy"))
  ours, theirs = (json.loads(run(python, *words)) for python in (exporter, server))
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(theirs, ours, atol=1e-5)
