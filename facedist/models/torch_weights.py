"""The state dict of an arcface_torch IResNet, as the weights of ours.

Names there are ours with `.` for `_` (`layer1.0.conv1.weight`); kernels are
[out, in, height, width] instead of [height, width, in, out], and the linear layer of
output E reads the map as [channels, height, width], not [height, width, channels].
"""

import importlib.util
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from absl import logging

from facedist import errors
from facedist.models import iresnet

State = Mapping[str, np.ndarray]
"""A PyTorch state dict: float32 arrays by name."""

_OUTPUT = {"map_norm": "bn2", "linear": "fc", "norm": "features"}
"""Names of output E's layers in arcface_torch, by ours."""

_PARTS = {
  "kernel": "weight",
  "bias": "bias",
  "alpha": "weight",
  "gamma": "weight",
  "beta": "bias",
  "moving_mean": "running_mean",
  "moving_variance": "running_var",
}
"""Names of a layer's weights in PyTorch, by Keras'."""


def check(backbone: str, source: str) -> None:
  """Raises UsageError for a backbone that has no weights there, or no reader here."""
  if backbone not in iresnet.UNITS:
    raise errors.UsageError(
      f"--backbone_weights={source}: PyTorch's weights are taken for "
      f"{', '.join(iresnet.UNITS)}, not for --backbone={backbone}; take one of them or "
      "other weights."
    )
  library = _library(source)
  if importlib.util.find_spec(library) is None:
    raise errors.UsageError(
      f"--backbone_weights={source} is read by {library}, which is not installed; "
      f"pip install {library}."
    )


def _library(source: str) -> str:
  """Returns what reads a file of this name."""
  return "safetensors" if source.endswith(".safetensors") else "torch"


def read(path: str, source: str) -> State:
  """Reads a .safetensors file, or one that torch.save wrote, without running its code.

  Args:
    path: A local file.
    source: What the user called it.

  Raises:
    errors.UsageError: The library that reads it is not installed, or it is no state
      dict.
  """
  library = _library(source)
  try:
    found = _read_safetensors(path) if library == "safetensors" else _read_torch(path)
  except ImportError as error:
    raise errors.UsageError(
      f"--backbone_weights={source} is read by {library}, which cannot be imported "
      f"({error}); pip install {library}."
    ) from error
  except Exception as error:  # each library has errors of its own, RuntimeError above
    reason = str(error).strip().splitlines()[0]
    raise errors.UsageError(
      f"--backbone_weights={source} is no state dict ({reason}); give the file that "
      f"{library} saved of a model's state_dict()."
    ) from error
  return {
    name.removeprefix("module."): value
    for name, value in found.items()
    if not name.endswith("num_batches_tracked")
  }


def assign(
  backbone: tf.keras.Model, embedding: tf.keras.Model, state: State, source: str
) -> None:
  """Sets the backbone's weights, and the embedding layer's where all of them fit.

  Raises:
    errors.UsageError: The state dict is of another network.
  """
  targets = {
    key: weight
    for layer in backbone.layers
    for key, weight in _keys(layer, layer.name.replace("_", "."))
  }
  inner = {key for key in state if key.split(".")[0] not in _OUTPUT.values()}
  odd = [f"it lacks {key}" for key in sorted(targets.keys() - inner)]
  odd += [f"it also has {key}" for key in sorted(inner - targets.keys())]
  values = {} if odd else {key: _converted(state[key]) for key in targets}
  odd += _misfits(targets, values)
  if odd:
    raise errors.UsageError(
      f"--backbone_weights={source} does not fit --backbone={backbone.name}: {odd[0]}; "
      "name the IResNet that it was saved of."
    )
  _set(targets, values)
  _assign_embedding(embedding, state, source, map_shape=backbone.output_shape[1:])


def _assign_embedding(
  embedding: tf.keras.Model,
  state: State,
  source: str,
  *,
  map_shape: tuple[int, int, int],
) -> None:
  """Sets the weights of output E if all are there and have its shapes; logs which."""
  targets = {
    key: weight
    for layer in embedding.layers
    for key, weight in _keys(layer, _OUTPUT.get(layer.name, layer.name))
  }
  height, width, channels = map_shape
  values = {key: _converted(state[key]) for key in targets.keys() & state.keys()}
  linear = values.get("fc.weight")
  if linear is not None and linear.shape[-1] == height * width * channels:
    by_place = linear.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
    values["fc.weight"] = by_place.reshape(height * width * channels, -1)
  fits = values.keys() == targets.keys() and not _misfits(targets, values)
  if fits:
    _set(targets, values)
  logging.info(
    "%s: backbone taken; embedding layer %s",
    source,
    "taken too" if fits else "of another shape, so it starts at random",
  )


def _keys(layer: tf.keras.layers.Layer, name: str) -> list[tuple[str, tf.Variable]]:
  """Returns the weights of a layer by their names in PyTorch."""
  parts = [weight.name.split(":")[0].rsplit("/", 1)[-1] for weight in layer.weights]
  return [
    (f"{name}.{_PARTS[part]}", weight)
    for part, weight in zip(parts, layer.weights, strict=True)
  ]


def _converted(value: np.ndarray) -> np.ndarray:
  """Returns a convolution's kernel in Keras' order, anything else as it is."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _misfits(targets: Mapping[str, tf.Variable], values: State) -> list[str]:
  """Lists the values whose shape is another, dimensions of size 1 aside."""
  found = []
  for key, value in values.items():
    shape = tuple(targets[key].shape)
    if [size for size in shape if size > 1] != [
      size for size in value.shape if size > 1
    ]:
      found.append(f"{key} is {list(value.shape)} where {list(shape)} is wanted")
  return found


def _set(targets: Mapping[str, tf.Variable], values: State) -> None:
  """Assigns each value to the variable of its key."""
  for key, value in values.items():
    targets[key].assign(value.reshape(targets[key].shape))


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  """Reads a .safetensors file."""
  from safetensors import numpy as safetensors

  return {
    name: np.asarray(value) for name, value in safetensors.load_file(path).items()
  }


def _read_torch(path: str) -> dict[str, np.ndarray]:
  """Reads a file of torch.save that holds nothing but tensors by name."""
  import torch

  state = torch.load(path, map_location="cpu", weights_only=True)
  return {name: value.float().numpy() for name, value in state.items()}
