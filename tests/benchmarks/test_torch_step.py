"""The networks and the training step in PyTorch, against TensorFlow's."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import cost, gpu
from facedist.data import augment, noise
from facedist.models import network
from facedist.training import metrics, schedules, step_health, train_state, train_step
from facedist.training.config import TrainConfig, resolve

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
torch_networks = importlib.import_module("benchmarks.torch_networks")
torch_step = importlib.import_module("benchmarks.torch_step")

SIZE, BATCH, STEPS = 32, 8, 3
RATE = 0.0005  # higher ones enlarge the rounding errors of small batches
PARTS = {
  "kernel": "weight",
  "depthwise_kernel": "weight",
  "bias": "bias",
  "alpha": "weight",
  "gamma": "weight",
  "beta": "bias",
  "moving_mean": "running_mean",
  "moving_variance": "running_var",
}
"""Names of a layer's weights in PyTorch, by Keras'."""
RESNET_PARTS = {"shortcut": "0", "first": "1", "second": "2", "third": "3"}
BIASED = ("embedding_norm", "running_var")
"""Of a vector, Keras averages the biased variance and PyTorch the unbiased one."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
  """On a busy machine, PyTorch's threads wait for each other most of the time."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def job_of(backbone: str, run_config: TrainConfig, **others: Any) -> Any:
  """Returns the job of a case on the CPU."""
  case = gpu.Case(backbone, BATCH, "float32", "off", "constant", "torch")
  fields = gpu.torch_job(
    case, run_config, image_size=SIZE, steps=STEPS, folder="", gpus=[]
  )
  return torch_step.Job(**fields | others)


def torch_key(key: str) -> tuple[str, str]:
  """Returns a tensor's layer and part, the layer by its name in facedist."""
  *names, part = key.split(".")
  return "_".join(RESNET_PARTS.get(name, name) for name in names), part


def torch_values(model: Any) -> dict[tuple[str, str], Any]:
  """Returns all tensors of the network, to read or to write."""
  return {
    torch_key(key): value
    for key, value in model.network.state_dict().items()
    if not key.endswith("num_batches_tracked")
  }


def tensorflow_values(built: network.FaceNetwork) -> dict[tuple[str, str], np.ndarray]:
  """Returns all weights and averages of the network in PyTorch's order of axes."""
  found = {}
  for half in ("backbone", "embedding"):
    for layer in getattr(built, half).layers:
      for weight in layer.weights:
        part = weight.name.split(":")[0].rsplit("/", 1)[-1]
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(weight.shape.rank)
        if part == "depthwise_kernel":
          axes = (2, 3, 0, 1)
        value = np.transpose(weight.numpy(), axes) if axes else weight.numpy()
        found[f"{half}_{layer.name}", PARTS[part]] = value
  return found


def copy(built: network.FaceNetwork, model: Any) -> None:
  """Copies all weights and averages to PyTorch, where none is left over."""
  targets, values = torch_values(model), tensorflow_values(built)
  assert targets.keys() == values.keys()
  for key, value in values.items():
    targets[key].copy_(torch.from_numpy(value.reshape(targets[key].shape).copy()))


@pytest.mark.slow
@pytest.mark.parametrize(
  "backbone", ["resnet50", "iresnet18", "mobilefacenet", "tinynet"]
)
def test_three_steps_and_an_embedding_are_those_of_tensorflow(backbone: str):
  run_config = resolve(
    TrainConfig(
      backbone=backbone,
      backbone_weights="none",
      global_batch=BATCH,
      dropout=0.0,
      batch_norm_momentum=0.6,
      margin=0.2,
      scale=16.0,
      momentum=0.8,
      weight_decay=0.5,
    )
  )
  strategy = tf.distribute.OneDeviceStrategy("CPU:0")
  state = train_state.build_train_state(
    strategy, run_config, image_size=SIZE, num_identities=gpu.IDENTITIES
  )
  rng = np.random.default_rng(1)
  for weight in state.backbone_variables:
    if weight.shape.rank == 1:  # residual blocks must not start as the identity
      weight.assign_add(rng.normal(0, 0.1, weight.shape))
  job = job_of(backbone, run_config, learning_rate=RATE)
  model = torch_step.FaceModel(job).to(memory_format=torch.channels_last)
  copy(state.network, model)
  assert_same_size(state.network, model)
  with torch.no_grad():
    model.class_weights.copy_(torch.from_numpy(state.head.class_weights.numpy()))

  images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
  labels = rng.integers(0, gpu.IDENTITIES, BATCH)
  draws = rng.random((BATCH, augment.NUM_DRAWS), np.float32)
  expected = tensorflow_losses(strategy, state, run_config, images, labels, draws)
  step = torch_step.make_step(model, job)
  batch = [torch.from_numpy(each) for each in (images, labels, draws[:, 0] < 0.5)]
  losses = [float(step(*batch)) for _ in range(STEPS)]
  assert expected[0] > 1.02 * expected[-1]
  np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
  # A step enlarges the rounding errors of batch norm over few pixels.
  np.testing.assert_allclose(losses, expected, rtol=1e-3)

  found = torch_values(model)
  for key, value in tensorflow_values(state.network).items():
    if key != BIASED:
      wrong = np.linalg.norm(found[key].numpy().ravel() - value.ravel())
      assert wrong <= 3e-3 * np.linalg.norm(value) + 1e-5, key
  copy(state.network, model)
  with torch.no_grad():
    embeddings = model.network.eval()(torch.from_numpy(images).float()).numpy()
  assert np.std(embeddings) > 0.01
  np.testing.assert_allclose(embeddings, state.network.embed(images), atol=1e-4)


def tensorflow_losses(
  strategy: tf.distribute.Strategy,
  state: train_state.TrainState,
  run_config: TrainConfig,
  images: np.ndarray,
  labels: np.ndarray,
  draws: np.ndarray,
) -> np.ndarray:
  """Trains on one batch with the loop that facedist.train runs."""
  batch = {
    "image": images,
    "label": labels.astype(np.int32),
    "draws": draws,
    "damaged": np.zeros(BATCH, np.float32),
  }
  dataset = tf.data.Dataset.from_tensors(batch).repeat()
  phase = schedules.Phase("full", 0, 10**6, 0, RATE, RATE, tf.ones_like)
  settings = train_step.settings_of(run_config)
  health = step_health.StepHealth()
  loop = train_step.train_loop(state, phase, settings, strategy, health)
  iterator = iter(strategy.distribute_datasets_from_function(lambda _: dataset))
  rows = loop(iterator, tf.constant(STEPS))[0].numpy()
  return rows[:, metrics.COLUMNS.index("loss")] / BATCH


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["iresnet50", "iresnet100"])
def test_embeddings_of_a_deep_iresnet_are_those_of_tensorflow(backbone: str):
  run_config = resolve(
    TrainConfig(backbone=backbone, backbone_weights="none", dropout=0.0)
  )
  built = train_state.network_from_config(run_config, SIZE)
  model = torch_step.FaceModel(job_of(backbone, run_config))
  copy(built, model)
  assert_same_size(built, model)
  images = np.random.default_rng(2).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
  expected = built.embed(images, training=True)  # else random weights give 1e23
  with torch.no_grad():
    embeddings = model.network(torch.from_numpy(images).float()).numpy()
  np.testing.assert_allclose(embeddings, expected, atol=1e-3)


def assert_same_size(built: network.FaceNetwork, model: Any) -> None:
  """Compares parameters and multiply-adds."""
  layers = (built.backbone, built.embedding)
  counted = sum(each.numel() for each in model.network.parameters())
  assert counted == cost.parameters(*layers)
  assert torch_networks.multiply_adds(model.network, SIZE) == cost.multiply_adds(
    *layers
  )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
  folder = str(tmp_path_factory.mktemp("shards"))
  noise.write_noise_shards(
    folder,
    num_identities=gpu.IDENTITIES,
    images_per_identity=1,
    val_images_per_identity=0,
    image_size=SIZE,
    num_shards=2,
    seed=0,
  )
  return folder


def run_job(**changes: Any) -> subprocess.CompletedProcess[str]:
  """Measures tinynet in processes of its own."""
  run_config = resolve(TrainConfig(backbone="tinynet", backbone_weights="none"))
  job = dataclasses.asdict(job_of("tinynet", run_config, **changes))
  program = "from benchmarks import torch_step; torch_step.run_worker()"
  return subprocess.run(
    [sys.executable, "-c", program, json.dumps(job)],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"OMP_NUM_THREADS": "1"},
  )


@pytest.mark.slow
def test_two_replicas_train_on_shards(shards: str):
  done = run_job(input="shards", folder=shards, num_replicas=2)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  rate = found["images_per_second"] * found["step_seconds"]
  assert rate == pytest.approx(2 * BATCH)


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_the_reason(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  monkeypatch.setenv("CXX", "/no/such/compiler")
  monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
  done = run_job(is_compiled=True)
  assert done.returncode == 1
  assert "No working C++ compiler" in done.stderr.strip().splitlines()[-1]
