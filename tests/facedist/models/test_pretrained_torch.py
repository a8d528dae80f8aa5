"""Converted IResNets of arcface_torch, against a definition in NumPy."""

import pathlib
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from facedist import errors
from facedist.models import network, pretrained

SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
State = dict[str, np.ndarray]


def network_of(backbone: str = "iresnet18", size: int = SIZE) -> network.FaceNetwork:
  return network.build_network(
    backbone=backbone, image_size=size, embedding_size=16, policy="float32"
  )


UNITS = [  # name, filters, stride
  (f"layer{stage}.{number}", filters, 2 - number)
  for stage, filters in enumerate((64, 128, 256, 512), 1)
  for number in (0, 1)
]


class NumpyIResNet:
  """An IResNet18 in the paper's words, on arcface_torch's state dict; no framework.

  Feature maps are float64[batch, channels, height, width] as in PyTorch.
  """

  def __init__(self, size: int, embedding_size: int) -> None:
    self._rng = np.random.default_rng(1)
    self.state: State = {}
    before = 64
    self._add_conv("conv1", 3, 64, 3)
    self._add_norm("bn1", 64)
    self._add("prelu.weight", 64)
    for name, filters, stride in UNITS:
      self._add_norm(f"{name}.bn1", before)
      self._add_conv(f"{name}.conv1", before, filters, 3)
      self._add_norm(f"{name}.bn2", filters)
      self._add(f"{name}.prelu.weight", filters)
      self._add_conv(f"{name}.conv2", filters, filters, 3)
      self._add_norm(f"{name}.bn3", filters)
      if stride > 1:
        self._add_conv(f"{name}.downsample.0", before, filters, 1)
        self._add_norm(f"{name}.downsample.1", filters)
      before = filters
    values = 512 * (size // 16) ** 2
    self._add_norm("bn2", 512)
    self._add("fc.weight", embedding_size, values, scale=values**-0.5)
    self._add("fc.bias", embedding_size)
    self._add_norm("features", embedding_size)

  def embed(self, images: np.ndarray) -> np.ndarray:
    """Takes uint8[batch, S, S, 3] RGB, returns float64[batch, embedding]."""
    features = ((images / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    features = self.norm("bn1", self.conv("conv1", features))
    features = self.prelu("prelu", features)
    for name, _, stride in UNITS:
      inner = self.conv(f"{name}.conv1", self.norm(f"{name}.bn1", features))
      inner = self.prelu(f"{name}.prelu", self.norm(f"{name}.bn2", inner))
      inner = self.norm(f"{name}.bn3", self.conv(f"{name}.conv2", inner, stride))
      if stride > 1:
        features = self.conv(f"{name}.downsample.0", features, stride)
        features = self.norm(f"{name}.downsample.1", features)
      features = inner + features
    vector = self.norm("bn2", features).reshape(len(images), -1)
    vector = vector @ self.state["fc.weight"].T + self.state["fc.bias"]
    return self.norm("features", vector)

  def conv(self, name: str, features: np.ndarray, stride: int = 1) -> np.ndarray:
    kernel = self.state[f"{name}.weight"]
    side, pad = kernel.shape[-1], kernel.shape[-1] // 2
    padded = np.pad(features, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

  def norm(self, name: str, values: np.ndarray) -> np.ndarray:
    mean, variance, scale, offset = (
      self.state[f"{name}.{part}"].reshape(1, -1, *[1] * (values.ndim - 2))
      for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (values - mean) / np.sqrt(variance + 1e-5) * scale + offset

  def prelu(self, name: str, values: np.ndarray) -> np.ndarray:
    slopes = self.state[f"{name}.weight"].reshape(1, -1, 1, 1)
    return np.where(values > 0, values, slopes * values)

  def _add_conv(self, name: str, before: int, after: int, side: int) -> None:
    scale = (before * side * side) ** -0.5
    self._add(f"{name}.weight", after, before, side, side, scale=scale)

  def _add_norm(self, name: str, channels: int) -> None:
    for part in ("weight", "bias", "running_mean", "running_var"):
      self._add(f"{name}.{part}", channels)
    for part in ("weight", "running_var"):
      self.state[f"{name}.{part}"] = 0.5 + np.abs(self.state[f"{name}.{part}"])
    self.state[f"{name}.num_batches_tracked"] = np.array(7)

  def _add(self, name: str, *shape: int, scale: float = 0.3) -> None:
    self.state[name] = self._rng.normal(0, scale, shape).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> NumpyIResNet:
  return NumpyIResNet(SIZE, 16)


@pytest.fixture(scope="module")
def built() -> network.FaceNetwork:
  return network_of()


@pytest.fixture
def blank(built: network.FaceNetwork) -> network.FaceNetwork:
  """An IResNet18 whose weights are all zero."""
  for weight in (*built.backbone.weights, *built.embedding.weights):
    weight.assign(tf.zeros_like(weight))
  return built


Load = Callable[[State | bytes], network.FaceNetwork]


@pytest.fixture
def load(blank: network.FaceNetwork, tmp_path: pathlib.Path) -> Load:
  """Loads a state dict; skips where safetensors is missing."""
  safetensors = pytest.importorskip("safetensors.numpy")

  def load_state(state: State | bytes) -> network.FaceNetwork:
    path = tmp_path / "w.safetensors"
    path.write_bytes(state if isinstance(state, bytes) else safetensors.save(state))
    pretrained.load_weights_file(blank, str(path))
    return blank

  return load_state


def assert_embeds_as(built: network.FaceNetwork, model: NumpyIResNet) -> None:
  expected = model.embed(IMAGES)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(built.embed(IMAGES), expected, rtol=1e-4, atol=1e-4)


def prefixed(prefix: str, state: State) -> State:
  return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: name,  # as arcface_torch saves it
    *(
      lambda name, prefix=prefix: f"{prefix}.{name}"
      for prefix in ("module._orig_mod", "backbone", "module.model.net")
    ),
    lambda name: name.replace("layer2.", "layer2._orig_mod."),  # compiled alone
  ],
)
def test_a_converted_iresnet_embeds_as_its_definition_under_the_names_of_wrappers(
  model: NumpyIResNet, load: Load, rename: Callable[[str], str]
):
  built = load({rename(name): value for name, value in model.state.items()})
  assert_embeds_as(built, model)


@pytest.mark.parametrize(
  ("prefix", "head"),
  [
    ("", {"margin.kernel": (16, 7)}),
    ("module.", {"module.head.weight": (7, 16), "module.head.bias": (7,)}),
    ("model.backbone.", {"model.head.weight": (7, 16), "loss.scale": ()}),
  ],
)
def test_a_head_beside_the_network_is_left_out_and_told(
  model: NumpyIResNet, load: Load, caplog, prefix: str, head: dict[str, tuple[int, ...]]
):
  beside = {name: np.ones(shape, np.float32) for name, shape in head.items()}
  with caplog.at_level("INFO", logger="absl"):
    built = load(prefixed(prefix, model.state) | beside)
  named = ", ".join(sorted(name.removeprefix(prefix) for name in head))
  assert f"ignored beside the network: {named}" in caplog.text
  assert_embeds_as(built, model)


def with_zeros(name: str, *shape: int) -> Callable[[State], State]:
  return lambda state: state | {name: np.zeros(shape, np.float32)}


def filled(name: str, value: float) -> Callable[[State], State]:
  return lambda state: state | {name: np.full_like(state[name], value)}


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda _: b"no", r"w\.safetensors is not a state dict"),
    (
      lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
      r"w\.safetensors is a Git LFS pointer",
    ),
    (
      lambda state: prefixed("encoder.", state),
      "has networks under the names 'encoder",
    ),
    (
      lambda state: prefixed("model.", state) | prefixed("net.", state),
      r"under the names 'model\.' and 'net\.'",
    ),
    # what may be part of another network is no head
    (with_zeros("attention.weight", 64, 64, 3, 3), r"has attention\.w"),
    (with_zeros("attention.weight", 7, 5), r"also has attention\.weight"),
    # of a deeper network, and of one whose layer has another shape
    (
      with_zeros("layer1.2.conv1.weight", 64, 64, 3, 3),
      r"it also has layer1\.2\.conv1\.weight",
    ),
    (
      lambda state: {name: state[name] for name in state if "layer1.1.bn1" not in name},
      r"iresnet18: it lacks layer1\.1\.bn1",
    ),
    (
      with_zeros("conv1.weight", 32, 3, 3, 3),
      r"conv1\.weight is \[3, 3, 3, 32\] where",
    ),
    *(
      (filled(name, value), f"{name} has values that are not finite")
      for name, value in (("layer2.1.bn3.running_var", np.nan), ("fc.bias", np.inf))
    ),
  ],
)
def test_weights_that_do_not_fit_are_refused_by_the_first_odd_name(
  model: NumpyIResNet, load: Load, change: Callable, says: str
):
  with pytest.raises(errors.UsageError, match=says):
    load(change(model.state))


def test_at_another_image_size_the_backbone_alone_is_taken(
  model: NumpyIResNet, tmp_path: pathlib.Path
):
  safetensors = pytest.importorskip("safetensors.numpy")
  safetensors.save_file(model.state, str(tmp_path / "w.safetensors"))
  built = network_of(size=48)
  before = built.embedding.get_weights()
  pretrained.load_weights_file(built, str(tmp_path / "w.safetensors"))
  kernel = built.backbone.get_layer("layer3_1_conv2").kernel
  expected = model.state["layer3.1.conv2.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(kernel, expected)
  for old, new in zip(before, built.embedding.get_weights(), strict=True):
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
  ("backbone", "ending", "is_installed", "says"),
  [
    ("iresnet18", ".pt", False, "pip install torch"),
    ("iresnet18", ".safetensors", False, "pip install safetensors"),
    ("tinynet", ".pt", True, "not for --backbone=tinynet"),
  ],
)
def test_a_missing_library_and_a_backbone_without_such_weights_are_named(
  backbone: str,
  ending: str,
  is_installed: bool,
  says: str,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
):
  if not is_installed:
    monkeypatch.setitem(sys.modules, says.removeprefix("pip install "), None)
  path = tmp_path / f"w{ending}"
  path.write_bytes(b"")
  with pytest.raises(errors.UsageError, match=says):
    pretrained.check_weights_file(backbone, str(path))


class StubTensor:
  """As much of a PyTorch tensor as reading one takes: half precision, on a GPU."""

  def __init__(self, values: np.ndarray) -> None:
    self.values = values

  def float(self) -> "StubTensor":
    return StubTensor(self.values.astype(np.float32))

  def numpy(self) -> np.ndarray:
    return self.values


@pytest.mark.parametrize(
  ("ending", "wrap"),
  [
    (".pt", lambda state: state),
    (".pth", lambda state: {"state_dict": state, "epoch": 3}),
    (".pt", lambda state: {"state_dict_backbone": state}),
    (".ckpt", lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
  ],
)
def test_a_file_of_torch_save_is_read_on_the_cpu_and_none_of_its_code_is_run(
  ending: str, wrap: Callable, monkeypatch: pytest.MonkeyPatch
):
  kernel = np.array([[0.5, -2.0]], np.float16)
  calls = []

  def load(*arguments: object, **options: object) -> dict:
    calls.append((arguments, options))
    tracked = StubTensor(np.array(7))
    names = ("module.fc.weight", "module.bn1.num_batches_tracked")
    return wrap(dict(zip(names, (StubTensor(kernel), tracked), strict=True)))

  stub = types.ModuleType("torch")
  stub.load = load
  monkeypatch.setitem(sys.modules, "torch", stub)
  state = pretrained.read_state_dict(f"local{ending}", f"gs://bucket/w{ending}")
  assert calls == [((f"local{ending}",), {"map_location": "cpu", "weights_only": True})]
  assert list(state) == ["module.fc.weight"]
  assert state["module.fc.weight"].dtype == np.float32
  np.testing.assert_array_equal(state["module.fc.weight"], [[0.5, -2.0]])


def test_a_checkpoint_that_pytorch_itself_wrote_is_read(
  model: NumpyIResNet, blank: network.FaceNetwork, tmp_path: pathlib.Path
):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  state = {name: torch.from_numpy(value) for name, value in model.state.items()}
  torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.ckpt")
  pretrained.load_weights_file(blank, str(tmp_path / "w.ckpt"))
  assert_embeds_as(blank, model)


def test_the_definition_s_layers_are_those_of_pytorch(model: NumpyIResNet):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  functional = torch.nn.functional
  tensor = {name: torch.from_numpy(value) for name, value in model.state.items()}
  features = np.random.default_rng(2).normal(size=(2, 64, 9, 9)).astype(np.float32)
  given = torch.from_numpy(features)
  norm = (
    tensor[f"bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
  )
  kernel = tensor["layer1.0.conv2.weight"]
  strided = model.conv("layer1.0.conv2", features, 2)
  for found, expected in (
    (model.norm("bn1", features), functional.batch_norm(given, *norm)),
    (model.prelu("prelu", features), functional.prelu(given, tensor["prelu.weight"])),
    (strided, functional.conv2d(given, kernel, stride=2, padding=1)),
  ):
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
