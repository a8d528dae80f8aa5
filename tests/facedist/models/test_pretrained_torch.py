"""Converted IResNets of arcface_torch, against PyTorch and a NumPy definition."""

import pathlib
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest

from facedist import errors
from facedist.models import network, pretrained
from facedist.models.backbones import iresnet

SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
State = dict[str, np.ndarray]


def network_of(backbone: str = "iresnet18", size: int = SIZE) -> network.FaceNetwork:
  return network.build_network(
    backbone=backbone, image_size=size, embedding_size=16, policy="float32"
  )


class NumpyIResNet:
  """An IResNet18 in the paper's words, on arcface_torch's state dict; no framework.

  Feature maps are float64[batch, channels, height, width] as in PyTorch.
  """

  units = (2, 2, 2, 2)

  def __init__(self, size: int, embedding_size: int) -> None:
    self._rng = np.random.default_rng(1)
    self.state: State = {}
    before = 64
    self._add_conv("conv1", 3, 64, 3)
    self._add_norm("bn1", 64)
    self._add("prelu.weight", 64)
    for stage, filters in enumerate((64, 128, 256, 512), 1):
      for number in range(self.units[stage - 1]):
        name = f"layer{stage}.{number}"
        self._add_norm(f"{name}.bn1", before)
        self._add_conv(f"{name}.conv1", before, filters, 3)
        self._add_norm(f"{name}.bn2", filters)
        self._add(f"{name}.prelu.weight", filters)
        self._add_conv(f"{name}.conv2", filters, filters, 3)
        self._add_norm(f"{name}.bn3", filters)
        if number == 0:
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
    features = self._norm("bn1", self._conv("conv1", features))
    features = self._prelu("prelu", features)
    for stage, count in enumerate(self.units, 1):
      for number in range(count):
        features = self._unit(f"layer{stage}.{number}", features, 1 + (number == 0))
    vector = self._norm("bn2", features).reshape(len(images), -1)
    vector = vector @ self.state["fc.weight"].T + self.state["fc.bias"]
    return self._norm("features", vector)

  def _unit(self, name: str, features: np.ndarray, stride: int) -> np.ndarray:
    inner = self._conv(f"{name}.conv1", self._norm(f"{name}.bn1", features))
    inner = self._prelu(f"{name}.prelu", self._norm(f"{name}.bn2", inner))
    inner = self._norm(f"{name}.bn3", self._conv(f"{name}.conv2", inner, stride))
    if stride > 1:
      features = self._conv(f"{name}.downsample.0", features, stride)
      features = self._norm(f"{name}.downsample.1", features)
    return inner + features

  def _conv(self, name: str, features: np.ndarray, stride: int = 1) -> np.ndarray:
    kernel = self.state[f"{name}.weight"]
    side, pad = kernel.shape[-1], kernel.shape[-1] // 2
    padded = np.pad(features, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

  def _norm(self, name: str, values: np.ndarray) -> np.ndarray:
    mean, variance, scale, offset = (
      self.state[f"{name}.{part}"].reshape(1, -1, *[1] * (values.ndim - 2))
      for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (values - mean) / np.sqrt(variance + 1e-5) * scale + offset

  def _prelu(self, name: str, values: np.ndarray) -> np.ndarray:
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


Load = Callable[..., network.FaceNetwork]


@pytest.fixture
def load(tmp_path: pathlib.Path) -> Load:
  """Loads a state dict into a new network; skips where safetensors is missing."""
  safetensors = pytest.importorskip("safetensors.numpy")

  def load_state(state: State | bytes, *which: object) -> network.FaceNetwork:
    path = tmp_path / "w.safetensors"
    if isinstance(state, bytes):
      path.write_bytes(state)
    else:
      safetensors.save_file(state, str(path))
    built = network_of(*which)
    pretrained.load_weights_file(built, str(path))
    return built

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
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: f"_orig_mod.module.{name}",
    lambda name: f"model.{name}",
    lambda name: f"backbone.{name}",
    lambda name: f"net.{name}",
    lambda name: f"model.backbone._orig_mod.{name}",
    lambda name: f"module.model.net.{name}",
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
    ("", {"head.weight": (7, 16)}),
    ("", {"margin.kernel": (16, 7)}),
    ("module.", {"module.head.weight": (7, 16), "module.head.bias": (7,)}),
    ("backbone.", {"fc.weight": (7, 16)}),
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


def two_networks(state: State) -> State:
  return prefixed("model.", state) | prefixed("net.", state)


@pytest.mark.parametrize(
  ("change", "backbone", "says"),
  [
    (lambda _: b"no", "iresnet18", r"w\.safetensors is not a state dict"),
    (
      lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
      "iresnet18",
      r"w\.safetensors is a Git LFS pointer",
    ),
    (
      lambda state: prefixed("encoder.", state),
      "iresnet18",
      "has networks under the names 'encoder",
    ),
    (two_networks, "iresnet18", r"under the names 'model\.' and 'net\.'"),
    # what may be part of another network is no head
    (with_zeros("attention.weight", 64, 64, 3, 3), "iresnet18", r"has attention\.w"),
    (with_zeros("attention.weight", 7, 5), "iresnet18", r"also has attention\.weight"),
    (
      with_zeros("layer1.2.conv1.weight", 64, 64, 3, 3),  # of a deeper network
      "iresnet18",
      r"it also has layer1\.2\.conv1\.weight",
    ),
    (lambda state: state, "iresnet34", r"iresnet34: it lacks layer1\.2\.bn1"),
    (
      with_zeros("conv1.weight", 32, 3, 3, 3),
      "iresnet18",
      r"conv1\.weight is \[3, 3, 3, 32\] where",
    ),
    (lambda state: state, "tinynet", "not for --backbone=tinynet"),
    *(
      (filled(name, value), "iresnet18", f"{name} has values that are not finite")
      for name, value in (("layer2.1.bn3.running_var", np.nan), ("fc.bias", np.inf))
    ),
  ],
)
def test_weights_that_do_not_fit_are_refused_by_the_first_odd_name(
  model: NumpyIResNet, load: Load, change: Callable, backbone: str, says: str
):
  with pytest.raises(errors.UsageError, match=says):
    load(change(model.state), backbone)


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
  ("ending", "library"), [(".pt", "torch"), (".safetensors", "safetensors")]
)
def test_a_library_that_is_not_installed_is_named(
  ending: str, library: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setitem(sys.modules, library, None)
  path = tmp_path / f"w{ending}"
  path.write_bytes(b"")
  with pytest.raises(errors.UsageError, match=f"pip install {library}"):
    pretrained.load_weights_file(network_of(), str(path))


class StubTensor:
  """As much of a PyTorch tensor as reading one takes: half precision, on a GPU."""

  def __init__(self, values: np.ndarray) -> None:
    self.values = values

  def float(self) -> "StubTensor":
    return StubTensor(self.values.astype(np.float32))

  def numpy(self) -> np.ndarray:
    return self.values


@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_a_file_of_torch_save_is_read_on_the_cpu_and_none_of_its_code_is_run(
  ending: str, monkeypatch: pytest.MonkeyPatch
):
  kernel = np.array([[0.5, -2.0]], np.float16)
  calls = []

  def load(*arguments: object, **options: object) -> dict[str, StubTensor]:
    calls.append((arguments, options))
    return {
      "module.fc.weight": StubTensor(kernel),
      "module.bn1.num_batches_tracked": StubTensor(np.array(7)),
    }

  stub = types.ModuleType("torch")
  stub.load = load
  monkeypatch.setitem(sys.modules, "torch", stub)
  state = pretrained.read_state_dict(f"local{ending}", f"gs://bucket/w{ending}")
  assert calls == [((f"local{ending}",), {"map_location": "cpu", "weights_only": True})]
  assert list(state) == ["module.fc.weight"]
  assert state["module.fc.weight"].dtype == np.float32
  np.testing.assert_array_equal(state["module.fc.weight"], [[0.5, -2.0]])


@pytest.mark.parametrize("name", ["state_dict", "state_dict_backbone", "model"])
def test_of_a_training_checkpoint_the_network_s_state_dict_is_read(
  name: str, monkeypatch: pytest.MonkeyPatch
):
  network_s = {"model.fc.weight": StubTensor(np.ones((2, 2), np.float32))}
  stub = types.ModuleType("torch")
  stub.load = lambda *_, **__: {"epoch": 3, name: network_s, "optimizer": {"lr": 0.1}}
  monkeypatch.setitem(sys.modules, "torch", stub)
  assert list(pretrained.read_state_dict("last.ckpt", "last.ckpt")) == [
    "model.fc.weight"
  ]


@pytest.mark.parametrize("name", ["iresnet18", "iresnet50"])
def test_a_converted_iresnet_embeds_as_pytorch_does(name: str, tmp_path: pathlib.Path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  model = torch_iresnet(torch, iresnet.UNITS[name], SIZE, 16)
  path = str(tmp_path / "iresnet.pt")
  torch.save(model.state_dict(), path)
  built = network_of(name)
  pretrained.load_weights_file(built, path)
  pixels = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()).float()
  with torch.no_grad():
    expected = model(pixels.div(255).sub(0.5).div(0.5)).numpy()
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(built.embed(IMAGES), expected, rtol=1e-4, atol=1e-4)


def torch_iresnet(
  torch: types.ModuleType, units: tuple[int, ...], size: int, embedding_size: int
):
  """Builds an IResNet in PyTorch, in inference mode, with random weights and averages.

  Written from units and output E of arXiv:1801.07698; the names are arcface_torch's.
  """
  nn = torch.nn

  def conv(before: int, after: int, side: int, stride: int):
    return nn.Conv2d(before, after, side, stride, side // 2, bias=False)

  class Unit(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
      super().__init__()
      self.bn1 = nn.BatchNorm2d(before)
      self.conv1 = conv(before, after, 3, 1)
      self.bn2 = nn.BatchNorm2d(after)
      self.prelu = nn.PReLU(after)
      self.conv2 = conv(after, after, 3, stride)
      self.bn3 = nn.BatchNorm2d(after)
      self.downsample = nn.Identity()
      if stride > 1:
        self.downsample = nn.Sequential(
          conv(before, after, 1, stride), nn.BatchNorm2d(after)
        )

    def forward(self, values):
      inner = self.prelu(self.bn2(self.conv1(self.bn1(values))))
      return self.bn3(self.conv2(inner)) + self.downsample(values)

  class IResNet(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.conv1, self.bn1, self.prelu = (
        conv(3, 64, 3, 1),
        nn.BatchNorm2d(64),
        nn.PReLU(64),
      )
      before = 64
      for stage, (after, count) in enumerate(
        zip((64, 128, 256, 512), units, strict=True), 1
      ):
        blocks = [
          Unit(before if i == 0 else after, after, 1 + (i == 0)) for i in range(count)
        ]
        setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        before = after
      self.bn2 = nn.BatchNorm2d(512)
      self.fc = nn.Linear(512 * (size // 16) ** 2, embedding_size)
      self.features = nn.BatchNorm1d(embedding_size)

    def forward(self, images):
      values = self.prelu(self.bn1(self.conv1(images)))
      for stage in (1, 2, 3, 4):
        values = getattr(self, f"layer{stage}")(values)
      return self.features(self.fc(self.bn2(values).flatten(1)))

  torch.manual_seed(1)
  model = IResNet().eval()
  for name, value in model.state_dict().items():
    if name.endswith("running_mean"):
      value.normal_(0, 0.3)
    if name.endswith("running_var"):
      value.uniform_(0.5, 2.0)
  return model
