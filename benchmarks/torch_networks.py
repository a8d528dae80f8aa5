"""The networks of facedist in PyTorch, for the comparison in `benchmarks/gpu.py`.

Modules have the names of facedist's layers with `.` for `_`, so that a test can copy
weights and compare. TensorFlow is not imported: the CUDA libraries of both need not go
together in one process.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from facedist.config import lookup

_RESNET_EPSILON = 1.001e-5  # Keras' in ResNet50
_BGR_MEANS = (103.939, 116.779, 123.68)
_IRESNET_UNITS = {
  "iresnet18": (2, 2, 2, 2),
  "iresnet34": (3, 4, 6, 3),
  "iresnet50": (3, 4, 14, 3),
  "iresnet100": (3, 13, 30, 3),
}
_BOTTLENECKS = (  # of MobileFaceNet: expansion, channels, repeats, stride of a row
  (2, 64, 5, 2),
  (4, 128, 1, 2),
  (2, 128, 6, 1),
  (4, 128, 1, 2),
  (2, 128, 2, 1),
)


class Centred(nn.Module):
  """(x - 127.5) / 127.5."""

  def forward(self, images: Tensor) -> Tensor:
    """Takes and returns float32[batch, S, S, 3]."""
    return images / 127.5 - 1


class BgrMinusMeans(nn.Module):
  """RGB to BGR without ImageNet's channel means."""

  def __init__(self) -> None:
    super().__init__()
    self.register_buffer("means", torch.tensor(_BGR_MEANS), persistent=False)

  def forward(self, images: Tensor) -> Tensor:
    """Takes and returns float32[batch, S, S, 3]."""
    return images.flip(-1) - self.means


def conv(
  before: int, after: int, kernel: int, *, strides: int = 1, groups: int = 1
) -> nn.Conv2d:
  """A convolution without bias, zeros on every side, weights from N(0, 0.1²)."""
  made = nn.Conv2d(
    before, after, kernel, strides, kernel // 2, groups=groups, bias=False
  )
  nn.init.normal_(made.weight, std=0.1)
  return made


class ConvNorm(nn.Module):
  """ResNet50's convolution, which has a bias, and its batch norm."""

  def __init__(self, before: int, after: int, kernel: int, strides: int = 1) -> None:
    super().__init__()
    self.conv = nn.Conv2d(before, after, kernel, strides, kernel // 2)
    self.bn = nn.BatchNorm2d(after, eps=_RESNET_EPSILON)

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    return self.bn(self.conv(features))


class Bottleneck(nn.Module):
  """A block of ResNet50; as in Keras, its first convolution has the stride."""

  def __init__(
    self, before: int, filters: int, *, strides: int, is_first: bool
  ) -> None:
    super().__init__()
    after = 4 * filters
    self.shortcut: nn.Module = nn.Identity()
    if is_first:
      self.shortcut = ConvNorm(before, after, 1, strides)
    self.first = ConvNorm(before, filters, 1, strides)
    self.second = ConvNorm(filters, filters, 3)
    self.third = ConvNorm(filters, after, 1)
    nn.init.zeros_(self.third.bn.weight)

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    inner = functional.relu(self.first(features), inplace=True)
    inner = functional.relu(self.second(inner), inplace=True)
    return functional.relu(self.third(inner) + self.shortcut(features), inplace=True)


def resnet50() -> nn.Module:
  """ResNet50 of Keras applications without its classifier (arXiv:1512.03385)."""
  stages: OrderedDict[str, nn.Module] = OrderedDict(
    conv1=ConvNorm(3, 64, 7, 2),
    relu=nn.ReLU(inplace=True),
    pool=nn.MaxPool2d(3, 2, 1),
  )
  before = 64
  for stage, (filters, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for block in range(1, blocks + 1):
      strides = 2 if block == 1 and stage > 2 else 1
      parts[f"block{block}"] = Bottleneck(
        before, filters, strides=strides, is_first=block == 1
      )
      before = 4 * filters
    stages[f"conv{stage}"] = nn.Sequential(parts)
  return nn.Sequential(stages)


class IResNetUnit(nn.Module):
  """BN-conv-BN-PReLU-conv-BN beside the identity or a strided 1×1 convolution."""

  def __init__(self, before: int, after: int, *, strides: int) -> None:
    super().__init__()
    self.bn1 = nn.BatchNorm2d(before)
    self.conv1 = conv(before, after, 3)
    self.bn2 = nn.BatchNorm2d(after)
    self.prelu = nn.PReLU(after)
    self.conv2 = conv(after, after, 3, strides=strides)
    self.bn3 = nn.BatchNorm2d(after)
    self.downsample: nn.Module = nn.Identity()
    if strides > 1:
      self.downsample = nn.Sequential(
        conv(before, after, 1, strides=strides), nn.BatchNorm2d(after)
      )

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    inner = self.prelu(self.bn2(self.conv1(self.bn1(features))))
    return self.bn3(self.conv2(inner)) + self.downsample(features)


def iresnet(units: tuple[int, ...]) -> nn.Module:
  """An IResNet of so many units in its four stages (arXiv:1801.07698)."""
  parts: OrderedDict[str, nn.Module] = OrderedDict(
    conv1=conv(3, 64, 3), bn1=nn.BatchNorm2d(64), prelu=nn.PReLU(64)
  )
  before = 64
  for stage, (after, count) in enumerate(zip((64, 128, 256, 512), units, strict=True)):
    first = IResNetUnit(before, after, strides=2)
    others = [IResNetUnit(after, after, strides=1) for _ in range(count - 1)]
    parts[f"layer{stage + 1}"] = nn.Sequential(first, *others)
    before = after
  return nn.Sequential(parts)


def _norm_prelu(name: str, layer: nn.Conv2d) -> dict[str, nn.Module]:
  """A convolution, its batch norm and its PReLU, by name."""
  channels = layer.out_channels
  return {
    name: layer,
    f"{name}_bn": nn.BatchNorm2d(channels),
    f"{name}_prelu": nn.PReLU(channels),
  }


class MobileBottleneck(nn.Sequential):
  """Expands by a 1×1 convolution, convolves depthwise, then projects linearly."""

  def __init__(self, before: int, after: int, *, expansion: int, strides: int) -> None:
    inner = expansion * before
    super().__init__(
      OrderedDict(
        **_norm_prelu("expand", conv(before, inner, 1)),
        **_norm_prelu(
          "depthwise", conv(inner, inner, 3, strides=strides, groups=inner)
        ),
        project=conv(inner, after, 1),
        project_bn=nn.BatchNorm2d(after),
      )
    )
    self.is_residual = strides == 1 and before == after

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    inner = super().forward(features)
    return inner + features if self.is_residual else inner


def mobilefacenet() -> nn.Module:
  """MobileFaceNet (arXiv:1804.07573)."""
  parts = _norm_prelu("stem_conv", conv(3, 64, 3, strides=2))
  parts |= _norm_prelu("stem_depthwise", conv(64, 64, 3, groups=64))
  before = 64
  for row, (expansion, channels, repeats, strides) in enumerate(_BOTTLENECKS, 1):
    first = MobileBottleneck(before, channels, expansion=expansion, strides=strides)
    others = [
      MobileBottleneck(channels, channels, expansion=expansion, strides=1)
      for _ in range(repeats - 1)
    ]
    parts[f"bottleneck{row}"] = nn.Sequential(first, *others)
    before = channels
  parts |= _norm_prelu("last_conv", conv(before, 512, 1))
  return nn.Sequential(OrderedDict(parts))


class TinyLayer(nn.Module):
  """3×3 convolution with TensorFlow's padding, group norm over 8 channels, ReLU."""

  def __init__(self, before: int, after: int, *, strides: int) -> None:
    super().__init__()
    self.conv = nn.Conv2d(before, after, 3, strides, bias=False)
    self.norm = nn.GroupNorm(after // 8, after, eps=1e-3)

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    side, strides = features.shape[-1], self.conv.stride[0]
    zeros = 3 - (side % strides or strides)  # the odd one comes last
    before, after = zeros // 2, zeros - zeros // 2
    padded = functional.pad(features, (before, after, before, after))
    return functional.relu(self.norm(self.conv(padded)), inplace=True)


class TinyStage(nn.Module):
  """A strided layer and one residual layer."""

  def __init__(self, before: int, after: int) -> None:
    super().__init__()
    self.down = TinyLayer(before, after, strides=2)
    self.residual = TinyLayer(after, after, strides=1)

  def forward(self, features: Tensor) -> Tensor:
    """Takes and returns float[batch, channels, height, width]."""
    features = self.down(features)
    return features + self.residual(features)


def tinynet() -> nn.Module:
  """The small network of demos and tests."""
  stages = [
    (f"stage{stage}", TinyStage(before, after))
    for stage, (before, after) in enumerate(
      ((3, 32), (32, 64), (64, 128), (128, 192)), 1
    )
  ]
  return nn.Sequential(OrderedDict(stages))


BACKBONES: dict[str, Callable[[], nn.Module]] = {
  "resnet50": resnet50,
  **{
    name: lambda units=units: iresnet(units)  # type: ignore[misc]
    for name, units in _IRESNET_UNITS.items()
  },
  "mobilefacenet": mobilefacenet,
  "tinynet": tinynet,
}


class Mean(nn.Module):
  """Averages over the map."""

  def forward(self, features: Tensor) -> Tensor:
    """Takes float[batch, channels, height, width]; returns float[batch, channels]."""
    return features.mean((2, 3))


class Flatten(nn.Module):
  """Flattens a channels-last map without a copy, in TensorFlow's order."""

  def forward(self, features: Tensor) -> Tensor:
    """Takes float[batch, channels, height, width]; returns float[batch, values]."""
    return features.permute(0, 2, 3, 1).flatten(1)


class Float32(nn.Module):
  """Leaves the 16 bits of autocast, as the embedding layer's batch norm does."""

  def forward(self, features: Tensor) -> Tensor:
    """Takes float[batch, values]; returns float32[batch, values]."""
    return features.float()


def _pooling(
  name: str, channels: int, side: int, dropout: float
) -> dict[str, nn.Module]:
  """The modules between the feature map and the linear layer, by name."""
  drop = nn.Dropout(dropout)
  if name == "avg":
    return {"pool": Mean(), "dropout": drop}
  norm = nn.BatchNorm2d(channels)
  if name == "e_type":
    return {"map_norm": norm, "dropout": drop, "flatten": Flatten()}
  whole_map = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
  return {"gdconv": whole_map, "map_norm": norm, "flatten": Flatten(), "dropout": drop}


class FaceNetwork(nn.Module):
  """A backbone and the embedding layer over it, from pixels to raw embeddings."""

  def __init__(
    self,
    backbone: str,
    *,
    image_size: int,
    embedding_size: int,
    pooling: str,
    dropout: float,
    batch_norm_momentum: float,
  ) -> None:
    """Draws random weights.

    Args:
      backbone: A key of `BACKBONES`.
      image_size: S, height and width in pixels.
      embedding_size: Floats of an embedding.
      pooling: avg, e_type or gdconv.
      dropout: Fraction of features dropped before the linear layer.
      batch_norm_momentum: Of the moving averages, in Keras' sense: near 1.

    Raises:
      errors.UsageError: There is no such backbone.
    """
    super().__init__()
    self.normalise = BgrMinusMeans() if backbone == "resnet50" else Centred()
    self.backbone = lookup(BACKBONES, backbone, "backbone")()
    with torch.no_grad():
      example = torch.zeros(1, 3, image_size, image_size)
      _, channels, side, _ = self.backbone.eval()(example).shape
    self.backbone.train()
    parts = _pooling(pooling, channels, side, dropout)
    values = channels if pooling != "e_type" else channels * side**2
    parts["linear"] = nn.Linear(values, embedding_size, bias=pooling == "e_type")
    parts["float32"] = Float32()
    epsilon = 1e-3 if pooling == "avg" else 1e-5
    parts["norm"] = nn.BatchNorm1d(embedding_size, eps=epsilon)
    self.embedding = nn.Sequential(OrderedDict(parts))
    for module in self.modules():
      if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.momentum = 1 - batch_norm_momentum

  def forward(self, images: Tensor) -> Tensor:
    """Takes float32[batch, S, S, 3] RGB in [0, 255]; returns float32[batch, size]."""
    pixels = self.normalise(images).permute(0, 3, 1, 2)  # channels-last in memory
    return self.embedding(self.backbone(pixels))


def multiply_adds(network: FaceNetwork, image_size: int) -> int:
  """Counts those of one image in convolutions and linear layers, as `cost` does."""
  found = []

  def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
    places = output[0, 0].numel() if output.dim() == 4 else 1
    found.append(places * module.weight.numel())

  kinds = (nn.Conv2d, nn.Linear)
  layers = [module for module in network.modules() if isinstance(module, kinds)]
  hooks = [layer.register_forward_hook(count) for layer in layers]
  device = next(network.parameters()).device
  was_training = network.training
  with torch.no_grad():
    network.eval()(torch.zeros(1, image_size, image_size, 3, device=device))
  network.train(was_training)
  for hook in hooks:
    hook.remove()
  return sum(found)
